"""Population statistics of a linen model: exact, pure, and pooled over all data."""

import re
from typing import Any, assert_type

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import bnjax
from bnjax.models.conventions import OWN_LINEN

pytestmark = pytest.mark.quick_compile


class Residual(nn.Module):
    """A model in plain Flax: a mode flag, dropout, remat, a layer used twice."""

    norm: type[nn.Module] = nn.BatchNorm

    @nn.compact
    def __call__(self, x, train=False):
        def norm(name):
            if self.norm is nn.BatchNorm:
                return nn.BatchNorm(use_running_average=not train, name=name)
            return self.norm(name=name)

        x = norm("first")(x)
        h = nn.remat(nn.Dense)(6)(x)
        h = nn.relu(norm("second")(h))
        h = nn.Dropout(0.5, deterministic=not train)(h)
        twice = norm("twice")
        h = twice(nn.Dense(6)(twice(h)))
        h = h * self.variable("cache", "factor", jnp.ones, ()).value
        return norm("last")(nn.Dense(3)(x) + nn.Dense(3)(h))


MODELS = [
    pytest.param(Residual(), id="flax"),
    pytest.param(Residual(bnjax.BatchNorm1d), id="bnjax"),
]


@pytest.fixture
def batches(rng):
    parts = ((99, 0.0), (2, 10.0), (50, 3.0))
    return [jnp.asarray(rng.normal(mean, 1, (n, 3)), jnp.float32) for n, mean in parts]


def inputs_of_layers(model, variables, x) -> dict[str, list[np.ndarray]]:
    """What each batch norm sees in evaluation, in float64."""
    seen: dict[str, list[np.ndarray]] = {}

    def look(call, args, kwargs, context):
        if isinstance(context.module, OWN_LINEN) and context.method_name == "__call__":
            seen.setdefault(context.module.path[-1], []).append(np.asarray(args[0], np.float64))
        return call(*args, **kwargs)

    with nn.intercept_methods(look):
        model.apply(variables, x)
    return seen


def assert_population(stats, values):
    np.testing.assert_allclose(stats["mean"], values.mean(0), atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(stats["var"], values.var(0), rtol=1e-5)


@pytest.mark.parametrize("mesh", [False, True])
@pytest.mark.parametrize("model", MODELS)
def test_the_first_layer_has_the_statistics_of_all_data_by_count(model, batches, mesh):
    variables = model.init(jax.random.key(0), batches[0])
    devices = jax.make_mesh((len(jax.devices()),), ("data",)) if mesh else None
    new = bnjax.recalibrate(model, variables, batches, mesh=devices)
    assert_population(new["batch_stats"]["first"], np.concatenate(batches).astype(np.float64))


def test_two_batches_far_apart_have_the_variance_of_both(rng):
    layer = bnjax.BatchNorm1d()
    batches = [jnp.asarray(rng.normal(mean, 1, (500, 2)), jnp.float32) for mean in (0, 10)]
    new = bnjax.recalibrate(layer, layer.init(jax.random.key(0), batches[0]), batches)
    assert_type(new, dict[str, Any])
    np.testing.assert_allclose(new["batch_stats"]["var"], 26, atol=1)


@pytest.mark.parametrize("model", MODELS)
def test_sequential_gives_each_layer_the_statistics_of_what_it_will_see(model, batches):
    variables = model.init(jax.random.key(0), batches[0])
    new = bnjax.recalibrate(model, variables, batches, sequential=True)
    seen = inputs_of_layers(model, new, jnp.concatenate(batches))
    for name in ("first", "second", "last"):
        assert_population(new["batch_stats"][name], np.concatenate(seen[name]))


def test_without_sequential_deep_layers_have_what_they_saw_in_training(batches):
    # If a single batch is all the data, evaluation equals training.
    model = nn.Sequential([bnjax.BatchNorm1d(), nn.Dense(5), nn.relu, bnjax.BatchNorm1d()])
    variables = model.init(jax.random.key(0), batches[0])
    trained, _ = model.apply(variables, batches[0], mutable=["batch_stats"])
    new = bnjax.recalibrate(model, variables, batches[:1])
    evaluated: Any = model.apply(new, batches[0])
    np.testing.assert_allclose(evaluated, trained, atol=1e-5)


@pytest.mark.parametrize("model", MODELS)
def test_a_layer_used_twice_pools_both_uses(model, batches):
    variables = model.init(jax.random.key(0), batches[0])
    seen: list[np.ndarray] = []

    def look(call, args, kwargs, context):
        if context.module.name == "twice" and context.method_name == "__call__":
            seen.append(np.asarray(args[0], np.float64))
        return call(*args, **kwargs)

    for x in batches:
        with bnjax.override("**", use_running_average=False), nn.intercept_methods(look):
            model.apply(variables, x, mutable=["batch_stats"])
    new = bnjax.recalibrate(model, variables, batches)
    assert_population(new["batch_stats"]["twice"], np.concatenate(seen))


def test_masked_examples_do_not_count(batches):
    model = Residual(bnjax.BatchNorm1d)
    variables = model.init(jax.random.key(0), batches[0])
    padded = [
        {"x": jnp.concatenate([x, jnp.full((5, 3), 1e3)]), "mask": np.arange(len(x) + 5) < len(x)}
        for x in batches
    ]
    new = bnjax.recalibrate(model, variables, padded)
    expected = bnjax.recalibrate(model, variables, batches)
    chex.assert_trees_all_close(new, expected, rtol=2e-5, atol=1e-5)


def test_only_chosen_layers_are_recalibrated(batches):
    model = Residual()
    variables = model.init(jax.random.key(0), batches[0])
    new = bnjax.recalibrate(model, variables, batches, paths="s*")["batch_stats"]
    old = variables["batch_stats"]
    assert {name for name in new if np.any(new[name]["var"] != old[name]["var"])} == {"second"}


@pytest.mark.parametrize("sequential", [False, True])
def test_nothing_changes_when_the_iterator_fails(batches, sequential):
    model = Residual()
    variables = model.init(jax.random.key(0), batches[0])
    before = jax.device_get(variables)

    class Failing:
        def __iter__(self):
            yield batches[0]
            raise OSError("the disk is gone")

    with pytest.raises(OSError, match=r"^the disk is gone$"):
        bnjax.recalibrate(model, variables, Failing(), sequential=sequential)
    chex.assert_trees_all_equal(variables, before)


def test_parameters_and_other_collections_are_the_same_objects(batches):
    model = Residual()
    variables = model.init(jax.random.key(0), batches[0])
    before = jax.device_get(variables)
    new = bnjax.recalibrate(model, variables, iter(batches), progress=True)
    assert new["params"] is variables["params"]
    assert new["cache"] is variables["cache"]
    chex.assert_trees_all_equal(variables, before)
    assert jax.tree.structure(new) == jax.tree.structure(variables)


def test_dropout_stays_off_though_batch_norm_measures(batches):
    model = Residual()
    variables = model.init(jax.random.key(0), batches[0])
    a, b = (bnjax.recalibrate(model, variables, batches) for _ in range(2))
    chex.assert_trees_all_equal(a, b)


class Normalized(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.BatchNorm(True)(x)


BATCH = np.ones((4, 3), np.float32) * np.arange(4)[:, None]
NO_BATCH = (
    "`batches` must hold at least one batch, got none. An iterator can be used only once: pass a "
    "list, or create it again."
)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batches": []}, NO_BATCH),
        ({"batches": [], "sequential": True}, NO_BATCH),
        (
            {"batches": iter([BATCH]), "sequential": True},
            "`batches` must be iterable once per layer, got a list_iterator, which can be used "
            "only once. Pass a list, or use sequential=False.",
        ),
        (
            {"variables": {"params": {}}},
            "`variables` must be a dict with the collection `batch_stats`, like those of any model "
            "with batch norms, got ['params']. Pass {'params': params, 'batch_stats': "
            "batch_stats}.",
        ),
        (
            {"batches": [BATCH * np.nan]},
            "These layers saw no finite mean and variance: BatchNorm_0 (3 channels). Do the "
            "batches or parameters hold NaN or inf, or is a mask all False?",
        ),
    ],
)
def test_bad_input_is_an_error_that_says_what_to_do(changes, message):
    model = Normalized()
    arguments = {"variables": model.init(jax.random.key(0), BATCH), "batches": [BATCH]} | changes
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        bnjax.recalibrate(model, **arguments)


def test_variables_of_another_model_are_an_error():
    model = Residual()
    variables = model.init(jax.random.key(0), BATCH)
    other = {"params": {}, "batch_stats": variables["batch_stats"]}
    message = r"^`variables` or an input of shape .* do not fit the model: "
    with pytest.raises(ValueError, match=message + "Tried to access "):
        bnjax.recalibrate(model, other, [BATCH])


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("kind", [bnjax.BatchNorm1d, bnjax.linen.BatchNorm, nn.BatchNorm])
def test_the_devices_of_the_training_are_not_needed(kind, sequential):
    x = np.arange(12, dtype=np.float32).reshape(4, 3)
    settings: dict[str, Any] = {}
    if kind is not bnjax.BatchNorm1d:
        settings = {"use_running_average": False}
    variables = kind(**settings).init(jax.random.key(0), x)
    layer = kind(axis_name="data", **settings)
    found = bnjax.recalibrate(layer, variables, [x], sequential=sequential)
    np.testing.assert_allclose(found["batch_stats"]["mean"], x.mean(0), rtol=1e-6)


def test_modules_named_mean_and_var_are_not_batch_norms():
    class Head(nn.Module):
        @nn.compact
        def __call__(self, x):
            return bnjax.BatchNorm1d()(x)

    class Encoder(nn.Module):
        @nn.compact
        def __call__(self, x):
            return Head(name="mean")(x) + Head(name="var")(x)

    x = np.arange(12, dtype=np.float32).reshape(4, 3)
    variables = Encoder().init(jax.random.key(0), x)
    found = bnjax.recalibrate(Encoder(), variables, [x])["batch_stats"]
    for name in ("mean", "var"):
        np.testing.assert_allclose(found[name]["BatchNorm1d_0"]["mean"], x.mean(0), rtol=1e-6)
