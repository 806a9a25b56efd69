"""Statistics pooled over micro-batches."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import bnjax
from bnjax.core import checks
from bnjax.training import train_step
from tests.support.oracle import assert_close
from tests.support.regression import (
    TRAINED,
    Net,
    Norms,
    Parallel,
    images,
    squared_error,
    start,
    trained,
)

pytestmark = pytest.mark.quick_compile

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
    """A part of a stack, whose output does not depend on how it normalizes."""

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
    """Batch norms that a loop calls three times, on different values."""

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


def assert_microbatches_pool(body: nn.Module, batches: list[Any], microbatches: int = 4) -> None:
    """Assert that statistics match those of whole batches, at a learning rate of 0."""
    state = start(Net(body, stem=False), batches[0]["x"], rate=0.0)
    parts = trained(state, batches, microbatches=microbatches)
    assert_close(parts.batch_stats, trained(state, batches).batch_stats, rtol=1e-5)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), parts.batch_stats, state.batch_stats)
    assert min(jax.tree.leaves(moved)) > 0


def test_microbatches_give_the_statistics_of_the_whole_batch():
    assert_microbatches_pool(Parallel(LAYERS), [images(0), images(1)], microbatches=4)


def test_microbatches_may_hold_a_single_example():
    assert_microbatches_pool(TRAINED, [images(0)], microbatches=32)


def test_microbatches_give_the_statistics_of_the_whole_batch_in_1d():
    assert_microbatches_pool(OfVectors(), [images(0)])


@pytest.mark.parametrize("channels", [1, 4])
def test_microbatches_are_pooled_by_their_masked_counts(channels):
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
        "The number of calls of `body/norm` depends on the data, so its statistics over "
        "micro-batches can't be exact. Train with microbatches=1."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        trained(state, [images(0)], microbatches=4)


@pytest.mark.quick_compile(False)
def test_microbatches_are_as_exact_as_the_whole_batch_at_any_mean():
    far = [batch | {"x": batch["x"] + 1e5} for batch in (images(0), images(1))]
    assert_microbatches_pool(Parallel({"torch": LAYERS["torch"]}), far)


def test_microbatches_leave_frozen_layers_unchanged_bit_for_bit():
    state = start(Net(Frozen()), images(0)["x"])
    found = trained(state, [images(0)], microbatches=4).batch_stats["body"]
    before = state.batch_stats["body"]
    for name in ("frozen", "frozen_by_flax"):
        assert_close(found[name], before[name])
    assert np.abs(found["trained"]["mean"] - before["trained"]["mean"]).min() > 0


def test_microbatches_average_the_gradients_of_separately_normalized_parts():
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


@pytest.mark.parametrize("unroll", [False, True])
def test_a_loop_gives_the_same_as_its_parts_one_after_another(unroll):
    state = start(Net(TRAINED), images(0)["x"])
    found = trained(state, [images(0)], microbatches=4, unroll=unroll)
    expected = trained(state, [images(0)], microbatches=4)
    assert_close(
        (found.params, found.batch_stats), (expected.params, expected.batch_stats), rtol=1e-5
    )


def test_a_loop_over_micro_batches_takes_less_memory_than_the_whole_batch():
    state, batch = start(Net(TRAINED), images(0)["x"]), images(0, 1024)

    def temporary(**options: Any) -> int:
        step: Any = train_step(squared_error, donate=False, **options)
        return step._compiled.lower(state, batch).compile().memory_analysis().temp_size_in_bytes

    assert temporary(microbatches=8, unroll=False) < 0.7 * temporary()


def test_microbatches_change_nothing_if_no_layer_updates_its_statistics():
    state = start(Net(Parallel({"frozen": FROZEN})), images(0)["x"])
    checks.warn_once.cache_clear()
    with pytest.warns(UserWarning, match="updates no running statistics: the batch norm at 'body/"):
        parts = trained(state, [images(0), images(1)], microbatches=4)
    whole = trained(state, [images(0), images(1)])
    assert_close((parts.params, parts.batch_stats), (whole.params, whole.batch_stats), rtol=1e-5)
