"""Time of a batch norm layer beside Flax's and the memory floor, interleaved in one process.

Run it as `python tests/benchmarks/speed.py`. Every contender is compiled, checked for equal
results and then timed in turns, so that what else the machine does hits all alike. The floor moves
the bytes that the work must move, with the plain kernels of the same compiler.
"""

import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import typer
from flax import linen as nn
from rich.console import Console
from rich.table import Table

import bnjax

# glibc gives large buffers back to the kernel after each call: without these settings a benchmark
# measures page faults. They are read when a process starts.
ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": str(2**32),
    "MALLOC_TRIM_THRESHOLD_": str(2**32),
    "MALLOC_TOP_PAD_": str(2**28),
}
Contender = Callable[..., Any]
SHAPES = {"large": (32, 56, 56, 64), "middle": (32, 28, 28, 128), "small": (32, 14, 14, 256)}


def flax_layer(scale: jax.Array, bias: jax.Array, x: jax.Array) -> jax.Array:
    """`flax.linen.BatchNorm` in training, its new statistics kept from being optimized away."""
    return _layer(nn.BatchNorm(False, dtype=x.dtype), scale, bias, x)


def bnjax_layer(scale: jax.Array, bias: jax.Array, x: jax.Array) -> jax.Array:
    """The same with bnjax's drop-in, on its default and exact path."""
    return _layer(bnjax.linen.BatchNorm(False, dtype=x.dtype), scale, bias, x)


def _layer(layer: nn.Module, scale: jax.Array, bias: jax.Array, x: jax.Array) -> Any:
    stats = {"mean": jnp.zeros_like(scale), "var": jnp.ones_like(scale)}
    variables = {"params": {"scale": scale, "bias": bias}, "batch_stats": stats}
    y, updates = layer.apply(variables, x, mutable=["batch_stats"])
    return y, updates


def forward(layer: Contender) -> Contender:
    """Output and new statistics."""
    return lambda scale, bias, x, dy: layer(scale, bias, x)


def forward_backward(layer: Contender) -> Contender:
    """The same, and the gradients to scale, bias and x."""

    def step(scale: jax.Array, bias: jax.Array, x: jax.Array, dy: jax.Array) -> Any:
        y, gradient, updates = jax.vjp(layer, scale, bias, x, has_aux=True)
        return y, updates, gradient(dy)

    return step


def floor_forward(scale: jax.Array, bias: jax.Array, x: jax.Array, dy: jax.Array) -> Any:
    """Read x for the sums; read it again and write y."""
    first, second = jax.lax.optimization_barrier((x, x))
    return _sums(first), (second.astype(jnp.float32) * scale + bias).astype(x.dtype)


def floor_forward_backward(scale: jax.Array, bias: jax.Array, x: jax.Array, dy: jax.Array) -> Any:
    """And read x and dy for the sums of the backward pass; read both again and write dx."""
    x1, x2, dy1, dy2 = jax.lax.optimization_barrier((x, x, dy, dy))
    dx = (x2.astype(jnp.float32) * scale + dy2 * bias).astype(x.dtype)
    return floor_forward(scale, bias, x, dy), _sums(x1 * dy1), dx


def _sums(x: jax.Array) -> jax.Array:
    return jnp.sum(x.astype(jnp.float32), tuple(range(x.ndim - 1)))


def measure(functions: dict[str, Contender], arguments: tuple, rounds: int) -> dict[str, float]:
    """Median time of each function in milliseconds, taken in turns."""
    compiled = {name: jax.jit(f).lower(*arguments).compile() for name, f in functions.items()}
    times: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(rounds + 3):
        for name, function in compiled.items():
            start = time.perf_counter()
            jax.block_until_ready(function(*arguments))
            if number >= 3:  # the first rounds warm caches and memory up
                times[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def check_equal(arguments: tuple) -> None:
    """Both layers give the same outputs, statistics and gradients before they are timed."""
    tolerance = 3e-2 if arguments[2].dtype == jnp.bfloat16 else 1e-4
    expected, actual = (
        jax.tree.leaves(jax.jit(forward_backward(layer))(*arguments))
        for layer in (flax_layer, bnjax_layer)
    )
    for a, b in zip(actual, expected, strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_allclose(a, b, atol=tolerance * np.abs(b).max())


def main(
    rounds: Annotated[int, typer.Option(help="Timings of each contender.")] = 31,
    size: Annotated[str, typer.Option(help=f"One of {', '.join(SHAPES)}, or all.")] = "all",
) -> None:
    """Time training forward and forward+backward, float32 and bfloat16, as ratios to Flax."""
    if any(os.environ.get(name) != value for name, value in ALLOCATOR.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | ALLOCATOR)
    table = Table(title=f"training: medians of {rounds} rounds, milliseconds")
    for column in ("shape", "dtype", "pass", "flax", "bnjax", "floor", "ratio"):
        table.add_column(column, justify="right")
    rng = np.random.default_rng(0)
    for name, shape in SHAPES.items():
        for dtype in (jnp.float32, jnp.bfloat16) if size in (name, "all") else ():
            x, dy = (jnp.asarray(rng.normal(size=shape), dtype) for _ in range(2))
            scale, bias = (jnp.asarray(rng.normal(size=shape[-1]), jnp.float32) for _ in range(2))
            check_equal((scale, bias, x, dy))
            for label, wrap, floor in (
                ("fwd", forward, floor_forward),
                ("fwd+bwd", forward_backward, floor_forward_backward),
            ):
                functions = {"flax": wrap(flax_layer), "bnjax": wrap(bnjax_layer), "floor": floor}
                times = measure(functions, (scale, bias, x, dy), rounds)
                cells = (f"{times[key]:.2f}" for key in functions)
                ratio = f"{times['bnjax'] / times['flax']:.2f}"
                table.add_row(
                    "x".join(map(str, shape)), jnp.dtype(dtype).name, label, *cells, ratio
                )
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
