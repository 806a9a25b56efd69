"""Convolution, batch norm and relu, several times: a network with any contender's layer."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tests.benchmarks.cases import DTYPES
from tests.benchmarks.contenders import Apply, Values

AFFINE = "affine"  # what a network costs without batch norm


class Block(NamedTuple):
    """The variables of one convolution and its batch norm."""

    kernel: jax.Array
    values: Values


def variables(depth: int, channels: int) -> list[Block]:
    """Those of a new network, with 3x3 kernels."""
    rng = np.random.default_rng(0)
    spread = np.sqrt(2 / (9 * channels))
    ones, zeros = np.ones(channels, np.float32), np.zeros(channels, np.float32)
    return [
        Block(
            jnp.asarray(rng.normal(0, spread, (3, 3, channels, channels)), jnp.float32),
            Values(*map(jnp.asarray, (ones, zeros, zeros, ones))),
        )
        for _ in range(depth)
    ]


def images(shape: tuple[int, ...], dtype: str) -> jax.Array:
    """Normally distributed ones."""
    return jnp.asarray(np.random.default_rng(1).normal(size=shape), DTYPES[dtype])


def steady(network: list[Block], x: jax.Array) -> list[Block]:
    """The network with the statistics that its layers meet, as in a training that runs."""

    def measured(values: Values, x: jax.Array, mask: Any, train: bool, axis: int) -> Any:
        wide = x.astype(jnp.float32)
        mean, var = jnp.mean(wide, (0, 1, 2)), jnp.var(wide, (0, 1, 2))
        y = (wide - mean) * jax.lax.rsqrt(var + 1e-5) * values.scale + values.bias
        return y.astype(x.dtype), (mean, var)

    return jax.jit(lambda network, x: forward(measured, network, x)[1])(network, x)


def forward(apply: Apply, blocks: list[Block], x: jax.Array) -> tuple[jax.Array, list[Block]]:
    """The output, and the network with new statistics."""
    moved = []
    for kernel, values in blocks:
        x = jax.lax.conv_general_dilated(
            x, kernel.astype(x.dtype), (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x, (mean, var) = apply(values, x, None, True, -1)
        moved.append(Block(kernel, values._replace(mean=mean, var=var)))
        x = jax.nn.relu(x)
    return x, moved


def loss(apply: Apply, blocks: list[Block], x: jax.Array) -> tuple[jax.Array, Any]:
    """The mean square of the output, and the network with new statistics."""
    y, moved = forward(apply, blocks, x)
    return jnp.mean(jnp.square(y.astype(jnp.float32))), moved


def training_step(apply: Apply) -> Any:
    """A function of blocks and images: the loss, and the network after a step of descent."""

    def step(blocks: list[Block], x: jax.Array) -> tuple[jax.Array, list[Block]]:
        (value, moved), gradient = jax.value_and_grad(lambda b: loss(apply, b, x), has_aux=True)(
            blocks
        )
        updated = [
            Block(
                new.kernel - 0.01 * g.kernel,
                new.values._replace(
                    scale=new.values.scale - 0.01 * g.values.scale,
                    bias=new.values.bias - 0.01 * g.values.bias,
                ),
            )
            for new, g in zip(moved, gradient, strict=True)
        ]
        return value, updated

    return step
