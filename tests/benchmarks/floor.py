"""The bytes that a step must move, moved by plain kernels: nothing that reads them is faster."""

import statistics
from typing import Any

import jax
import jax.numpy as jnp

from bnjax.core.sums import sums as pair
from tests.benchmarks.cases import BACKWARD, EVAL, FORWARD, RELU, Case, Inputs
from tests.benchmarks.steps import after

FLOOR = "floor"
_PAIRED = "floor, paired"


def floors(case: Case, which: str) -> dict[str, Any]:
    """The floor by name, in two ways where there are products to sum: see `lowest`."""
    pairs = {_PAIRED: _floor(case, which, paired=True)} if which == BACKWARD else {}
    return {FLOOR: _floor(case, which), **pairs}


def lowest(rounds: dict[str, list[float]]) -> dict[str, list[float]]:
    """The times of each round, of the floors those of the one that is lower.

    XLA sums x * dy the faster by itself in float32, together with dy in bfloat16.
    """
    found = dict(rounds)
    paired = found.pop(_PAIRED, found[FLOOR])
    return {**found, FLOOR: min(found[FLOOR], paired, key=statistics.median)}


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
