"""Statistics pooled over micro-batches, over the devices of a mesh, and after the fact."""

import contextlib
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import bnjax
from bnjax.training import TrainState, eval_step, evaluate, init_state, pad_batch, train_step
from tests.oracle import assert_close

Norms = Mapping[str, Callable[..., nn.Module]]

CONVENTIONS: Norms = {
    "cumulative": functools.partial(bnjax.BatchNorm2d, momentum=None),
    "drop_in": functools.partial(bnjax.linen.BatchNorm, use_running_average=False),
    "flax": functools.partial(nn.BatchNorm, use_running_average=False),
}
LAYERS: Norms = {
    **CONVENTIONS,
    "torch": bnjax.BatchNorm2d,
    "channels_first": functools.partial(bnjax.BatchNorm2d, axis=1),
    "plain": functools.partial(bnjax.BatchNorm2d, affine=False),
    "untracked": functools.partial(bnjax.BatchNorm2d, track_running_stats=False),
}
FROZEN = functools.partial(bnjax.BatchNorm2d, use_running_average=True)


class Parallel(nn.Module):
    """Batch norms side by side, each on the images; with them may come a mask."""

    norms: Norms

    @nn.compact
    def __call__(self, x):
        x, mask = (x["image"], x["mask"]) if isinstance(x, Mapping) else (x, None)
        outputs = [make(name=name)(x, mask=mask) for name, make in self.norms.items()]
        return jnp.stack(outputs).sum(0)


class OfVectors(nn.Module):
    """The 1d layer, on the pixels of all images."""

    @nn.compact
    def __call__(self, x):
        return bnjax.BatchNorm1d(name="rows")(x[:, 0]) + bnjax.BatchNorm1d()(x[:, 0, 0])[:, None]


class Rematerialized(nn.Module):
    norms: Norms

    @nn.compact
    def __call__(self, x):
        return nn.remat(Parallel)(self.norms)(x)


class OneOfThree(nn.Module):
    """A part of a stack; what it passes on does not depend on how it normalizes."""

    norms: Norms

    @nn.compact
    def __call__(self, x, _):
        return jnp.tanh(nn.Dense(x.shape[-1])(x)), Parallel(self.norms)(x)


class Scanned(nn.Module):
    norms: Norms

    @nn.compact
    def __call__(self, x):
        axes: Any = {"params": 0, "batch_stats": 0}
        stack = nn.scan(OneOfThree, variable_axes=axes, split_rngs={"params": True}, length=3)
        return stack(self.norms)(x, None)[1].sum(0)


class InALoop(nn.Module):
    """Batch norms that a loop calls three times, each time on other values."""

    norms: Norms

    @nn.compact
    def __call__(self, x):
        def body(layers, x, _):
            return 2 * jnp.tanh(x) - 1, layers(x)

        layers = Parallel(self.norms)
        if self.is_initializing():
            return layers(x)
        kinds: Any = {"variable_carry": "batch_stats", "variable_broadcast": "params"}
        return nn.scan(body, length=3, **kinds)(layers, x, None)[1].sum(0)


class Twice(nn.Module):
    """Batch norms that are called on two inputs."""

    norms: Norms

    @nn.compact
    def __call__(self, x):
        layers = Parallel(self.norms)
        return layers(x) + layers(3 * jnp.tanh(x))


class ByKeyword(nn.Module):
    norms: Norms

    @nn.compact
    def __call__(self, x):
        return sum(make()(x=x) for make in self.norms.values())


class Frozen(nn.Module):
    """Batch norms that do not train, ours and Flax's, before one that does."""

    @nn.compact
    def __call__(self, x):
        x = FROZEN(name="frozen")(x)
        x = nn.BatchNorm(use_running_average=True, name="frozen_by_flax")(x)
        return bnjax.BatchNorm2d(name="trained")(x)


TRAINED = Parallel({"norm": bnjax.BatchNorm2d})


class Net(nn.Module):
    """A batch norm between two layers that learn."""

    body: nn.Module
    stem: bool = True

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (2, 2), use_bias=False)(x) if self.stem else x
        y = self.body(x)
        return nn.Dense(1)(y.reshape(len(y), -1))[:, 0]


def squared_error(outputs, batch):
    return (outputs - batch["y"]) ** 2


def images(seed: int, size: int = 32) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    x = 1 + 2 * rng.standard_normal((size, 3, 2, 4))
    return {"x": x.astype(np.float32), "y": rng.standard_normal(size).astype(np.float32)}


def start(model: nn.Module, x: Any, rate: float = 0.1) -> TrainState:
    """A state with random statistics."""
    rng = np.random.default_rng(1)

    def random(leaf):
        whole = jnp.issubdtype(leaf.dtype, jnp.integer)
        return np.asarray(rng.uniform(0.5, 2, leaf.shape) + 3 * whole, leaf.dtype)

    state = init_state(model, optax.sgd(rate), jax.random.key(0), x)
    stats = jax.tree.map(random, state.batch_stats)
    return state.replace(batch_stats=stats)


def trained(state: TrainState, batches: list[Any], **options: Any) -> TrainState:
    """The state after a step for each batch."""
    step = train_step(squared_error, donate=False, **options)
    for batch in batches:
        state, metrics = step(state, batch)
        assert metrics["accepted"]
        assert np.isfinite(metrics["loss"])
    return jax.device_get(state)


def assert_microbatches_pool(body: nn.Module, batches: list[Any], microbatches: int = 4) -> None:
    """Statistics are those of whole batches, where nothing else changes: the rate is 0."""
    state = start(Net(body, stem=False), batches[0]["x"], rate=0.0)
    parts = trained(state, batches, microbatches=microbatches)
    assert_close(parts.batch_stats, trained(state, batches).batch_stats, rtol=1e-5)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), parts.batch_stats, state.batch_stats)
    assert min(jax.tree.leaves(moved)) > 0


def test_microbatches_give_the_statistics_of_the_whole_batch():
    assert_microbatches_pool(Parallel(LAYERS), [images(0), images(1)], microbatches=4)


def test_microbatches_may_be_of_one_example():
    assert_microbatches_pool(TRAINED, [images(0)], microbatches=32)


def test_microbatches_give_the_statistics_of_the_whole_batch_in_1d():
    assert_microbatches_pool(OfVectors(), [images(0)])


@pytest.mark.parametrize("channels", [1, 4])
def test_microbatches_pool_by_what_each_mask_shows(channels):
    batch = images(0)
    shares = np.linspace(0, 1, 32).reshape(-1, 1, 1, 1)
    mask = np.random.default_rng(0).random((32, 3, 2, channels)) < shares
    batch["x"] = {"image": batch["x"], "mask": mask}
    assert_microbatches_pool(Parallel(CONVENTIONS), [batch])


@pytest.mark.parametrize(
    ("body", "layer"),
    [
        (Rematerialized, "flax"),
        (Scanned, "torch"),
        (Scanned, "cumulative"),
        (InALoop, "torch"),
        (InALoop, "cumulative"),
        (Twice, "torch"),
        (Twice, "flax"),
        (Twice, "cumulative"),
        (ByKeyword, "flax"),
    ],
)
def test_microbatches_pool_however_the_layer_is_called(body, layer):
    assert_microbatches_pool(body({layer: LAYERS[layer]}), [images(0)])


def test_a_call_that_depends_on_the_data_is_an_error():
    class Conditional(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = bnjax.BatchNorm2d(name="norm")
            if self.is_initializing():
                return layer(x)
            return nn.cond(x.mean() > 0, lambda layer, x: layer(x), lambda layer, x: x, layer, x)

    state = start(Net(Conditional(), stem=False), images(0)["x"])
    message = (
        "How often `body/norm` is called depends on the data, so there are no exact statistics "
        "over micro-batches. Train with microbatches=1."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        trained(state, [images(0)], microbatches=4)


def test_microbatches_are_as_exact_as_the_whole_batch_at_any_mean():
    far = [batch | {"x": batch["x"] + 1e5} for batch in (images(0), images(1))]
    assert_microbatches_pool(Parallel({"torch": LAYERS["torch"]}), far)


def test_microbatches_leave_frozen_layers_as_they_were_bit_by_bit():
    state = start(Net(Frozen()), images(0)["x"])
    found = trained(state, [images(0)], microbatches=4).batch_stats["body"]
    before = state.batch_stats["body"]
    for name in ("frozen", "frozen_by_flax"):
        assert_close(found[name], before[name])
    assert np.abs(found["trained"]["mean"] - before["trained"]["mean"]).min() > 0


def test_microbatches_average_the_gradients_of_parts_that_normalize_by_themselves():
    batch, model = images(0), Net(TRAINED)
    state = start(model, batch["x"], rate=1.0)

    @jax.jit
    def gradient(x, y):
        def objective(params):
            variables = {"params": params, "batch_stats": state.batch_stats}
            outputs, _ = model.apply(variables, x, mutable=["batch_stats"])
            return jnp.mean((outputs - y) ** 2)

        return jax.grad(objective)(state.params)

    parts = [gradient(batch["x"][i::4], batch["y"][i::4]) for i in range(4)]
    wanted = jax.tree.map(lambda p, *grads: p - sum(grads) / 4, state.params, *parts)
    found = trained(state, [batch], microbatches=4)
    assert_close(found.params, wanted, rtol=1e-5)
    whole: Any = trained(state, [batch]).params
    assert np.abs(wanted["Conv_0"]["kernel"] - whole["Conv_0"]["kernel"]).max() > 1e-3


def test_microbatches_change_nothing_where_no_layer_trains_its_statistics():
    state = start(Net(Parallel({"frozen": FROZEN})), images(0)["x"])
    parts = trained(state, [images(0), images(1)], microbatches=4)
    whole = trained(state, [images(0), images(1)])
    assert_close((parts.params, parts.batch_stats), (whole.params, whole.batch_stats), rtol=1e-5)


def a_mesh(axis_type: AxisType, **axes: int) -> Any:
    axes = axes or {"data": 8}
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(axis_type,) * len(axes))


@pytest.mark.parametrize(
    ("mesh", "microbatches"),
    [
        (a_mesh(AxisType.Auto), 1),
        (a_mesh(AxisType.Explicit), 1),
        (a_mesh(AxisType.Auto, rows=4, columns=2), 4),
    ],
    ids=["auto", "explicit", "two_axes_and_microbatches"],
)
def test_data_parallel_training_equals_that_on_one_device(mesh, microbatches):
    state, batches = start(Net(TRAINED), images(0)["x"]), [images(0), images(1), images(2)]
    spread = trained(state, batches, mesh=mesh, microbatches=microbatches)
    alone = trained(state, batches, microbatches=microbatches)
    found, wanted = ((s.params, s.batch_stats, s.step) for s in (spread, alone))
    assert_close(found, wanted, rtol=1e-5)


@pytest.mark.parametrize(
    "context", [contextlib.nullcontext, jax.set_mesh], ids=["as_it_is", "set_mesh"]
)
def test_a_state_that_lives_on_an_explicit_mesh_trains_on_it(context):
    mesh, state = a_mesh(AxisType.Explicit), start(Net(TRAINED), images(0)["x"])
    on_mesh = jax.device_put(state, NamedSharding(mesh, P()))
    with context(mesh):
        spread = trained(on_mesh, [images(0)], mesh=mesh)
    assert_close(spread.batch_stats, trained(state, [images(0)]).batch_stats, rtol=1e-5)


def test_data_parallel_training_gives_its_state_to_all_devices_and_takes_the_old_one_away():
    mesh, batch = a_mesh(AxisType.Auto), images(0)
    step = train_step(squared_error, mesh=mesh)
    first, _ = step(start(Net(TRAINED), batch["x"]), batch)
    second, _ = step(first, batch)
    for leaf in jax.tree.leaves(second):
        assert leaf.sharding.device_set == set(mesh.devices.flat)
        assert leaf.is_fully_replicated
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(first.params))


def first_of(batch: dict[str, Any], size: int) -> dict[str, Any]:
    return jax.tree.map(lambda leaf: leaf[:size], batch)


def test_data_parallel_evaluation_counts_each_example_of_a_ragged_batch_once():
    def metrics(outputs, batch):
        error = squared_error(outputs, batch)
        return error, {"distance": jnp.sqrt(error)}

    state = start(Net(TRAINED), images(0)["x"])
    hidden = first_of(images(2), 11) | {"mask": np.arange(11) % 3 > 0}
    batches = [images(0), first_of(images(1), 13), hidden, first_of(images(3), 1)]
    found = evaluate(eval_step(metrics, mesh=a_mesh(AxisType.Explicit)), state, batches)
    assert_close(found, evaluate(eval_step(metrics), state, batches), rtol=1e-5)


def test_data_parallel_evaluation_of_a_mean_counts_each_example_once():
    def mean(outputs, batch):
        return jnp.mean(squared_error(outputs, batch))

    state, batch = start(Net(TRAINED), images(0)["x"]), first_of(images(0), 5)
    found = evaluate(eval_step(mean, mesh=a_mesh(AxisType.Auto)), state, [batch])
    assert_close(found, evaluate(eval_step(mean), state, [batch]), rtol=1e-5)


@pytest.mark.parametrize(("size", "padded"), [(1, 4), (4, 4), (5, 8), (8, 8)])
def test_a_padded_batch_repeats_its_last_example_out_of_sight(size, padded):
    batch = {"x": {"image": np.arange(size) + 1.0, "label": np.arange(size)}}
    found = pad_batch(batch, 4)
    index = np.minimum(np.arange(padded), size - 1)
    wanted = {"image": index + 1.0, "label": index}
    assert_close(found, {"x": wanted, "mask": np.arange(padded) < size})
    assert found["mask"].dtype == bool
    assert set(batch) == {"x"}


def test_a_padded_batch_keeps_its_mask():
    batch = {"x": np.arange(3.0), "mask": np.array([True, False, True])}
    assert pad_batch(batch, 2)["mask"].tolist() == [True, False, True, False]
    assert batch["mask"].tolist() == [True, False, True]


def test_statistics_of_devices_that_never_talked_merge_to_those_of_all_values():
    rng = np.random.default_rng(0)
    x = rng.normal(rng.normal(size=(8, 1, 3)) * 5, 2, (8, 50, 3)).astype(np.float32)

    def alone(x):
        _, stats = bnjax.batch_norm(
            {}, bnjax.init(3)[1], x, mutable=True, momentum=1.0, correction=0
        )
        return stats

    merged = bnjax.merge_batch_stats({"block": {"bn": jax.pmap(alone)(x)}})
    values = x.reshape(-1, 3).astype(np.float64)
    wanted = {"mean": values.mean(0), "var": values.var(0)}
    assert_close(merged, {"block": {"bn": wanted}}, rtol=1e-5)


def test_merging_takes_any_axis_and_keeps_the_count():
    rng = np.random.default_rng(0)
    mean, var = rng.normal(size=(3, 4)), rng.uniform(1, 2, (3, 4))
    stats = {"mean": mean, "var": var, "count": np.full((1, 4), 7)}
    merged = bnjax.merge_batch_stats({"bn": stats}, axis=1)["bn"]
    wanted = {"mean": mean.mean(1), "var": var.mean(1) + mean.var(1), "count": np.array([7])}
    assert_close(merged, wanted, rtol=1e-6)


@pytest.mark.parametrize(
    ("size", "microbatches", "mesh", "devices"),
    [(30, 4, False, 1), (30, 1, True, 8), (40, 2, True, 8)],
)
def test_a_batch_that_does_not_divide_is_an_error(size, microbatches, mesh, devices):
    options = {"mesh": a_mesh(AxisType.Auto)} if mesh else {}
    step = train_step(squared_error, microbatches=microbatches, **options)
    message = (
        f"A training batch must divide by the {devices} devices of the mesh (of this process) "
        f"times {microbatches} micro-batches, got {size} examples. Drop the last partial batch."
    )
    state = start(Net(TRAINED), images(0)["x"])
    with pytest.raises(ValueError, match=rf"^{re.escape(message)}(\n|$)"):
        step(state, images(0, size))
