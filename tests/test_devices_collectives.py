"""How often, and how much, devices talk: collectives counted in the optimised HLO.

The counts are exact, so that a test fails when one more appears. C is 5 in nearly all tests.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import bnjax
from bnjax.core.sums import sums
from tests.support.cases import Case, as_on_accelerators
from tests.support.compilers import quickly
from tests.support.hlo import Sent, collectives
from tests.support.oracle import assert_close
from tests.support.ways import (
    AXIS,
    CORE,
    DEVICES,
    JIT_WAYS,
    ONE_AXIS_WAYS,
    SHARES,
    TWO_AXES_WAYS,
    WAYS,
    Data,
    Way,
    a_shard_map,
    by_jit,
    core,
    differentiated,
    each_of,
    forward,
    make,
    of_layer,
    placed,
)

pytestmark = pytest.mark.quick_compile

CHANNELS = CORE.channels
GATHER = ("all-gather", 3 * (CHANNELS + 1))  # origin, offset and m2, each with the count
# Large enough that a CPU, too, sums one array alone as accelerators do.
ROWS = Case("rows", (1024, 6, CHANNELS), -1, bnjax.BatchNorm1d)
IMAGES = Case("images", (1024, 4, 4, CHANNELS), -1, bnjax.BatchNorm2d)
LAYERS = 3  # of the network

PMAP, VMAP, SHARD_MAP, UNCHECKED = ONE_AXIS_WAYS
TWO_AXES, _ = TWO_AXES_WAYS
AUTO, EXPLICIT = JIT_WAYS
TALKING_WAYS = tuple(way for way in WAYS if way is not VMAP)
EXPLICIT_MESH = jax.make_mesh((DEVICES,), (AXIS,), axis_types=(AxisType.Explicit,))


def sent(way: Way, step: Callable, data: Data, *, conditional: bool = False) -> Sent:
    return collectives(way.compile(step), way.place(data), conditional=conditional)


def to_x(apply: Callable) -> Callable:
    """The step with the gradient to x alone."""
    step = differentiated(apply)
    return lambda *arguments: step(*arguments)._replace(dparams={})


def test_collectives_are_found_and_measured():
    def talk(x):
        rows = jax.lax.all_gather(x, AXIS)
        both = jax.lax.psum((x * 2, rows.sum(0)[:3]), AXIS)
        return jax.lax.ppermute(both[0], AXIS, [(0, 1)]), both[1]

    mapped = jax.jit(
        jax.shard_map(talk, mesh=EXPLICIT_MESH, in_specs=P(), out_specs=P(), check_vma=False)
    )
    found = collectives(mapped, (jnp.ones((5, 2)),))
    assert found == [("all-gather", 10), ("all-reduce", 16), ("collective-permute", 10)]
    assert collectives(mapped, (jnp.ones((5, 2)),), conditional=True) == []


def test_collectives_on_a_condition_are_told_apart():
    def talk(x, y):
        def inner(y):
            return jax.lax.cond(y.sum() > 5, lambda y: jax.lax.psum(y, AXIS), lambda y: y * 2, y)

        return jax.lax.cond(jax.lax.psum(x, AXIS).sum() > 0, inner, lambda y: y, y)

    mapped = jax.jit(
        jax.shard_map(talk, mesh=EXPLICIT_MESH, in_specs=P(), out_specs=P(), check_vma=False)
    )
    arguments = jnp.ones(3), jnp.ones(7)
    assert collectives(mapped, arguments) == [("all-reduce", 3)]
    assert collectives(mapped, arguments, conditional=True) == [("all-reduce", 7)]


@pytest.mark.parametrize(
    ("way", "all_gradients"),
    [(PMAP, 20), (SHARD_MAP, 10), (UNCHECKED, 20), (TWO_AXES, 10)],
    ids=lambda value: getattr(value, "name", None),
)
def test_named_devices_gather_once_forward_and_sum_once_backward(way, all_gradients):
    data, apply = make(), core(way.axis_name)
    assert sent(way, forward(apply), data) == [GATHER]
    assert sent(way, to_x(apply), data) == [GATHER, ("all-reduce", 10)]
    # The gradients of scale and bias travel with it; or are it, where JAX knows what is alike.
    assert sent(way, differentiated(apply), data) == [GATHER, ("all-reduce", all_gradients)]


@each_of(JIT_WAYS)
@pytest.mark.parametrize("masked", [True, False])
def test_plain_jit_sums_once_forward_and_once_backward(way, masked):
    data, apply = make(rates=SHARES if masked else None), core(None)
    # Sums of x and its square, and the count.
    once = ("all-reduce", 2 * CHANNELS + masked)
    assert sent(way, forward(apply), data) == [once]
    for backward in (to_x(apply), differentiated(apply)):
        found = sent(way, backward, data)  # XLA sends sums of dy alone with either
        assert len(found) == 2
        assert sum(size for _, size in found) <= once[1] + (3 if masked else 2) * CHANNELS


@each_of(JIT_WAYS)
@pytest.mark.parametrize("masked", [True, False])
def test_plain_jit_sums_again_only_if_a_mean_is_far_from_the_running_one(way, masked):
    data, apply = make(rates=SHARES if masked else None), core(None)
    again = 2 * [("all-reduce", 2 * CHANNELS)]  # for the mean, and from there
    for step in (forward(apply), differentiated(apply)):
        assert sent(way, step, data, conditional=True) == again


@each_of(JIT_WAYS)
@pytest.mark.parametrize("case", [ROWS, IMAGES], ids=lambda case: case.name)
@pytest.mark.parametrize("masked", [True, False])
def test_plain_jit_on_accelerators_sums_once_too(way, case, masked):
    data, apply = make(case, SHARES if masked else None), core(None)
    with as_on_accelerators():
        assert sent(way, forward(apply), data) == [("all-reduce", 2 * CHANNELS + masked)]
        found = sent(way, to_x(apply), data)
        assert len(found) == 2
        assert sum(size for _, size in found) <= (2 + 3) * CHANNELS + masked
        mean, around = ("all-reduce", CHANNELS), ("all-reduce", 2 * CHANNELS)
        assert sent(way, forward(apply), data, conditional=True) == [mean, around]


@pytest.mark.parametrize("context", [contextlib.nullcontext, lambda: jax.set_mesh(EXPLICIT_MESH)])
@pytest.mark.parametrize("masked", [True, False])
def test_an_explicit_mesh_never_gathers_the_batch(context, masked):
    data = make(rates=SHARES if masked else None)
    with context():
        arguments = placed(EXPLICIT_MESH, data)
        found = collectives(by_jit(differentiated(core(None))), arguments)
    assert {kind for kind, _ in found} == {"all-reduce"}
    assert max(size for _, size in found) < 12 * CHANNELS


@each_of(TALKING_WAYS)
def test_evaluation_sends_no_messages(way):
    data, apply = make(), core(way.axis_name, mutable=False)
    assert sent(way, forward(apply), data) == []
    assert sent(way, to_x(apply), data) == []


def test_what_a_device_sends_does_not_grow_with_their_number():
    counts = []
    for devices in (2, 4, 8):
        way = a_shard_map("shard_map", True, {AXIS: devices})
        counts.append(sent(way, to_x(core(AXIS)), make()))
    assert counts == [[GATHER, ("all-reduce", 10)]] * 3


@each_of((PMAP, SHARD_MAP, UNCHECKED))
def test_named_devices_decide_nothing_together(way):
    for step in (forward(core(AXIS)), differentiated(core(AXIS))):
        assert sent(way, step, make(mean=1e5), conditional=True) == []


@each_of((PMAP, SHARD_MAP, UNCHECKED))
def test_groups_gather_once_forward_and_scatter_once_backward(way):
    apply = core(way.axis_name, axis_index_groups=[[0, 3, 5, 6], [1, 2, 4, 7]])
    arguments = way.place(make())
    assert collectives(way.compile(forward(apply), alike=False), arguments) == [GATHER]
    found = collectives(way.compile(to_x(apply), alike=False), arguments)
    assert found == [GATHER, ("reduce-scatter", DEVICES * 2 * CHANNELS)]


@each_of((SHARD_MAP, *JIT_WAYS))
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("size", [2, 4])
def test_virtual_batches_that_follow_the_shards_talk_about_running_statistics_alone(
    way, size, masked
):
    data = make(rates=SHARES if masked else None)
    apply = core(way.axis_name, virtual_batch_size=size)
    untracked = data._replace(batch_stats={})
    for conditional in (False, True):
        assert sent(way, forward(apply), untracked, conditional=conditional) == []
        assert sent(way, to_x(apply), untracked, conditional=conditional) == []
    assert sent(way, to_x(apply), data) == [("all-reduce", 3 * CHANNELS)]


@pytest.mark.quick_compile(False)
@each_of((SHARD_MAP, *JIT_WAYS))
@pytest.mark.parametrize("conditional", [False, True])
def test_a_compiler_in_a_hurry_sends_the_same(way, conditional):
    found = []
    for hurry in (True, False):
        with quickly(hurry):
            step = differentiated(core(way.axis_name))
            found.append(sent(way, step, make(), conditional=conditional))
    assert found[0] == found[1]


class Block(nn.Module):
    norm: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x, mask):
        x = nn.Conv(CHANNELS, (3, 3), use_bias=False)(x)
        return nn.relu(self.norm()(x, mask=mask))


class Net(nn.Module):
    norm: Callable[..., nn.Module]
    block: Any = Block

    @nn.compact
    def __call__(self, x, mask=None):
        for _ in range(LAYERS):
            x = self.block(self.norm)(x, mask)
        return x


def sent_in_training(way: Way, net: Net) -> Sent:
    """What a gradient to all parameters of a network sends."""
    x = np.random.default_rng(0).standard_normal((32, 2, 2, CHANNELS)).astype(np.float32)
    variables = jax.eval_shape(net.init, jax.random.key(0), x)
    variables = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), variables)
    data = Data(variables["params"], variables["batch_stats"], x, None, x[::-1])
    step = differentiated(of_layer(net))
    return sent(way, lambda *arguments: step(*arguments)._replace(dx=None), data)


@functools.cache
def sent_without_batch_norm(way: Way) -> int:
    """How many collectives the gradients of the parameters need anyway: the layers are affine."""
    frozen = functools.partial(bnjax.BatchNorm2d, use_running_average=True)
    found = sent_in_training(way, Net(frozen))
    assert {kind for kind, _ in found} == {"all-reduce"}
    return len(found)


@each_of((SHARD_MAP, *JIT_WAYS))
def test_a_network_talks_once_forward_and_once_backward_for_each_layer(way):
    norm = functools.partial(bnjax.BatchNorm2d, axis_name=way.axis_name)
    found = sent_in_training(way, Net(norm))
    assert len(found) - sent_without_batch_norm(way) == LAYERS + LAYERS
    assert found.count(GATHER) == (LAYERS if way.axis_name else 0)


@each_of((SHARD_MAP, *JIT_WAYS))
def test_a_rematerialised_network_repeats_what_it_said_forward_and_no_more(way):
    norm = functools.partial(bnjax.BatchNorm2d, axis_name=way.axis_name)
    found = sent_in_training(way, Net(norm, nn.remat(Block)))
    # XLA finds out that some are the same.
    assert len(found) - sent_without_batch_norm(way) <= 2 * LAYERS + LAYERS
    assert found.count(GATHER) <= 2 * LAYERS


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize(
    ("shape", "axis"), [((64, 20, 20, 8), 0), ((4096, 8), 0), ((8, 16, 80, 8), 1)], ids=str
)
def test_what_is_split_over_devices_is_summed_where_it_is(rng, shape, axis, kind):
    def pair(x):
        return sums((x, x * x), tuple(range(x.ndim - 1)))

    mesh = jax.make_mesh((8,), ("devices",), axis_types=(kind,))
    x = jnp.asarray(rng.standard_normal(shape), "float32")
    split = jax.device_put(x, NamedSharding(mesh, P(*[None] * axis, "devices")))
    assert collectives(jax.jit(pair), (split,)) == [("all-reduce", 16)]
    assert_close(jax.jit(pair)(split), pair(x), rtol=1e-5, atol=1e-3)
