"""On 8 devices, in every way that JAX has, batch norm gives what one device gives.

`WAYS` is the table of ways that all tests of several devices share.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import bnjax
from bnjax.core.devices import AxisName
from tests import oracle
from tests.cases import Case, Outcome, outcome
from tests.oracle import assert_close

DEVICES = 8
AXIS = "devices"
SHARES = tuple(np.linspace(0, 1, DEVICES))


class Data(NamedTuple):
    """What one step takes: the same parameters and statistics everywhere, and parts of a batch."""

    params: Any
    batch_stats: Any
    x: Any
    mask: Any
    cotangent: Any


Step = Callable[..., Outcome]
Apply = Callable[[Any, Any, Any, Any], tuple[jax.Array, Any]]


class Way(NamedTuple):
    """A way to take one step on many devices.

    Attributes:
        name: for the names of the tests.
        axis_name: what batch norm needs to be told.
        compile: `compile(step, alike)` gives a function of placed data. The new statistics of the
            devices are alike, or come back stacked.
        place: lays data out for that function.
    """

    name: str
    axis_name: AxisName | None
    compile: Callable[..., Any]
    place: Callable[[Data], tuple]


def summed(step: Step, names: AxisName) -> Step:
    def local(*arguments: Any) -> Outcome:
        found = step(*arguments)
        return found._replace(dparams=jax.lax.psum(found.dparams, names))

    return local


def by_mapping(transform: Callable, step: Step, alike: bool = True) -> Any:
    return transform(
        summed(step, AXIS),
        axis_name=AXIS,
        in_axes=(None, None, 0, 0, 0),
        out_axes=Outcome(0, None if alike else 0, 0, None),
    )


def by_shard_map(check_vma: bool, mesh: Any, step: Step, alike: bool = True) -> Any:
    def local(*arguments: Any) -> Outcome:
        # With check_vma, JAX itself sums the gradients of what all devices share.
        found = (step if check_vma else summed(step, mesh.axis_names))(*arguments)
        if alike:
            return found
        return found._replace(batch_stats=jax.tree.map(lambda s: s[None], found.batch_stats))

    split = P(mesh.axis_names)
    return jax.jit(
        jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(P(), P(), split, split, split),
            out_specs=Outcome(split, P() if alike else split, split, P()),
            check_vma=check_vma,
        )
    )


def by_jit(step: Step, alike: bool = True) -> Any:
    assert alike, "under plain jit there are no named groups"
    return jax.jit(step)


def stacked(data: Data) -> tuple:
    parts = jax.tree.map(lambda a: a.reshape(DEVICES, -1, *a.shape[1:]), data[2:])
    return (*data[:2], *parts)


def placed(mesh: Any, data: Data) -> tuple:
    alike, split = NamedSharding(mesh, P()), NamedSharding(mesh, P(mesh.axis_names))
    return (*jax.device_put(data[:2], alike), *jax.device_put(data[2:], split))


def a_mapping(name: str, transform: Callable) -> Way:
    return Way(name, AXIS, functools.partial(by_mapping, transform), stacked)


def a_shard_map(name: str, check_vma: bool, axes: dict[str, int]) -> Way:
    mesh = jax.make_mesh(tuple(axes.values()), tuple(axes))
    names = AXIS if len(axes) == 1 else tuple(axes)
    compile = functools.partial(by_shard_map, check_vma, mesh)
    return Way(name, names, compile, functools.partial(placed, mesh))


def a_jit(name: str, axis_type: AxisType) -> Way:
    mesh = jax.make_mesh((DEVICES,), (AXIS,), axis_types=(axis_type,))
    return Way(name, None, by_jit, functools.partial(placed, mesh))


ONE_AXIS_WAYS = (
    a_mapping("pmap", jax.pmap),
    a_mapping("vmap", lambda *args, **kwargs: jax.jit(jax.vmap(*args, **kwargs))),
    a_shard_map("shard_map", True, {AXIS: DEVICES}),
    a_shard_map("shard_map_unchecked", False, {AXIS: DEVICES}),
)
TWO_AXES_WAYS = (
    a_shard_map("shard_map_of_two_axes", True, {"rows": 4, "columns": 2}),
    a_shard_map("shard_map_of_two_axes_unchecked", False, {"rows": 4, "columns": 2}),
)
JIT_WAYS = (a_jit("jit_auto", AxisType.Auto), a_jit("jit_explicit", AxisType.Explicit))
NAMED_WAYS = ONE_AXIS_WAYS + TWO_AXES_WAYS
WAYS = NAMED_WAYS + JIT_WAYS


def each_of(ways: tuple[Way, ...]) -> Any:
    return pytest.mark.parametrize("way", ways, ids=lambda way: way.name)


CORE = Case("core", (32, 6, 5), -1, bnjax.BatchNorm1d)
LAYERS = (
    Case("BatchNorm1d", (32, 6, 5), -1, bnjax.BatchNorm1d),
    Case("BatchNorm2d", (32, 5, 2, 3), 1, bnjax.BatchNorm2d),
    Case("BatchNorm3d", (32, 2, 1, 3, 5), -1, bnjax.BatchNorm3d),
    Case(
        "drop_in",
        (32, 2, 3, 5),
        -1,
        functools.partial(bnjax.linen.BatchNorm, use_running_average=False, momentum=0.9),
    ),
)

each_layer = pytest.mark.parametrize("case", LAYERS, ids=lambda case: case.name)


def make(case: Case = CORE, rates: Any = SHARES, seed: int = 0, mean: float = 0.5) -> Data:
    """Random data; each device sees about its share of the values, the first one none."""
    rng = np.random.default_rng(seed)
    params, stats = case.params(rng), case.batch_stats(rng)
    x, cotangent = case.values(rng, mean), case.values(rng)
    if rates is None:
        return Data(params, stats, x, None, cotangent)
    shape = [1 if a == case.axis % x.ndim else n for a, n in enumerate(x.shape)]
    shares = np.repeat(rates, len(x) // len(rates)).reshape(-1, *[1] * (x.ndim - 1))
    return Data(params, stats, x, rng.random(shape) < shares, cotangent)


def core(axis_name: AxisName | None, **settings: Any) -> Apply:
    settings = {"mutable": True, "axis_name": axis_name} | settings

    def apply(params, batch_stats, x, mask):
        return bnjax.batch_norm(params, batch_stats, x, mask=mask, **settings)

    return apply


def of_layer(layer: Any) -> Apply:
    def apply(params, batch_stats, x, mask):
        variables = {"params": params, "batch_stats": batch_stats}
        y, updates = layer.apply(variables, x, mask=mask, mutable=["batch_stats"])
        return y, updates["batch_stats"]

    return apply


def differentiated(apply: Apply) -> Step:
    """The step that gives outputs and gradients."""

    def step(params, batch_stats, x, mask, cotangent):
        return outcome(lambda params, x: apply(params, batch_stats, x, mask), params, x, cotangent)

    return step


def forward(apply: Apply) -> Step:
    """The step that gives outputs alone."""

    def step(params, batch_stats, x, mask, cotangent):
        return Outcome(*apply(params, batch_stats, x, mask), None, None)

    return step


def spread(way: Way, compiled: Any, data: Data) -> Outcome:
    """The outcome of a compiled step, with the parts of the batch put together."""
    found = jax.device_get(compiled(*way.place(data)))
    y, dx = (None if part is None else part.reshape(data.x.shape) for part in (found.y, found.dx))
    return found._replace(y=y, dx=dx)


@functools.cache
def core_step(way: Way) -> Any:
    return way.compile(differentiated(core(way.axis_name)))


@functools.cache
def on_one_device(make_apply: Callable[..., Apply]) -> Any:
    return jax.jit(differentiated(make_apply(None)))


def expected(data: Data, case: Case = CORE, **settings: Any) -> Outcome:
    """What one device gives, in float64."""
    settings = {"mutable": True, "axis": case.axis, "mask": data.mask} | settings
    return oracle.batch_norm(data.params, data.batch_stats, data.x, data.cotangent, **settings)


def test_there_are_eight_devices():
    assert jax.device_count() == DEVICES


@each_of(ONE_AXIS_WAYS + JIT_WAYS)
@each_layer
def test_a_layer_gives_what_one_device_gives_on_the_whole_batch(way, case):
    data = make(case)
    assert not data.mask[:4].any()
    layer = case.layer(axis=case.axis, axis_name=way.axis_name)
    found = spread(way, way.compile(differentiated(of_layer(layer))), data)
    correction = 0 if isinstance(layer, bnjax.linen.BatchNorm) else 1
    assert_close(found, expected(data, case, correction=correction), rtol=1e-5)


@each_of(WAYS)
@given(
    rates=st.lists(st.sampled_from([0.0, 0.02, 0.5, 1.0]), min_size=8, max_size=8),
    seed=st.integers(0, 1000),
)
def test_any_mask_gives_the_statistics_of_all_that_count(way, rates, seed):
    data = make(rates=rates, seed=seed)
    data.mask[seed % 32, :3] = True
    assert_close(spread(way, core_step(way), data), expected(data), rtol=1e-5)


@each_of(WAYS)
def test_a_mask_may_differ_by_channel(way):
    data = make()
    data = data._replace(mask=np.random.default_rng(1).random(data.x.shape) < data.mask.mean())
    assert_close(spread(way, core_step(way), data), expected(data), rtol=1e-5)


@each_of(WAYS)
def test_without_a_mask_all_counts(way):
    data = make(rates=None)
    assert_close(spread(way, core_step(way), data), expected(data), rtol=1e-5)


@each_of(WAYS)
def test_a_batch_in_which_nothing_counts_gives_what_one_device_gives(way):
    data = make(rates=[0] * DEVICES)
    assert_close(spread(way, core_step(way), data), on_one_device(core)(*data), rtol=1e-5)


@each_of(WAYS)
def test_nan_under_the_mask_reaches_nothing(way):
    data = make()
    data = data._replace(cotangent=np.where(data.mask, data.cotangent, np.float32(0)))
    wild = data._replace(x=np.where(data.mask, data.x, np.float32(np.nan)))
    found, wanted = spread(way, core_step(way), wild), expected(data)
    y, wanted_y = (np.where(data.mask, o.y, 0) for o in (found, wanted))
    assert_close(found._replace(y=y), wanted._replace(y=wanted_y), rtol=1e-5)


@each_of(WAYS)
def test_nan_on_one_device_leaves_the_statistics_of_its_channel_alone_everywhere(way):
    data = make(rates=None)
    data.x[17, 2, 3] = np.nan
    moved = expected(data).batch_stats
    kept = {k: np.where(np.arange(5) == 3, data.batch_stats[k], moved[k]) for k in moved}
    assert_close(spread(way, core_step(way), data).batch_stats, kept, rtol=1e-5)


@each_of(WAYS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("running", [1e5, 9e4, 0.0, np.inf])
def test_a_mean_of_1e5_costs_no_digits_wherever_the_running_mean_is(way, masked, running):
    data = make(rates=SHARES if masked else None, mean=1e5)
    stats = {"mean": np.full(5, running, np.float32), "var": np.ones(5, np.float32)}
    seen = True if data.mask is None else data.mask
    data = data._replace(batch_stats=stats, cotangent=np.where(seen, data.cotangent, 0))
    found, wanted = spread(way, core_step(way), data), expected(data)
    y, wanted_y = (np.where(seen, o.y, 0) for o in (found, wanted))
    assert_close(found._replace(y=y), wanted._replace(y=wanted_y), rtol=1e-5)


def tangents(axis_name: AxisName | None) -> Apply:
    """The derivative of outputs and statistics along a direction."""
    apply = core(axis_name)

    def along(params, batch_stats, x, mask):
        def of_both(params, x):
            return apply(params, batch_stats, x, mask)

        direction = (jax.tree.map(jnp.cos, params), jnp.cos(3 * x))
        return jax.jvp(of_both, (params, x), direction)[1]

    return along


def gradients(axis_name: AxisName | None) -> Apply:
    """The gradient of a function of the outputs."""
    step = differentiated(core(axis_name))

    def of_x(params, batch_stats, x, mask):
        found = step(params, batch_stats, x, mask, jnp.cos(3 * x))
        return found.dx, found.batch_stats

    return of_x


@each_of(ONE_AXIS_WAYS[1:])
@pytest.mark.parametrize("derivative", [tangents, gradients])
def test_derivatives_and_their_gradients_equal_those_of_one_device(way, derivative):
    compiled, data = way.compile(differentiated(derivative(way.axis_name))), make()
    assert_close(spread(way, compiled, data), on_one_device(derivative)(*data), rtol=1e-5)


@each_of(ONE_AXIS_WAYS[1:3])
def test_complex_values_have_complex_means_and_real_variances(way):
    data = make(rates=None)
    old = data.batch_stats | {"mean": data.batch_stats["mean"] + 1j}
    data = data._replace(x=data.x + 1j * data.cotangent, batch_stats=old)
    found = spread(way, way.compile(forward(core(way.axis_name))), data)
    mean, var = oracle.measure(data.x, (0, 1))
    x_hat = (data.x - mean) / np.sqrt(var + 1e-5)
    assert_close(found.y, x_hat * data.params["scale"] + data.params["bias"], rtol=1e-5)
    new = {"mean": mean, "var": var * 192 / 191}
    moved = {key: 0.9 * old[key] + 0.1 * new[key] for key in old}
    assert_close(found.batch_stats, moved, rtol=1e-5)


@each_layer
def test_a_layer_initializes_and_evaluates_without_its_axis(case):
    groups = [[0, 1, 2, 3], [4, 5, 6, 7]]
    layer = case.layer(axis=case.axis, axis_name=AXIS, axis_index_groups=groups)
    x = make(case).x
    variables = layer.init(jax.random.key(0), x)
    plain = case.layer(axis=case.axis)
    assert_close(variables, plain.init(jax.random.key(0), x))
    evaluated = [on.clone(use_running_average=True).apply(variables, x) for on in (layer, plain)]
    assert_close(*evaluated)
