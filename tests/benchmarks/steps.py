"""What is done with a case: a layer and what follows it, in one direction or both."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from tests.benchmarks.cases import EVAL, FORWARD, RELU, Case, Inputs
from tests.benchmarks.contenders import Apply


def step(apply: Apply, case: Case, which: str, *, waits: bool = False) -> Any:
    """A function of `Inputs`: the output, and in training new statistics and gradients.

    With `waits`, the cotangent is there after the output alone, as in a network.
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
