"""The cases of one layer: an input, what follows the layer, and the data they are measured on."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from tests.benchmarks.contenders import Values

EVAL, FORWARD, BACKWARD = PASSES = "eval", "forward", "forward+backward"
PLAIN, MASK, RELU, RESIDUAL, FAR = "", "mask", "relu", "residual+relu", "mean 10"
STEADY, COLD, CENTRED = STATES = "steady", "cold", "centred"
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
# Readings and writings of arrays of x's size at least, where the cotangent waits for the output: x
# for the statistics and again for y; backward, x and its cotangent twice each, and the gradient.
IDEAL = {EVAL: (1, 1), FORWARD: (2, 1), BACKWARD: (6, 2)}

_SPREAD = 0.3  # of the logarithms of the channels' deviations
_LAG = 0.05  # how far a steady running mean is from the batch's, at most


class Case(NamedTuple):
    """An input and what is done with it.

    In the state steady the running mean is near the batch's, as in a training that runs; in cold it
    is that of other data; centred is steady with all means at zero.
    """

    shape: tuple[int, ...]
    axis: int = -1
    dtype: str = "float32"
    variant: str = PLAIN
    state: str = STEADY

    @property
    def name(self) -> str:
        """Layout, shape, variant, state."""
        layout = {2: "1d", 3: "1d", 5: "3d"}.get(len(self.shape))
        layout = layout or ("NHWC" if self.axis == -1 else "NCHW")
        state = "" if self.state == STEADY else self.state
        parts = layout, "x".join(map(str, self.shape)), self.variant, state
        return " ".join(filter(None, parts))

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


def inputs(case: Case, number: int = 0) -> Inputs:
    """Channels of means N(0, 1) and deviations exp(0.3 N), as networks have them.

    All means are zero if the case is centred, and ten more if it is far. Each number is another
    batch of the same channels. They are drawn where jax computes.
    """
    means, deviations = jax.random.normal(_key(-1), (2, case.shape[case.axis]))
    means = means * (case.state != CENTRED) + 10 * (case.variant == FAR)
    return _drawn(case, _key(number), means, jnp.exp(_SPREAD * deviations))


def around(case: Case, mean: float) -> Inputs:
    """Values N(mean, 1) in all channels; cold running means are N(0, 1) for any mean."""
    channels = jnp.ones(case.shape[case.axis])
    return _drawn(case, _key(0), mean * channels, channels)


def _key(number: int) -> jax.Array:
    return jax.random.key(number + 1, impl="rbg")  # the quickest to compile and to run


def _drawn(case: Case, key: jax.Array, means: jax.Array, deviations: jax.Array) -> Inputs:
    """The running variance is the batch's; the running mean is near the batch's unless it is cold.

    A mask leaves out a fifth of the positions.
    """
    of_values, of_channels, of_mask = jax.random.split(key, 3)
    dtype = DTYPES[case.dtype]
    x, dy, *more = jax.random.normal(of_values, (2 + (case.variant == RESIDUAL), *case.shape))
    scale, bias, other, lag = jax.random.normal(of_channels, (4, means.size))
    around_zero = x * jnp.expand_dims(deviations, case.reduced)
    x = around_zero + jnp.expand_dims(means, case.reduced)
    # Within _LAG for certain, and taken without the means, which may be large.
    near = means + (jnp.mean(around_zero, case.reduced) + _LAG * jnp.tanh(lag))
    mean = other if case.state == COLD else near
    values = Values(1 + 0.2 * scale, bias, mean, jnp.var(around_zero, case.reduced))
    positions = [n if i in case.reduced else 1 for i, n in enumerate(case.shape)]
    mask = jax.random.bernoulli(of_mask, 0.8, positions) if case.variant == MASK else None
    residual = more[0].astype(dtype) if more else None
    return Inputs(values, x.astype(dtype), dy.astype(dtype), mask, residual)
