"""The linen layers: trees, modes, and what a user of batch norm knows to be true."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import bnjax
from tests.support.cases import NHWC, each_case, run, run_layer
from tests.support.oracle import assert_close

pytestmark = pytest.mark.quick_compile

KEY = jax.random.key(0)
X = jnp.asarray(2 + np.random.default_rng(1).standard_normal((8, 4, 4, 3)), jnp.float32)
LAYERS = (
    pytest.param(bnjax.BatchNorm2d(), id="torch"),
    pytest.param(bnjax.linen.BatchNorm(use_running_average=False), id="flax"),
)


class Net(nn.Module):
    """Two layers in different places of a model."""

    frozen: bool | None = None

    @nn.compact
    def __call__(self, x):
        x = bnjax.BatchNorm2d(3, use_running_average=self.frozen, name="first")(x)
        x = nn.relu(nn.Conv(2, (3, 3))(x))
        return bnjax.BatchNorm2d(2)(x)


def train(layer: nn.Module, variables: Any, x: Any = X, **arguments: Any) -> Any:
    return layer.apply(variables, x, mutable=["batch_stats"], **arguments)


def evaluate(layer: nn.Module, variables: Any, x: Any = X) -> Any:
    return layer.apply(variables, x)


def initialize(layer: nn.Module, x: Any = X) -> Any:
    return layer.init(KEY, x)


@each_case
@pytest.mark.parametrize("mutable", [True, False], ids=["train", "eval"])
def test_a_layer_gives_the_same_as_the_core(rng, case, mutable):
    layer = case.layer(case.channels, axis=case.axis)
    params, stats, x, dy = (
        f(rng) for f in (case.params, case.batch_stats, case.values, case.values)
    )
    found = run_layer(layer, {"params": params, "batch_stats": stats}, x, dy, mutable=mutable)
    expected = run(params, stats, x, dy, mutable=mutable, axis=case.axis)
    assert_close(found, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("settings", "params", "stats"),
    [
        ({}, ["bias", "scale"], ["mean", "var"]),
        ({"affine": False}, [], ["mean", "var"]),
        ({"track_running_stats": False}, ["bias", "scale"], []),
        ({"momentum": None}, ["bias", "scale"], ["count", "mean", "var"]),
        ({"momentum": None, "track_running_stats": False}, ["bias", "scale"], []),
    ],
    ids=str,
)
def test_a_layer_holds_flax_names_and_the_identity(settings, params, stats):
    variables = initialize(bnjax.BatchNorm2d(3, **settings))
    assert sorted(variables.get("params", {})) == params
    assert sorted(variables.get("batch_stats", {})) == stats
    start = {"scale": np.ones(3), "bias": np.zeros(3), "mean": np.zeros(3), "var": np.ones(3)}
    held = {**variables.get("params", {}), **variables.get("batch_stats", {})}
    assert_close(held, {key: start.get(key, np.int32(0)) for key in held})


def test_the_signature_is_that_of_torch():
    layer = bnjax.BatchNorm2d(256, 1e-4, 0.2, False, False)
    named = bnjax.BatchNorm2d(
        num_features=256, eps=1e-4, momentum=0.2, affine=False, track_running_stats=False
    )
    assert layer == named


def test_the_channels_are_taken_from_the_input_where_they_are_not_given():
    assert initialize(bnjax.BatchNorm2d(axis=1))["params"]["scale"].shape == (4,)


def test_initializers_and_parameter_dtype_are_used_and_statistics_stay_float32():
    layer = bnjax.BatchNorm2d(
        3,
        param_dtype=jnp.bfloat16,
        scale_init=nn.initializers.constant(2.0),
        bias_init=nn.initializers.constant(-1.0),
    )
    variables = initialize(layer)
    assert_close(variables["params"], {"scale": np.full(3, 2.0), "bias": np.full(3, -1.0)})
    assert {v.dtype for v in variables["params"].values()} == {jnp.dtype("bfloat16")}
    assert {v.dtype for v in variables["batch_stats"].values()} == {jnp.dtype("float32")}


@pytest.mark.parametrize("layer", LAYERS)
def test_initializing_moves_no_statistics(layer):
    variables = initialize(layer)
    assert_close(variables["batch_stats"], {"mean": np.zeros(3), "var": np.ones(3)})


def test_initializing_normalizes_with_mean_zero_and_variance_one():
    for layer in (
        bnjax.BatchNorm2d(),
        bnjax.BatchNorm2d(track_running_stats=False),
        bnjax.BatchNorm2d(momentum=None),
    ):
        y, _ = layer.init_with_output(KEY, X)
        assert_close(y, X / np.sqrt(1 + 1e-5), rtol=1e-6)


def test_the_mode_is_flaxs_mutable_flag():
    layer = bnjax.BatchNorm2d(3)
    variables = initialize(layer)
    core = (variables["params"], variables["batch_stats"], X)
    y, updates = train(layer, variables)
    assert_close((y, updates["batch_stats"]), bnjax.batch_norm(*core, mutable=True))
    y, updates = layer.apply(variables, X, mutable=["params"])
    assert_close((y, updates), (bnjax.batch_norm(*core, mutable=False)[0], {"params": core[0]}))
    y = evaluate(layer, variables, X)
    assert_close(y, bnjax.batch_norm(*core, mutable=False)[0])


@pytest.mark.parametrize("at_call", [False, True])
def test_a_frozen_layer_evaluates_and_stays_in_training(at_call):
    layer = bnjax.BatchNorm2d(3, use_running_average=None if at_call else True)
    variables = initialize(layer)
    arguments = {"use_running_average": True} if at_call else {}
    y, updates = train(layer, variables, X, **arguments)
    assert_close(y, evaluate(bnjax.BatchNorm2d(3), variables, X))
    assert_close(updates["batch_stats"], variables["batch_stats"])


def test_a_frozen_layer_stays_while_the_rest_of_the_model_trains():
    variables = initialize(Net())
    _, updates = train(Net(frozen=True), variables)
    before, after = variables["batch_stats"], updates["batch_stats"]
    assert_close(after["first"], before["first"])
    assert not np.array_equal(after["BatchNorm2d_0"]["mean"], before["BatchNorm2d_0"]["mean"])


@pytest.mark.parametrize("at_call", [False, True])
def test_asking_for_training_trains(at_call):
    layer = bnjax.BatchNorm2d(3, use_running_average=None if at_call else False)
    variables = initialize(layer)
    arguments = {"use_running_average": False} if at_call else {}
    assert_close(train(layer, variables, X, **arguments), train(bnjax.BatchNorm2d(3), variables))


@pytest.mark.parametrize("layer", LAYERS)
def test_a_mask_reaches_the_core(layer):
    mask = NHWC.row_mask(2)
    x = X[:4]
    variables = initialize(layer, x)
    _, updates = train(layer, variables, x, mask=mask)
    _, expected = train(layer, variables, x[:2])
    assert_close(updates, expected, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_output_has_the_dtype_of_the_input_or_the_one_asked_for(dtype):
    x = X.astype(dtype)
    layer = bnjax.BatchNorm2d(3)
    variables = initialize(layer, x)
    assert train(layer, variables, x)[0].dtype == jnp.dtype(dtype)
    assert evaluate(layer, variables, x).dtype == jnp.dtype(dtype)
    wide = bnjax.BatchNorm2d(3, dtype=jnp.float32)
    assert train(wide, variables, x)[0].dtype == jnp.float32


def test_statistics_are_made_where_a_training_call_brings_none():
    layer = bnjax.BatchNorm2d(3)
    variables = initialize(layer)
    assert_close(train(layer, {"params": variables["params"]}), train(layer, variables))


def test_an_evaluation_is_the_same_for_any_split_of_the_batch():
    variables = initialize(Net())
    _, updates = train(Net(), variables)
    trained = {**variables, **updates}
    whole = evaluate(Net(), trained, X)
    for size in (1, 2, 5):
        parts = [evaluate(Net(), trained, X[i : i + size]) for i in range(0, len(X), size)]
        assert_close(np.concatenate(parts), whole, rtol=1e-6)
    assert_close(evaluate(Net(), trained, X[::-1]), whole[::-1], rtol=1e-6)


@each_case
def test_an_evaluated_example_is_bit_for_bit_the_same_in_any_batch(rng, case):
    layer = case.layer(axis=case.axis)
    x = jnp.asarray(case.values(rng))
    variables = {"params": case.params(rng), "batch_stats": case.batch_stats(rng)}
    parts = [evaluate(layer, variables, x[i : i + 1]) for i in range(len(x))]
    assert_close(np.concatenate(parts), evaluate(layer, variables, x))


def test_without_tracked_statistics_an_evaluation_depends_on_the_rest_of_the_batch():
    layer = bnjax.BatchNorm2d(3, track_running_stats=False)
    variables = initialize(layer)
    alone, together = evaluate(layer, variables, X[:1]), evaluate(layer, variables, X)[:1]
    assert np.max(np.abs(alone - together)) > 0.1
    assert_close(train(layer, variables)[0], evaluate(layer, variables, X))


def test_statistics_move_in_the_forward_pass_and_not_in_the_optimizer_step():
    variables = initialize(Net())
    params, stats = variables["params"], variables["batch_stats"]
    _, updates = train(Net(), variables)
    assert not np.array_equal(updates["batch_stats"]["first"]["mean"], stats["first"]["mean"])
    optimizer = optax.sgd(0.1)
    gradients = jax.grad(lambda params: evaluate(Net(), {**variables, "params": params}, X).sum())
    changes, _ = optimizer.update(gradients(params), optimizer.init(params))
    stepped = {**variables, "params": optax.apply_updates(params, changes)}
    assert_close(train(Net(), stepped)[1]["batch_stats"]["first"], updates["batch_stats"]["first"])
    assert_close(stepped["batch_stats"], stats)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (
            lambda: bnjax.BatchNorm2d(3, momentum=0.87654),
            "momentum=0.87654 gives the new batch a weight of 0.87654 (PyTorch's convention): the "
            "running statistics are little more than those of the last batch. If it comes from "
            "Flax, Keras or Haiku, write momentum=0.12346.",
        ),
        (
            lambda: bnjax.linen.BatchNorm(momentum=0.12345),
            "momentum=0.12345 gives the old statistics a weight of 0.12345 (Flax's convention): "
            "the running statistics are little more than those of the last batch. If it comes "
            "from PyTorch, write momentum=0.87655.",
        ),
    ],
    ids=["torch", "flax"],
)
def test_a_momentum_of_the_other_convention_warns_once_and_where_it_was_written(make, sentence):
    with pytest.warns(UserWarning, match="^momentum=") as caught:
        [make().init(KEY, X, use_running_average=True) for _ in range(3)]
    assert [str(warning.message) for warning in caught] == [sentence]
    assert caught[0].filename == __file__


@pytest.mark.parametrize("momentum", [0.0, 0.1, 0.49, None])
def test_a_usual_momentum_does_not_warn(momentum):
    assert bnjax.BatchNorm2d(3, momentum=momentum).momentum == momentum
    if momentum is not None:
        assert bnjax.linen.BatchNorm(momentum=1 - momentum).momentum == 1 - momentum
