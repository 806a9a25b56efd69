"""Population statistics of an nnx model, which is not modified."""

import re
from typing import Any, assert_type

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import bnjax
from tests.support.models import Branches
from tests.support.nnx_layers import KINDS, held, make, moved

pytestmark = pytest.mark.quick_compile

NORMS = {"flax": nnx.BatchNorm, "drop-in": bnjax.nnx.BatchNorm, "1d": bnjax.nnx.BatchNorm1d}
each_norm = pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)


@pytest.fixture
def batches(rng):
    parts = ((99, 0.0), (2, 10.0), (50, 3.0))
    return [jnp.asarray(rng.normal(mean, 1, (n, 3)), jnp.float32) for n, mean in parts]


def inputs_of_layers(model: Any, batches: Any) -> dict[str, np.ndarray]:
    """What each batch norm sees, in float64."""
    seen = nnx.clone(model)
    object.__setattr__(seen, "inputs", {})
    seen.dropout.deterministic = True
    for x in batches:
        seen(x)
    return {name: np.concatenate(parts) for name, parts in seen.inputs.items()}


def assert_population(layer: Any, values: np.ndarray) -> None:
    np.testing.assert_allclose(layer.mean[...], values.mean(0), atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(layer.var[...], values.var(0), rtol=1e-5)


def updated(model: Any, state: nnx.State) -> Any:
    new = nnx.clone(model)
    nnx.update(new, state)
    return new


@each_norm
@pytest.mark.parametrize("mesh", [False, True])
def test_the_statistics_are_those_of_all_data_by_count_and_of_all_uses(norm, batches, mesh):
    model = Branches(nnx.Rngs(0), norm)
    devices = jax.make_mesh((len(jax.devices()),), ("data",)) if mesh else None
    state = bnjax.recalibrate(model, None, batches, mesh=devices)
    assert_type(state, nnx.State)
    new = updated(model, state)
    expected = inputs_of_layers(model, batches)
    assert_population(new.first, expected["first"])
    assert_population(new.norms[0], expected["norms/0"])
    assert_population(new.twice, expected["norms/1"])


def test_a_model_on_one_device_is_measured_on_a_mesh_of_all(batches):
    model = Branches(nnx.Rngs(0))
    nnx.update(model, jax.device_put(nnx.state(model), jax.devices()[1]))
    mesh = jax.make_mesh((len(jax.devices()),), ("data",))
    state = bnjax.recalibrate(model, None, batches, mesh=mesh)
    assert_population(updated(model, state).first, np.concatenate(batches).astype(np.float64))


@each_norm
def test_sequential_gives_each_layer_the_statistics_of_what_it_will_see(norm, batches):
    model = Branches(nnx.Rngs(0), norm)
    new = updated(model, bnjax.recalibrate(model, None, batches, sequential=True))
    new.eval()
    expected = inputs_of_layers(new, batches)
    assert_population(new.first, expected["first"])
    assert_population(new.norms[0], expected["norms/0"])


@each_norm
def test_masked_examples_do_not_count(norm, batches):
    model = Branches(nnx.Rngs(0), norm)
    padded = [
        {"x": jnp.concatenate([x, jnp.full((5, 3), 1e3)]), "mask": np.arange(len(x) + 5) < len(x)}
        for x in batches
    ]
    new, expected = (updated(model, bnjax.recalibrate(model, None, b)) for b in (padded, batches))
    chex.assert_trees_all_close(held_stats(new), held_stats(expected), rtol=2e-5, atol=1e-5)


def held_stats(model: Any) -> dict[str, Any]:
    return {k: v for k, v in held(model).items() if k.rpartition("/")[2] in ("mean", "var")}


@pytest.mark.parametrize("kind", KINDS)
def test_a_mask_that_the_model_gives_counts_as_well(kind, batches):
    class Masked(nnx.Module):
        def __init__(self) -> None:
            self.bn = make(kind) if kind is not KINDS[0] else make(bnjax.nnx.BatchNorm1d)

        def __call__(self, x: Any) -> Any:
            return self.bn(x, mask=x[:, :1] > 0)

    x = batches[0]
    new = updated(Masked(), bnjax.recalibrate(Masked(), None, [x]))
    assert_population(new.bn, np.asarray(x, np.float64)[np.asarray(x[:, 0]) > 0])


def test_statistics_are_pooled_by_one_device_where_training_names_several(batches):
    for kind in KINDS[1:]:
        layer = make(kind, axis_name="devices")
        new = updated(layer, bnjax.recalibrate(layer, None, batches))
        assert_population(new, np.concatenate(batches).astype(np.float64))


def test_shards_that_the_model_maps_itself_are_pooled(rng):
    class Mapped(nnx.Module):
        def __init__(self) -> None:
            self.bn = bnjax.nnx.BatchNorm1d(3, axis_name="shards", rngs=nnx.Rngs(0))

        def __call__(self, x: jax.Array) -> jax.Array:
            axes: Any = nnx.StateAxes({...: None})
            shards = x.reshape(2, -1, 3)
            return nnx.vmap(lambda bn, x: bn(x), in_axes=(axes, 0), axis_name="shards")(
                self.bn, shards
            )

    x = jnp.asarray(rng.normal(size=(8, 3)) * np.arange(8)[:, None], jnp.float32)
    new = updated(Mapped(), bnjax.recalibrate(Mapped(), None, [x]))
    assert_population(new.bn, np.asarray(x, np.float64))


@pytest.mark.parametrize("ways", ["jit", "scan"])
def test_layers_inside_transformations_are_measured(batches, ways):
    class Loop(nnx.Module):
        def __init__(self) -> None:
            self.bn = nnx.vmap(lambda rngs: nnx.BatchNorm(3, rngs=rngs))(nnx.Rngs(0).split(2))

        def __call__(self, x: jax.Array) -> jax.Array:
            return nnx.scan(lambda x, bn: 2 * bn(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(
                x, self.bn
            )

    class Jitted(nnx.Module):
        def __init__(self) -> None:
            self.bn = make(nnx.BatchNorm)

        def __call__(self, x: jax.Array) -> jax.Array:
            return nnx.jit(lambda bn, x: bn(x))(self.bn, x)

    x = batches[0]
    model: Any = Loop() if ways == "scan" else Jitted()
    new = updated(model, bnjax.recalibrate(model, None, [x]))
    mean, var = np.asarray(x.mean(0)), np.asarray(x.var(0))
    if ways == "scan":
        mean, var = np.stack([mean, 0 * mean]), np.stack([var, 4 * var / (var + 1e-5)])
    np.testing.assert_allclose(new.bn.mean[...], mean, atol=1e-5)
    np.testing.assert_allclose(new.bn.var[...], var, rtol=1e-4)


@pytest.mark.parametrize("sequential", [False, True])
def test_nothing_changes_when_the_iterator_fails(batches, sequential):
    model = Branches(nnx.Rngs(0))
    before, graphdef = held(model), nnx.graphdef(model)

    class Failing:
        def __iter__(self):
            yield batches[0]
            raise OSError("the disk is gone")

    with pytest.raises(OSError, match=r"^the disk is gone$"):
        bnjax.recalibrate(model, None, Failing(), sequential=sequential)
    chex.assert_trees_all_equal(held(model), before)
    assert nnx.graphdef(model) == graphdef


@pytest.mark.parametrize("references", [False, True])
def test_the_model_is_unchanged_and_only_statistics_differ(batches, references):
    with nnx.var_defaults(ref=references):
        model = Branches(nnx.Rngs(0))
    model(batches[0])
    before, graphdef = held(model), nnx.graphdef(model)
    state = bnjax.recalibrate(model, None, iter(batches), progress=True)
    chex.assert_trees_all_equal(held(model), before)
    assert nnx.graphdef(model) == graphdef
    assert jax.tree.structure(nnx.to_pure_dict(state)) == jax.tree.structure(
        nnx.to_pure_dict(nnx.state(model))
    )
    new = updated(model, state)
    norms = ("first", "norms/0", "norms/1")
    assert moved(before, held(new)) == {f"{n}/{s}" for n in norms for s in ("mean", "var")}
    chex.assert_trees_all_equal(held(model), before)


def test_only_chosen_layers_are_recalibrated_a_shared_one_by_any_of_its_paths(batches):
    model = Branches(nnx.Rngs(0))
    before = held(model)
    new = updated(model, bnjax.recalibrate(model, None, batches, paths="t*"))
    assert moved(before, held(new)) == {"norms/1/mean", "norms/1/var"}


def test_a_frozen_layer_is_recalibrated_and_stays_frozen(batches):
    layer = make(nnx.BatchNorm)
    bnjax.nnx.freeze(layer)
    new = updated(layer, bnjax.recalibrate(layer, None, batches))
    assert_population(new, np.concatenate(batches).astype(np.float64))
    layer.train()
    assert layer.use_running_average is True


def test_a_layer_with_extra_arguments_is_measured(batches):
    class Renamed(nnx.BatchNorm):
        def __call__(self, x, train):  # pyright: ignore[reportIncompatibleMethodOverride]
            return super().__call__(x, use_running_average=not train)

    layer = make(Renamed)
    new = bnjax.recalibrate(layer, None, batches, apply_kwargs={"train": False})
    assert_population(updated(layer, new), np.concatenate(batches).astype(np.float64))


def test_a_partial_state_such_as_averaged_parameters_replaces_the_models(batches):
    model = Branches(nnx.Rngs(0))
    averaged = jax.tree.map(lambda leaf: leaf * 2, nnx.state(model, nnx.Param))
    new = updated(model, bnjax.recalibrate(model, averaged, batches))
    np.testing.assert_array_equal(new.dense.kernel[...], 2 * model.dense.kernel[...])
    twin = updated(model, averaged)
    assert_population(new.norms[0], inputs_of_layers(twin, batches)["norms/0"])


MISTAKES = {
    "a number": (
        lambda model: bnjax.recalibrate(model, 3, []),
        TypeError,
        "`variables` of an nnx model must be an nnx.State, such as `nnx.state(model)`, or None for "
        "the model's own, got int.",
    ),
    "a dict of another model": (
        lambda model: bnjax.recalibrate(model.first, {"bias": np.zeros(3)}, []),
        ValueError,
        "`variables` do not fit the model: missing ['mean', 'scale', 'var']. Are they another "
        "model's?",
    ),
    "another model": (
        lambda model: bnjax.recalibrate(model, nnx.state(make(num_features=6)), []),
        ValueError,
        "`variables` do not fit the model: unknown ['bias', 'mean', 'scale', 'var']. Are they "
        "another model's?",
    ),
    "another shape": (
        lambda model: bnjax.recalibrate(model.first, nnx.state(make(num_features=6)), []),
        ValueError,
        "`variables` do not fit the model: of another shape ['bias (6,) not (3,)', 'mean (6,) not "
        "(3,)', 'scale (6,) not (3,)', 'var (6,) not (3,)']. Are they another model's?",
    ),
    "no model": (
        lambda model: bnjax.recalibrate(model.__call__, None, []),
        TypeError,
        "`model` must be an instance of a flax.linen.Module or a flax.nnx.Module, got method. "
        "Pass the model itself, not its variables or its apply.",
    ),
    "no statistics": (
        lambda model: bnjax.recalibrate(model.dense, None, []),
        ValueError,
        "`model` must call a batch norm of bnjax or Flax, but calls none. If it has one of another "
        "class, register that with bnjax.register.",
    ),
    "no batch": (
        lambda model: bnjax.recalibrate(model, None, []),
        ValueError,
        "`batches` must hold at least one batch, got none. An iterator can be used only once: pass "
        "a list, or create it again.",
    ),
    "no such layer": (
        lambda model: bnjax.recalibrate(model, None, [], paths="bn"),
        ValueError,
        "The pattern 'bn' matches no batch norm: there are ['first', 'norms/0', 'norms/1', "
        "'twice']. `*` matches part of one name, `**` any number of names, as in 'encoder/**'.",
    ),
    "NaN": (
        lambda model: bnjax.recalibrate(model.first, None, [jnp.full((2, 3), jnp.nan)]),
        ValueError,
        "These layers saw no finite mean and variance: the top of the model (3 channels). Do the "
        "batches or parameters hold NaN or inf, or is a mask all False?",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_each_mistake_raises_an_error_with_a_repair(name):
    call, error, message = MISTAKES[name]
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        call(Branches(nnx.Rngs(0)))
