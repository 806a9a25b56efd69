"""Three blocks of convolution, batch norm and relu: one training step, as XLA compiles it."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

import bnjax
from tests.benchmarks.cases import DTYPES
from tests.benchmarks.contenders import OURS, REFERENCE
from tests.benchmarks.programs.layers import AXIS, DEVICES, NAMED, measured, mesh_of
from tests.benchmarks.programs.topologies import Chip, compiled
from tests.support import hlo

BLOCKS = 3
SHAPE = (128, 56, 56, 64)
NORMS = {REFERENCE: nn.BatchNorm, OURS: bnjax.linen.BatchNorm}


class Net(nn.Module):
    """The blocks, and a classifier of the mean."""

    norm: Callable[..., nn.Module]
    dtype: Any
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Images to logits."""
        for _ in range(BLOCKS):
            x = nn.Conv(x.shape[-1], (3, 3), use_bias=False, dtype=self.dtype)(x)
            settings = {"momentum": 0.9, "dtype": self.dtype, "axis_name": self.axis_name}
            x = nn.relu(self.norm(use_running_average=False, **settings)(x))
        return nn.Dense(10)(x.mean((1, 2), dtype=jnp.float32))


def descent(net: Net) -> Callable[..., Any]:
    """A step of gradient descent: the loss, new statistics, new parameters."""

    def step(params: Any, stats: Any, x: jax.Array, labels: jax.Array) -> Any:
        def loss(params: Any) -> Any:
            variables = {"params": params, "batch_stats": stats}
            logits, moved = net.apply(variables, x, mutable=["batch_stats"])
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            value = losses.mean()
            return jax.lax.pmean(value, net.axis_name) if net.axis_name else value, moved

        (value, moved), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        moved_params = jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient)
        return value, moved["batch_stats"], moved_params

    return step


def alone(dtype: str, contender: str, chip: Chip) -> dict[str, Any]:
    """Kernels, readings and writings, memory on one device."""
    place = SingleDeviceSharding(chip.devices()[0])
    net = Net(NORMS[contender], DTYPES[dtype])
    made = compiled(descent(net), _shapes(net, place, place), chip, donate_argnums=(0, 1))
    unit = math.prod(SHAPE) * jnp.dtype(dtype).itemsize
    return measured(made, unit)


def parallel(dtype: str, contender: str, way: str, chip: Chip) -> list[hlo.Collective]:
    """What devices say to each other in a step, each with its part of the batch."""
    mesh = mesh_of(chip, DEVICES)
    alike, split = (NamedSharding(mesh, spec) for spec in (P(), P(AXIS)))
    net = Net(NORMS[contender], DTYPES[dtype], AXIS if way == NAMED else None)
    run, options = descent(net), {}
    if way == NAMED:
        inputs = (P(), P(), P(AXIS), P(AXIS))
        run = jax.shard_map(run, mesh=mesh, in_specs=inputs, out_specs=P())
    else:
        options = {"out_shardings": alike}
    made = compiled(run, _shapes(net, alike, split), chip, **options)
    return hlo.parse(made.as_text()).collectives()


def _shapes(net: Net, alike: Any, split: Any) -> tuple[Any, ...]:
    """The arguments of a step: where what is the same everywhere lies, and what is split."""
    x = jax.ShapeDtypeStruct(SHAPE, net.dtype, sharding=split)
    labels = jax.ShapeDtypeStruct(SHAPE[:1], jnp.int32, sharding=split)
    held = jax.eval_shape(net.copy(axis_name=None).init, jax.random.key(0), x)
    held = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=alike), held)
    return held["params"], held["batch_stats"], x, labels
