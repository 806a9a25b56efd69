"""All ways to run a step on many devices."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import bnjax
from bnjax.core.devices import AxisName
from tests.support import oracle
from tests.support.cases import Case, Outcome, outcome

DEVICES = 8
AXIS = "devices"
SHARES = tuple(np.linspace(0, 1, DEVICES))


class Data(NamedTuple):
    """The arguments of a step: replicated parameters and statistics, and parts of a batch."""

    params: Any
    batch_stats: Any
    x: Any
    mask: Any
    cotangent: Any


Step = Callable[..., Outcome]
Apply = Callable[[Any, Any, Any, Any], tuple[jax.Array, Any]]


class Way(NamedTuple):
    """A way to run a step on many devices.

    Attributes:
        name: the name in test ids.
        axis_name: the `axis_name` that batch norm needs.
        compile: `compile(step, alike)` returns a function of placed data. The new statistics are
            the same on all devices, or are returned stacked.
        place: places data for that function.
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
        # With check_vma, JAX sums the gradients of replicated arguments itself.
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
    """A step that returns outputs and gradients."""

    def step(params, batch_stats, x, mask, cotangent):
        return outcome(lambda params, x: apply(params, batch_stats, x, mask), params, x, cotangent)

    return step


def forward(apply: Apply) -> Step:
    """A step that returns only outputs."""

    def step(params, batch_stats, x, mask, cotangent):
        return Outcome(*apply(params, batch_stats, x, mask), None, None)

    return step


def spread(way: Way, compiled: Any, data: Data) -> Outcome:
    """The outcome of a compiled step, with the parts of the batch concatenated."""
    found = jax.device_get(compiled(*way.place(data)))
    y, dx = (None if part is None else part.reshape(data.x.shape) for part in (found.y, found.dx))
    return found._replace(y=y, dx=dx)


def expected(data: Data, case: Case = CORE, **settings: Any) -> Outcome:
    """The outcome on one device, in float64."""
    settings = {"mutable": True, "axis": case.axis, "mask": data.mask} | settings
    return oracle.batch_norm(data.params, data.batch_stats, data.x, data.cotangent, **settings)
