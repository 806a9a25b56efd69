"""The cases of one layer: an input, a pass, what follows the layer; and what a step of it is."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bnjax.core.sums import sums as pair
from tests.benchmarks.contenders import Apply, Values

EVAL, FORWARD, BACKWARD = PASSES = "eval", "forward", "forward+backward"
PLAIN, MASK, RELU, RESIDUAL, FAR = "", "mask", "relu", "residual+relu", "mean 10"
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


class Case(NamedTuple):
    """An input and what is done with it."""

    shape: tuple[int, ...]
    axis: int = -1
    dtype: str = "float32"
    variant: str = PLAIN

    @property
    def name(self) -> str:
        """Layout, shape, variant."""
        layout = {2: "1d", 3: "1d", 5: "3d"}.get(len(self.shape))
        layout = layout or ("NHWC" if self.axis == -1 else "NCHW")
        return " ".join(filter(None, (layout, "x".join(map(str, self.shape)), self.variant)))

    @property
    def reduced(self) -> tuple[int, ...]:
        """The axes that are not the channels'."""
        return tuple(i for i in range(len(self.shape)) if i != self.axis % len(self.shape))

    @property
    def tolerance(self) -> float:
        """Of the differences' root mean square, as a part of the values'."""
        # With a relu, a value near 0 may fall on either side of it, and with it a gradient.
        exact, by_side = (3e-2, 1e-1) if self.dtype == "bfloat16" else (1e-4, 5e-3)
        return by_side if "relu" in self.variant else exact


class Inputs(NamedTuple):
    """The arguments of every step."""

    values: Values
    x: jax.Array
    dy: jax.Array
    mask: jax.Array | None
    residual: jax.Array | None


def inputs(case: Case) -> Inputs:
    """Normally distributed ones; a mask leaves out a fifth of the positions."""
    rng = np.random.default_rng(0)
    dtype = DTYPES[case.dtype]
    channels = case.shape[case.axis]

    def draw(mean: float = 0, shape: tuple[int, ...] = case.shape) -> np.ndarray:
        return rng.standard_normal(shape, np.float32) + np.float32(mean)

    scale, bias, mean = (jnp.asarray(draw(m, (channels,))) for m in (1, 0, 0))
    values = Values(scale, bias, mean, jnp.asarray(rng.uniform(0.5, 2, channels), jnp.float32))
    positions = [1 if i not in case.reduced else n for i, n in enumerate(case.shape)]
    return Inputs(
        values,
        jnp.asarray(draw(10 if case.variant == FAR else 0), dtype),
        jnp.asarray(draw(), dtype),
        jnp.asarray(rng.random(positions) < 0.8) if case.variant == MASK else None,
        jnp.asarray(draw(), dtype) if case.variant == RESIDUAL else None,
    )


def step(apply: Apply, case: Case, which: str, *, waits: bool = False) -> Any:
    """A function of `Inputs`: the output, and in training new statistics and gradients.

    If it waits, y is complete before dy is looked at, as in a network.
    """

    def layer(scale: jax.Array, bias: jax.Array, x: jax.Array, residual: Any, rest: Inputs) -> Any:
        values = rest.values._replace(scale=scale, bias=bias)
        y, moved = apply(values, x, rest.mask, which != EVAL, case.axis)
        return after(y, residual, case.variant), moved

    def run(*arguments: Any) -> dict[str, Any]:
        given = Inputs(*arguments)
        primals = given.values.scale, given.values.bias, given.x, given.residual
        if which == EVAL:
            return {"y": layer(*primals, given)[0]}
        if which == FORWARD:
            y, moved = layer(*primals, given)
            return {"y": y, "moved": moved}
        of_given = functools.partial(layer, rest=given)
        y, gradient, moved = jax.vjp(of_given, *primals, has_aux=True)
        y, dy = jax.lax.optimization_barrier((y, given.dy)) if waits else (y, given.dy)
        return {"y": y, "moved": moved, "gradients": gradient(dy)}

    return run


def after(y: jax.Array, residual: jax.Array | None, variant: str) -> jax.Array:
    """What follows the layer."""
    if variant == RELU:
        return jax.nn.relu(y)
    return jax.nn.relu(y + residual) if residual is not None else y


FLOOR = "floor"
_PAIRED = "floor, paired"


def floors(case: Case, which: str) -> dict[str, Any]:
    """The floor by name, in two ways where there are products to sum: see `lowest`."""
    pairs = {_PAIRED: _floor(case, which, paired=True)} if which == BACKWARD else {}
    return {FLOOR: _floor(case, which), **pairs}


def lowest(times: dict[str, float]) -> dict[str, float]:
    """The times, of the floors the shorter one alone.

    XLA sums x * dy the faster by itself in float32, together with dy in bfloat16.
    """
    paired = times.get(_PAIRED, math.inf)
    found = {name: time for name, time in times.items() if name != _PAIRED}
    return {**found, FLOOR: min(found[FLOOR], paired)}


def _floor(case: Case, which: str, *, paired: bool = False) -> Any:
    """A function of `Inputs` that moves the bytes that the step must move, with plain kernels.

    Evaluation reads x and writes y. Training reads x for the sums, reads it again and writes y;
    backward it reads x and dy for the sums, reads both again and writes dx. A residual is read
    where y is made, y tells backward where relu was, and the residual's gradient is written.
    Without barriers XLA would write one float32 copy of a bfloat16 x for all passes.
    """

    def sums(x: jax.Array) -> jax.Array:
        return jnp.sum(x.astype(jnp.float32), case.reduced)

    def copy(given: Inputs, x: jax.Array) -> jax.Array:
        scale, bias = (jnp.expand_dims(v, case.reduced) for v in given.values[:2])
        y = (x.astype(jnp.float32) * scale + bias).astype(x.dtype)
        return after(y, given.residual, case.variant)

    def run(*arguments: Any) -> Any:
        given = Inputs(*arguments)
        if which == EVAL:
            return copy(given, given.x)
        first, second = jax.lax.optimization_barrier((given.x, given.x))
        if given.mask is not None:
            first = jnp.where(given.mask, first, 0)
        y = copy(given, second)
        if which == FORWARD:
            return sums(first), y
        x1, x2, dy1, dy2 = jax.lax.optimization_barrier((given.x, given.x, given.dy, given.dy))
        extra = ()
        if given.residual is not None:
            # The masked cotangent is the residual's gradient: written once, and read as dy.
            dy1 = jnp.where(jax.lax.optimization_barrier(y) > 0, dy1, 0)
            dy1, dy2 = jax.lax.optimization_barrier((dy1, dy1))
            extra = (dy2,)
        elif case.variant == RELU:  # x itself tells where
            dy1, dy2 = (jnp.where(x > 0, dy, 0) for x, dy in ((x1, dy1), (x2, dy2)))
        x1 = x1 if given.mask is None else jnp.where(given.mask, x1, 0)
        scale, bias = (jnp.expand_dims(v, case.reduced) for v in given.values[:2])
        dx = (x2.astype(jnp.float32) * scale + dy2 * bias).astype(x2.dtype)
        if not paired:
            return sums(first), y, sums(x1 * dy1), dx, *extra
        x1, dy1 = x1.astype(jnp.float32), dy1.astype(jnp.float32)
        return sums(first), y, pair((x1 * dy1, dy1), case.reduced), dx, *extra

    return run


@jax.jit
def difference(actual: Any, expected: Any) -> jax.Array:
    """The largest of the arrays' differences: root mean square, as a part of the values'."""

    def one(a: jax.Array, b: jax.Array) -> jax.Array:
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        return jnp.sqrt(jnp.mean((a - b) ** 2) / jnp.mean(b**2))

    pairs = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
    # max would drop a NaN
    return jnp.sum(jnp.stack([one(a, b) for a, b in pairs]) ** 2) ** 0.5


def compared(result: dict[str, Any]) -> dict[str, Any]:
    """What all contenders must agree on; each moves its statistics by a convention of its own."""
    return {key: value for key, value in result.items() if key != "moved"}
