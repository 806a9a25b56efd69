"""The nnx layers: linen's bits, Flax's drop-in, the modes, and transformations."""

import functools
import inspect
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import bnjax
from tests.support.cases import CASES, Case, outcome, run_layer
from tests.support.nnx_layers import (
    DECODER,
    ENCODER,
    KINDS,
    ROW,
    ROWS,
    SHARED,
    X,
    assert_bits,
    held,
    make,
    moved,
    moving,
    net,
)
from tests.support.oracle import assert_close

pytestmark = pytest.mark.quick_compile

NAMES = ("mean", "var", "scale", "bias", "count")
UNLIKE = list({(case.layer, case.axis): case for case in CASES}.values())


@functools.partial(jax.jit, static_argnums=0)
def run(graphdef: Any, state: Any, params: Any, stats: Any, x: Any, cotangent: Any) -> Any:
    """The outcome of an nnx layer that holds these numbers, compiled."""

    def apply(params, x):
        layer = nnx.merge(graphdef, jax.tree.map(jnp.copy, state))
        for name, value in {**params, **stats}.items():
            getattr(layer, name)[...] = value
        return layer(x), {name: getattr(layer, name)[...] for name in stats}

    return outcome(apply, params, x, cotangent)


def twins(case: Case, layer: Any, linen: Any, rng: Any, *, train: bool) -> tuple[Any, Any]:
    x, dy, params, stats = (
        f(rng) for f in (case.values, case.values, case.params, case.batch_stats)
    )
    variables = {"params": params, "batch_stats": stats}
    found = run(*nnx.split(layer), params, stats, x, dy)
    return found, run_layer(linen, variables, x, dy, mutable=train)


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("case", UNLIKE, ids=lambda case: case.name)
def test_linen_and_nnx_layers_with_the_same_numbers_give_the_same_bits(rng, case, train):
    kind = getattr(bnjax.nnx, case.layer.__name__)
    settings = {"eps": 1e-3, "momentum": 0.3, "axis": case.axis}
    layer = make(kind, case.channels, use_running_average=not train, **settings)
    linen = case.layer(case.channels, **settings)
    assert_bits(*twins(case, layer, linen, rng, train=train))


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_the_drop_ins_of_linen_and_nnx_with_the_same_numbers_give_the_same_bits(rng, train):
    case = next(case for case in UNLIKE if case.axis == 1)
    settings = {"use_running_average": not train, "axis": 1, "epsilon": 1e-3, "momentum": 0.9}
    layer = make(bnjax.nnx.BatchNorm, case.channels, **settings)
    linen = bnjax.linen.BatchNorm(**settings)
    assert_bits(*twins(case, layer, linen, rng, train=train))


SETTINGS = (
    {},
    {"axis": 1, "num_features": 4},
    {"use_bias": False},
    {"use_scale": False},
    {"use_bias": False, "use_scale": False},
    {"momentum": 0.9, "epsilon": 1e-3},
    {"dtype": jnp.bfloat16},
    {"dtype": jnp.float16, "use_bias": False},
    {"dtype": jnp.float32},
    {"param_dtype": jnp.bfloat16},
    {"use_fast_variance": False},
    {"promote_dtype": lambda arrays, *, dtype=None: arrays, "use_bias": False, "use_scale": False},
    {"scale_init": nnx.initializers.normal(), "bias_init": nnx.initializers.normal()},
    {"scale_metadata": {"tag": 1}, "bias_metadata": {"tag": 2}},
)
each_setting = pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: ", ".join(s) or "none")


def calls(kind: Any, x: jax.Array, mask: Any = None, **settings: Any) -> tuple[Any, Any]:
    """What a layer gives in training and in evaluation, and what it holds after."""
    layer = make(kind, **{"num_features": 3, **settings})
    start = held(layer)
    layer.train()
    trained = layer(x, mask=mask)
    layer.eval()
    return (start, trained, layer(x), held(layer)), layer


def assert_same(found: Any, expected: Any, *, within: float) -> None:
    assert_close(found, expected, rtol=within, atol=1e-6)
    chex.assert_trees_all_equal_dtypes(found, expected)


@each_setting
@pytest.mark.parametrize("mask", [None, ROWS], ids=["all", "mask"])
def test_every_setting_gives_flaxs_values_dtypes_and_variables(settings, mask):
    half = {jnp.bfloat16, jnp.float16} & {settings.get("dtype"), settings.get("param_dtype")}
    found, ours = calls(bnjax.nnx.BatchNorm, X, mask, **settings)
    expected, flaxs = calls(nnx.BatchNorm, X, mask, **settings)
    assert_same(found, expected, within=2e-2 if half else 1e-5)
    variables = [
        {path: (type(v), v.get_metadata()) for path, v in nnx.to_flat_state(nnx.state(layer))}
        for layer in (ours, flaxs)
    ]
    assert variables[0] == variables[1]


@each_setting
@pytest.mark.parametrize("dtype", ["bfloat16", "int32"])
def test_every_input_dtype_gives_flaxs_values_and_dtypes(settings, dtype):
    x = jnp.abs(X).astype(dtype)
    found, expected = (calls(B, x, **settings)[0] for B in (bnjax.nnx.BatchNorm, nnx.BatchNorm))
    assert_same(found, expected, within=2e-2)


def test_complex_input_is_evaluated_as_by_flax():
    x = X * (1 + 2j)
    found, expected = (make(B, use_running_average=True)(x) for B in KINDS[1:])
    assert_same(found, expected, within=1e-5)


OUR_OWN = ("using", "banks", "bank", "scale", "bias")


@pytest.mark.parametrize("method", ["__init__", "__call__", "set_view"])
def test_the_drop_in_has_flaxs_arguments_and_defaults(method):
    flaxs, ours = (
        [
            (p.name, p.kind, p.default)
            for p in inspect.signature(getattr(B, method)).parameters.values()
        ]
        for B in (nnx.BatchNorm, bnjax.nnx.BatchNorm)
    )
    assert [each for each in ours if each[0] not in OUR_OWN] == flaxs
    added = [each for each in ours if each not in flaxs]
    assert all(each[1:] == (inspect.Parameter.KEYWORD_ONLY, None) for each in added)


@pytest.mark.parametrize("kind", KINDS)
def test_the_mode_of_the_call_wins_over_that_of_the_layer(kind):
    layer = make(kind)
    layer.eval()
    before = held(layer)
    y = layer(X, use_running_average=False)
    assert moved(before, held(layer)) == {"mean", "var"}
    layer.train()
    before = held(layer)
    assert not np.array_equal(layer(X, use_running_average=True), y)
    assert not moved(before, held(layer))


def test_the_signature_is_that_of_torch_and_the_number_of_channels_is_required():
    layer = make(bnjax.nnx.BatchNorm2d, 256, eps=1e-4, momentum=0.2, affine=False)
    named = bnjax.nnx.BatchNorm2d(256, 1e-4, 0.2, False, True, rngs=nnx.Rngs(1))
    assert nnx.graphdef(layer) == nnx.graphdef(named)
    needs = r"^bnjax\.nnx\.BatchNorm2d needs `num_features`, as in BatchNorm2d\(64, rngs=.*\)\.$"
    with pytest.raises(TypeError, match=needs):
        bnjax.nnx.BatchNorm2d(rngs=nnx.Rngs(0))  # pyright: ignore[reportCallIssue]


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({}, {"mean", "var", "scale", "bias"}),
        ({"affine": False}, {"mean", "var"}),
        ({"track_running_stats": False}, {"scale", "bias"}),
        ({"momentum": None}, {"mean", "var", "scale", "bias", "count"}),
        ({"momentum": None, "track_running_stats": False}, {"scale", "bias"}),
    ],
    ids=lambda value: str(sorted(value)),
)
def test_a_layer_holds_the_variables_of_its_settings(settings, names):
    layer = make(**settings)
    assert set(held(layer)) == names
    assert set(nnx.to_pure_dict(nnx.state(layer, nnx.Param))) == names & {"scale", "bias"}
    assert set(nnx.to_pure_dict(nnx.state(layer, nnx.BatchStat))) == names - {"scale", "bias"}
    assert layer(X).shape == X.shape


def test_statistics_are_float32_at_least_and_the_output_has_the_dtype_of_the_input():
    layer = make(param_dtype=jnp.bfloat16)
    y = layer(X.astype(jnp.bfloat16))
    assert (y.dtype, layer.scale.dtype, layer.mean.dtype) == ("bfloat16", "bfloat16", "float32")
    assert make(dtype=jnp.float32)(X.astype(jnp.bfloat16)).dtype == jnp.float32


def test_train_and_eval_switch_between_batch_and_running_statistics():
    layer = make()
    variables = {name: getattr(layer, name)[...] for name in ("mean", "var")}
    y, stats = bnjax.batch_norm({}, variables, X, mutable=True)
    assert_close(layer(X), y, rtol=1e-6)
    assert_close(
        {name: layer_value for name, layer_value in held(layer).items() if name in stats}, stats
    )
    layer.eval()
    before = held(layer)
    assert_close(layer(X), bnjax.batch_norm({}, stats, X, mutable=False)[0], rtol=1e-6)
    assert_close(held(layer), before)
    layer.train()
    layer(X)
    assert moved(before, held(layer)) == {"mean", "var"}


def test_a_view_has_its_own_mode_and_the_same_variables():
    layer = make()
    view = nnx.view(layer, use_running_average=True)
    assert (layer.use_running_average, view.use_running_average) == (False, True)
    layer(X)
    before = held(layer)
    assert_close(view(X), layer(X, use_running_average=True))
    assert_close(held(view), before)
    assert "use_running_average: bool | None = None" in nnx.view_info(layer)


def test_momentum_none_is_the_cumulative_average():
    layer = make(momentum=None)
    for rows in (X[:4], X[4:]):
        layer(rows)
    assert int(layer.count[...]) == 2
    assert_close(layer.mean[...], X.mean((0, 1, 2)), rtol=1e-6)


def test_compiled_gradients_of_a_model_move_its_statistics_and_are_of_its_parameters():
    model, eager = net(), net()

    def loss(model):
        return jnp.sum(model(ROW) ** 2)

    value, gradients = nnx.jit(nnx.value_and_grad(loss))(model)
    assert_close(value, loss(eager), rtol=1e-5)
    assert_close(held(model), held(eager), rtol=1e-5, atol=1e-6)
    kinds = {type(variable) for _, variable in nnx.to_flat_state(gradients)}
    assert kinds == {nnx.Param}
    assert moving(model) == ENCODER | DECODER | SHARED


def test_rematerialization_moves_the_statistics_once():
    layer, once = make(), make()
    nnx.grad(lambda layer: jnp.sum(nnx.remat(lambda layer, x: layer(x))(layer, X) ** 3))(layer)
    once(X)
    assert_close(held(layer), held(once), rtol=1e-6)


def test_a_model_that_was_split_and_merged_goes_on_where_it_was():
    model = net()
    model(ROW)
    model.eval()
    again = nnx.merge(*nnx.split(model))
    assert_bits(again(ROW), model(ROW))
    assert not moving(again)


@pytest.mark.parametrize("frozen", [False, True])
def test_a_checkpoint_restores_the_state_of_a_model(tmp_path, frozen):
    model, fresh = net(), net()
    model(ROW)
    if frozen:
        bnjax.nnx.freeze(model, "encoder/**")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "model", nnx.state(model))
        checkpointer.wait_until_finished()
        nnx.update(fresh, checkpointer.restore(tmp_path / "model", nnx.state(fresh)))
    assert_bits(held(fresh), held(model))
    assert moving(fresh) == ENCODER | DECODER | SHARED


@pytest.mark.parametrize("kind", KINDS)
def test_statistics_that_are_references_move(kind):
    with nnx.var_defaults(ref=True):
        layer = make(kind)
    layer(X)
    plain = make(kind)
    plain(X)
    assert_close(held(layer), held(plain))
