"""One layer by itself, on one device and data parallel over several, as XLA compiles it."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import bnjax
from tests.benchmarks.cases import BACKWARD, DTYPES, EVAL, FORWARD, MASK, Case, Inputs
from tests.benchmarks.contenders import OURS, REFERENCE, Apply, Values, linen
from tests.benchmarks.programs import traffic
from tests.benchmarks.programs.topologies import Chip, compiled
from tests.benchmarks.steps import step
from tests.support import hlo

AXIS = "data"
WAYS = JIT, NAMED = "jit", "axis_name"
DEVICES = 8


def ours(axis_name: str | None = None) -> Apply:
    """bnjax's function, as a training calls it: running statistics are kept and move."""

    def apply(values: Values, x: jax.Array, mask: Any, train: bool, axis: int) -> Any:
        params = {"scale": values.scale, "bias": values.bias}
        stats = {"mean": values.mean, "var": values.var}
        settings = {"mask": mask, "axis": axis, "axis_name": axis_name}
        y, moved = bnjax.batch_norm(params, stats, x, mutable=train, **settings)
        return y, (moved["mean"], moved["var"])

    return apply


def flax(axis_name: str | None = None) -> Apply:
    """Flax's layer."""
    return linen(functools.partial(nn.BatchNorm, momentum=0.9, axis_name=axis_name))


CONTENDERS: dict[str, Callable[..., Apply]] = {REFERENCE: flax, OURS: ours}


def shapes(case: Case, alike: Any, split: Any) -> Inputs:
    """The arguments of a step: where what is the same everywhere lies, and what is split."""

    def array(shape: tuple[int, ...], dtype: Any, place: Any) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    vector = array((case.shape[case.axis],), jnp.float32, alike)
    x = array(case.shape, DTYPES[case.dtype], split)
    examples = (case.shape[0], *[1] * (len(case.shape) - 1))
    mask = array(examples, jnp.bool, split) if case.variant == MASK else None
    return Inputs(Values(vector, vector, vector, vector), x, x, mask, None)


def alone(case: Case, which: str, contender: str, chip: Chip) -> dict[str, Any]:
    """Kernels, readings and writings, memory on one device."""
    device = jax.sharding.SingleDeviceSharding(chip.devices()[0])
    run = step(CONTENDERS[contender](), case, which, waits=True)
    made = compiled(run, shapes(case, device, device), chip)
    unit = math.prod(case.shape) * jnp.dtype(case.dtype).itemsize
    return measured(made, unit)


def measured(made: Any, unit: int) -> dict[str, Any]:
    """What a compiled program moves, outside of branches and in them, and its temporary bytes."""
    found = traffic.kernels(hlo.parse(made.as_text()))
    return {
        **traffic.summary([kernel for kernel in found if not kernel.in_branch], unit),
        "in a branch": traffic.summary([kernel for kernel in found if kernel.in_branch], unit),
        "temp": made.memory_analysis().temp_size_in_bytes,
        "unit": unit,
    }


def mesh_of(chip: Chip, devices: int) -> Mesh:
    """All of them on one axis."""
    return Mesh(chip.devices(devices), (AXIS,), axis_types=(AxisType.Auto,))


def parallel(
    case: Case, which: str, contender: str, way: str, chip: Chip, devices: int = DEVICES
) -> list[hlo.Collective]:
    """What so many devices say to each other, each with its part of the batch."""
    mesh = mesh_of(chip, devices)
    alike, split = (NamedSharding(mesh, spec) for spec in (P(), P(AXIS)))
    run = step(CONTENDERS[contender](AXIS if way == NAMED else None), case, which, waits=True)
    given = shapes(case, alike, split)
    if way == NAMED:
        gradients = (P(), P(), P(AXIS), P(AXIS))
        outputs = {"y": P(AXIS), "moved": P(), "gradients": gradients}
        names = {EVAL: ["y"], FORWARD: ["y", "moved"], BACKWARD: list(outputs)}[which]
        outputs = {name: outputs[name] for name in names}
        inputs = (P(), *[P(AXIS)] * 4)
        run = jax.shard_map(run, mesh=mesh, in_specs=inputs, out_specs=outputs)
    return hlo.parse(compiled(run, given, chip).as_text()).collectives()
