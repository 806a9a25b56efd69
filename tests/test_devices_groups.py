"""Groups that normalize by themselves: some of the devices, or examples of a virtual batch."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import export
from jax.sharding import PartitionSpec as P

import bnjax
from tests.support import oracle
from tests.support.cases import Case, Outcome
from tests.support.oracle import assert_close
from tests.support.ways import (
    AXIS,
    CORE,
    DEVICES,
    JIT_WAYS,
    LAYERS,
    NAMED_WAYS,
    ONE_AXIS_WAYS,
    TWO_AXES_WAYS,
    Data,
    core,
    differentiated,
    each_layer,
    each_of,
    expected,
    make,
    of_layer,
    placed,
    spread,
)

pytestmark = pytest.mark.quick_compile

FOURS = [[0, 3, 5, 6], [1, 2, 4, 7]]
SOME_OF_ALL = tuple(np.linspace(0.3, 1, DEVICES))
MIXED = (1.0, 0.0, 0.5, 0.2, 1.0, 0.7, 0.1, 0.9)


def rows_of(devices: Any) -> np.ndarray:
    """The rows of the batch that these devices hold."""
    return np.concatenate([np.arange(32).reshape(DEVICES, -1)[device] for device in devices])


def alone(data: Data, rows: np.ndarray, case: Case = CORE, **arguments: Any) -> Outcome:
    """What these rows give without the others."""
    mask = None if data.mask is None else data.mask[rows]
    part = data._replace(x=data.x[rows], mask=mask, cotangent=data.cotangent[rows])
    return expected(part, case, **arguments)


def assert_groups_are_alone(found: Outcome, data: Data, groups: Any) -> None:
    """Each device has what its group gives without the others."""
    wanted = [alone(data, rows_of(group)) for group in groups]
    for group, one in zip(groups, wanted, strict=True):
        rows = rows_of(group)
        assert_close((found.y[rows], found.dx[rows]), (one.y, one.dx), rtol=1e-5)
        for device in group:
            here = jax.tree.map(lambda s, device=device: s[device], found.batch_stats)
            assert_close(here, one.batch_stats, rtol=1e-5)
    total = jax.tree.map(lambda *parts: sum(parts), *(one.dparams for one in wanted))
    assert_close(found.dparams, total, rtol=1e-5)


@each_of(NAMED_WAYS)
@settings(max_examples=2)
@given(order=st.permutations(range(DEVICES)), size=st.sampled_from([1, 2, 4, 8]))
def test_each_group_of_devices_gives_what_it_gives_alone(way, order, size):
    groups = np.reshape(order, (-1, size)).tolist()
    data = make(rates=SOME_OF_ALL)
    apply = core(way.axis_name, axis_index_groups=groups)
    found = spread(way, way.compile(differentiated(apply), alike=False), data)
    assert_groups_are_alone(found, data, groups)


@each_of(ONE_AXIS_WAYS[1:3])
def test_an_empty_device_harms_nobody_in_its_group(way):
    data = make(rates=MIXED)
    assert not data.mask[rows_of([1])].any()
    apply = core(way.axis_name, axis_index_groups=FOURS)
    found = spread(way, way.compile(differentiated(apply), alike=False), data)
    assert_groups_are_alone(found, data, FOURS)


@pytest.mark.parametrize("layer", [bnjax.BatchNorm1d, LAYERS[-1].layer], ids=["torch", "drop_in"])
def test_a_layer_takes_groups_and_several_names(layer):
    way, data = TWO_AXES_WAYS[0], make(rates=SOME_OF_ALL)
    apply = of_layer(layer(axis_name=way.axis_name, axis_index_groups=FOURS))
    found = spread(way, way.compile(differentiated(apply), alike=False), data)
    for group in FOURS:
        assert_close(found.y[rows_of(group)], alone(data, rows_of(group)).y, rtol=1e-5)


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("axis_name", ["rows", "columns"])
def test_one_of_two_axes_pools_along_it_alone(check_vma, axis_name):
    mesh = jax.make_mesh((4, 2), ("rows", "columns"))
    split = P(mesh.axis_names)
    other = P("columns" if axis_name == "rows" else "rows")

    def local(*arguments):
        found = differentiated(core(axis_name))(*arguments)
        stats = jax.tree.map(lambda s: s[None], found.batch_stats)
        return found.y, found.dx, stats

    mapped = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(P(), P(), split, split, split),
        out_specs=(split, split, other),
        check_vma=check_vma,
    )
    data = make(rates=SOME_OF_ALL)
    y, dx, stats = jax.device_get(jax.jit(mapped)(*placed(mesh, data)))
    devices = np.arange(DEVICES).reshape(4, 2)
    for i, group in enumerate(devices.T if axis_name == "rows" else devices):
        one, rows = alone(data, rows_of(group)), rows_of(group)
        assert_close((y[rows], dx[rows]), (one.y, one.dx), rtol=1e-5)
        assert_close(jax.tree.map(lambda s, i=i: s[i], stats), one.batch_stats, rtol=1e-5)


def test_several_names_may_be_those_of_nested_vmaps():
    # jax.lax.all_gather itself refuses several vmapped names with a bare AssertionError.
    data = make(rates=None)

    def normalize(x):
        return core(("outer", "inner"))(data.params, data.batch_stats, x, None)

    inner = jax.vmap(normalize, axis_name="inner", out_axes=(0, None))
    outer = jax.vmap(inner, axis_name="outer", out_axes=(0, None))
    y, stats = jax.jit(outer)(data.x.reshape(4, 2, 4, 6, 5))
    wanted = expected(data)
    assert_close((y.reshape(data.x.shape), stats), (wanted.y, wanted.batch_stats), rtol=1e-5)


def virtual(data: Data, size: int, case: Case = CORE, **settings: Any) -> Outcome:
    """What virtual batches of this size give: each alone, running statistics by their counts."""
    rows = np.arange(len(data.x))
    parts = [rows[i : i + size] for i in rows[::size]]
    one = [alone(data, rows, case, momentum=1.0, **settings) for rows in parts]
    seen = np.broadcast_to(True if data.mask is None else data.mask, data.x.shape)
    counts = [seen[rows].sum() / case.channels for rows in parts]
    average = {
        key: np.average([o.batch_stats[key] for o in one], axis=0, weights=counts)
        for key in ("mean", "var")
    }
    return Outcome(
        np.concatenate([o.y for o in one]),
        oracle.move(data.batch_stats, average["mean"], average["var"], 0.1),
        np.concatenate([o.dx for o in one]),
        jax.tree.map(lambda *parts: sum(parts), *(o.dparams for o in one)),
    )


def whole(data: Data, **settings: Any) -> Outcome:
    """The outcome of the whole batch on one device."""
    return jax.jit(differentiated(core(None, **settings)))(*data)


CHANNELS_FIRST = Case("NCL", (32, 5, 6), 1, bnjax.BatchNorm1d)


@pytest.mark.parametrize("case", [CORE, CHANNELS_FIRST], ids=["NLC", "NCL"])
@pytest.mark.parametrize("rates", [None, SOME_OF_ALL], ids=["whole", "masked"])
@pytest.mark.parametrize("size", [5, 100])
def test_each_virtual_batch_gives_what_it_gives_alone(case, rates, size):
    data = make(case, rates)
    found = whole(data, virtual_batch_size=size, axis=case.axis)
    assert_close(found, virtual(data, size, case), rtol=1e-5)


@each_of(ONE_AXIS_WAYS + JIT_WAYS)
def test_virtual_batches_are_the_same_on_all_devices(way):
    data = make(rates=SOME_OF_ALL)
    apply = core(way.axis_name, virtual_batch_size=2)
    found = spread(way, way.compile(differentiated(apply)), data)
    assert_close(found, virtual(data, 2), rtol=1e-5)


def test_an_empty_virtual_batch_moves_nothing_and_harms_nobody():
    data, rest = make(rates=MIXED), np.delete(np.arange(32), rows_of([1]))
    assert not data.mask[rows_of([1])].any()
    found = whole(data, virtual_batch_size=4)
    others = Data(*data[:2], *(part[rest] for part in data[2:]))
    wanted = virtual(others, 4)
    assert_close((found.y[rest], found.dx[rest]), (wanted.y, wanted.dx), rtol=1e-5)
    assert_close(found.batch_stats, wanted.batch_stats, rtol=1e-5)


@each_layer
def test_a_layer_takes_virtual_batches_in_training_alone(case):
    data = make(case, SOME_OF_ALL)
    layer, plain = (case.layer(axis=case.axis, virtual_batch_size=size) for size in (5, None))
    found = jax.jit(differentiated(of_layer(layer)))(*data)
    correction = 0 if isinstance(layer, bnjax.linen.BatchNorm) else 1
    assert_close(found, virtual(data, 5, case, correction=correction), rtol=1e-5)
    variables = {"params": data.params, "batch_stats": data.batch_stats}
    evaluated = [
        on.clone(use_running_average=True).apply(variables, data.x) for on in (layer, plain)
    ]
    assert_close(*evaluated)


def test_an_evaluation_does_not_know_virtual_batches():
    data = make(rates=None)
    assert_close(whole(data, virtual_batch_size=5, mutable=False), whole(data, mutable=False))


def mapped(**settings: Any) -> Any:
    """A call of the core on 8 devices."""
    data = make(rates=None)

    def apply(x):
        return core(**settings)(data.params, data.batch_stats, x, None)

    return jax.vmap(apply, axis_name=AXIS)(data.x.reshape(DEVICES, 4, 6, 5))


def refused(message: str) -> Any:
    # JAX adds a note of its own to what is raised while it traces.
    return pytest.raises(ValueError, match=rf"^{message}(\n|$)")


@pytest.mark.parametrize("axis_name", ["batch", (AXIS, "batch")])
def test_an_axis_that_is_not_mapped_is_an_error(axis_name):
    start = f"`axis_name` is {axis_name!r}, but no such axis is mapped here "
    end = (
        ". Name the axis of the pmap, shard_map or vmap around this call, or pass None under plain "
        "jit."
    )
    with refused(rf"{re.escape(start)}\(.*batch.*\){re.escape(end)}"):
        mapped(axis_name=axis_name)


@pytest.mark.parametrize(
    "groups",
    [
        [[0, 1], [2, 3]],
        [[0, 1, 2], [3, 4, 5, 6, 7]],
        [[0, 1, 2, 3], [4, 5, 6, 6]],
        [[1, 2, 3, 4], [5, 6, 7, 8]],
        [],
    ],
    ids=["not_all", "unequal", "twice", "from_one", "none"],
)
def test_groups_that_do_not_divide_the_axis_are_an_error(groups):
    message = (
        "`axis_index_groups` must hold each index of the axis 'devices' once, 0 to 7, in groups "
        f"of equal size, got {groups}."
    )
    with refused(re.escape(message)):
        mapped(axis_name=AXIS, axis_index_groups=groups)


def test_groups_without_an_axis_are_an_error():
    message = "`axis_index_groups` divides the axis `axis_name`, but that is None. Name the axis."
    with refused(re.escape(message)):
        mapped(axis_name=None, axis_index_groups=FOURS)


@pytest.mark.parametrize("size", [0, -4])
def test_a_virtual_batch_without_examples_is_an_error(size):
    message = (
        f"`virtual_batch_size` must be an integer and at least 1, got {size}. None takes the whole "
        "batch."
    )
    with refused(re.escape(message)):
        mapped(axis_name=None, virtual_batch_size=size)


def test_two_divisions_of_the_batch_are_an_error():
    message = (
        "`virtual_batch_size` and `axis_index_groups` both divide the batch. Give one of them."
    )
    with refused(re.escape(message)):
        mapped(axis_name=AXIS, axis_index_groups=FOURS, virtual_batch_size=2)


def test_a_last_virtual_batch_of_a_single_value_is_an_error():
    message = (
        "Expected more than 1 value per channel when training, got input shape (9, 5), the last "
        "virtual batch of which has 1. Use a larger batch, drop the last partial batch, or "
        "normalize with the running statistics (mutable=False, or .eval() in nnx)."
    )
    with refused(re.escape(message)):
        core(None, virtual_batch_size=4)(*bnjax.init(5), jnp.ones((9, 5)), None)


def test_virtual_batches_without_a_batch_axis_are_an_error():
    message = (
        "`virtual_batch_size` divides a batch axis, but all axes of the input of shape (5,) are "
        "feature axes. Name the channel axis alone in `axis`."
    )
    with refused(re.escape(message)):
        core(None, virtual_batch_size=4)(*bnjax.init(5), jnp.ones(5), None)


def test_virtual_batches_of_an_empty_batch_move_nothing():
    params, batch_stats = bnjax.init(5)
    y, moved = core(None, virtual_batch_size=4)(params, batch_stats, jnp.ones((0, 2, 5)), None)
    assert y.shape == (0, 2, 5)
    assert_close(moved, batch_stats, rtol=0)


def test_virtual_batches_of_any_number_can_be_exported():
    params, batch_stats, x, *_ = make(rates=None)
    step = jax.jit(lambda x: core(None, virtual_batch_size=4)(params, batch_stats, x, None))
    shape = (*export.symbolic_shape("4*b"), *x.shape[1:])
    exported = export.export(step)(jax.ShapeDtypeStruct(shape, x.dtype))
    for rows in (4, 12):
        assert_close(exported.call(x[:rows]), step(x[:rows]), rtol=1e-6)
