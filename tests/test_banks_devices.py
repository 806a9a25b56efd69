"""Banks over 8 devices, by every way of JAX: the results of one device, in as many messages."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import bnjax
from tests.support import banks
from tests.support.banks import by_numpy
from tests.support.hlo import collectives
from tests.support.oracle import assert_close
from tests.support.ways import (
    AXIS,
    DEVICES,
    JIT_WAYS,
    ONE_AXIS_WAYS,
    SHARES,
    WAYS,
    Case,
    Data,
    Way,
    differentiated,
    each_of,
    forward,
    spread,
)

pytestmark = pytest.mark.quick_compile

SPATIAL = Case("NLC", (32, 6, 5), -1, bnjax.BatchNorm1d)
VECTORS = Case("NC", (64, 5), -1, bnjax.BatchNorm1d)
each_case = pytest.mark.parametrize("case", [SPATIAL, VECTORS], ids=lambda case: case.name)


def make(case: Case, number: int = 4, masked: bool = True, affine: Any = "own") -> banks.Data:
    """Data of which devices see different banks: the first device none, the last one all."""
    rng = np.random.default_rng(0)
    bank = rng.integers(0, number, case.shape[0]).astype(np.int32)
    bank[: len(bank) // 2] //= 2
    bank[bank == 1] = 0  # absent
    data = banks.make(case, affine, bank, number, far=3.0)
    if not masked:
        return data
    shape = [1 if a == case.axis % data.x.ndim else n for a, n in enumerate(data.x.shape)]
    shares = np.repeat(SHARES, len(bank) // DEVICES).reshape(-1, *[1] * (data.x.ndim - 1))
    return data._replace(mask=rng.random(shape) < shares)


def parts(data: banks.Data) -> Data:
    """The data as `ways` takes them: mask and bank go together, since both are split."""
    return Data(data.params, data.batch_stats, data.x, (data.mask, data.bank), data.cotangent)


def apply(way: Way, axis: int = -1, **told: Any) -> Any:
    def run(params, batch_stats, x, split):
        mask, bank = split
        told_all = {"mutable": True, "axis_name": way.axis_name, "axis": axis} | told
        return bnjax.batch_norm(params, batch_stats, x, mask=mask, bank=bank, **told_all)

    return run


@each_of(WAYS)
@each_case
@pytest.mark.parametrize("masked", [True, False], ids=["masked", "all"])
def test_banks_are_those_of_all_devices_together(way, case, masked):
    data = make(case, masked=masked)
    found = spread(way, way.compile(differentiated(apply(way))), parts(data))
    assert_close(found, by_numpy(data), rtol=1e-5)


@each_of(ONE_AXIS_WAYS)
@pytest.mark.parametrize("affine", [True, "both"], ids=str)
def test_scale_and_bias_may_be_shared_or_both(way, affine):
    data = make(SPATIAL, affine=affine)
    found = spread(way, way.compile(differentiated(apply(way))), parts(data))
    assert_close(found, by_numpy(data), rtol=1e-5)


@each_of(ONE_AXIS_WAYS + JIT_WAYS)
def test_many_banks_far_from_zero(way):
    case = SPATIAL._replace(shape=(96, 6, 5))
    bank = np.random.default_rng(0).permutation(96).astype(np.int32) % 24
    data = banks.make(case, True, bank, 24, far=1e4)
    found = spread(way, way.compile(differentiated(apply(way))), parts(data))
    assert_close(found, by_numpy(data), rtol=1e-5)


@each_of(ONE_AXIS_WAYS[2:])
def test_groups_of_devices_pool_their_banks_separately(way):
    data = make(SPATIAL, masked=False)
    groups = [list(range(4)), list(range(4, 8))]
    step = differentiated(apply(way, axis_index_groups=groups))
    found = jax.device_get(way.compile(step, alike=False)(*way.place(parts(data))))
    for half, rows in enumerate((slice(0, 16), slice(16, 32))):
        alone = data._replace(x=data.x[rows], bank=data.bank[rows], cotangent=data.cotangent[rows])
        wanted = by_numpy(alone)
        assert_close(found.y.reshape(data.x.shape)[rows], wanted.y, rtol=1e-5)
        moved = jax.tree.map(lambda s, half=half: s[4 * half], found.batch_stats)
        assert_close(moved, wanted.batch_stats, rtol=1e-5)


@each_of(tuple(way for way in WAYS if way.name not in ("vmap",)))
@each_case
def test_devices_send_no_more_messages_for_more_banks(way, case):
    """Under plain jit, XLA joins some of them: at most five or four are left."""

    def sent(number: int, step: Any) -> list[str]:
        data = parts(make(case, number))
        found = collectives(way.compile(step), way.place(data))
        return [kind for kind, _ in found]

    for step in (forward(apply(way)), differentiated(apply(way))):
        few, more, many = (sent(number, step) for number in (2, 8, 16))
        assert max(map(len, (few, more, many))) <= 5
        if way.axis_name is not None:
            assert few == more == many
            assert len(few) <= 2


@each_of(JIT_WAYS)
def test_no_device_gets_the_examples_of_others(way):
    data = make(SPATIAL._replace(shape=(64, 6, 40)), 4)
    step = way.compile(differentiated(apply(way)))
    numbers = [n for _, n in collectives(step, way.place(parts(data)))]
    assert max(numbers) <= 4 * 4 * 40, "sums of banks alone"


def test_evaluation_sends_no_messages():
    mesh = jax.make_mesh((DEVICES,), (AXIS,))
    data = make(SPATIAL, masked=False)
    step = jax.jit(
        lambda params, stats, x, bank: bnjax.batch_norm(params, stats, x, bank=bank, mutable=False)[
            0
        ],
        out_shardings=NamedSharding(mesh, P(AXIS)),
    )
    alike, split = (NamedSharding(mesh, spec) for spec in (P(), P(AXIS)))
    arrays = (
        *jax.device_put((data.params, data.batch_stats), alike),
        *jax.device_put((data.x, data.bank), split),
    )
    assert collectives(step, arrays) == []
    assert_close(step(*arrays), by_numpy(data, mutable=False).y, rtol=1e-5)


@each_of(ONE_AXIS_WAYS)
def test_one_bank_for_all_examples_is_pooled_as_without_banks(way):
    data = make(SPATIAL)
    told = {"mutable": True, "axis_name": way.axis_name}

    def run(number: Any, params, batch_stats, x, split):
        return bnjax.batch_norm(params, batch_stats, x, mask=split[0], bank=number, **told)

    wanted = by_numpy(data._replace(bank=np.full(32, 3)))
    for number in (3, jnp.int32(3)):
        step = differentiated(functools.partial(run, number))
        assert_close(spread(way, way.compile(step), parts(data)), wanted, rtol=1e-5)
