"""Where the sums of a batch are taken from, so that no digits cancel.

`var = mean(|x - origin|^2) - |mean - origin|^2` is exact as long as the origin is within about a
standard deviation of the mean. Each function here takes it from somewhere else, and returns origin,
mean minus origin, and biased variance:

- `_from_typical`: a median of 27 values. It reads nothing, and is never far; but the sums wait for
  x, and where a batch is split over devices, it is a message.
- `_from_running`: the running mean, known before x is. In a training that runs it is never far;
  in the first steps, and wherever it is, x is read once more, from the mean itself.
- `_from_mean`: the mean. Always good, and always one reading more.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from bnjax.core import compat, sharding
from bnjax.core.moments import Axes, abs2, deviations, where, working_dtype
from bnjax.core.sums import sums

# Squared distance of the mean from the origin, over the variance: up to there, sums lose a factor
# of 1 + _NEAR of their precision. The rounding of half precision itself has cost more digits.
_NEAR, _NEAR_HALF = 3, 36
_HUGE = 2.0**64  # squares of larger numbers overflow in float32

Centred = tuple[jax.Array, jax.Array, jax.Array]


# Compiled by itself, it is traced and lowered once for all layers of a shape.
@functools.partial(jax.jit, static_argnums=(4, 5))
def centred(
    x: jax.Array,
    mask: jax.Array | None,
    n: jax.Array,
    running: jax.Array | None,
    reduced: Axes,
    apart: bool,
) -> Centred:
    """Origin, mean minus origin, and biased variance of n values, from what is nearest at hand.

    With `apart`, the channels may be on devices that should not talk: nothing is decided for all.
    """
    known = all(isinstance(size, int) for size in x.shape)
    if compat.plain.value or (apart and (mask is not None or not known)):
        return _from_mean(x, mask, n, reduced)
    if apart:
        return _from_typical(x, n, reduced)
    if running is None:
        running = jnp.zeros([x.shape[a] for a in range(x.ndim) if a not in reduced])
    origin = lax.stop_gradient(jnp.where(jnp.isfinite(running), running, 0))
    origin = origin.astype(working_dtype(x.dtype))
    if mask is not None or not known or sharding.device_count() > 1:
        return _from_running(x, mask, n, origin, reduced)
    return lax.platform_dependent(
        x,
        n,
        origin,
        cpu=lambda x, n, _: _from_typical(x, n, reduced),
        default=lambda x, n, origin: _from_running(x, None, n, origin, reduced),
    )


def _from_typical(x: jax.Array, n: jax.Array, reduced: Axes) -> Centred:
    """From a median of 27 values.

    Rare wild values are not the median, and no example, no row and no column has more than a few of
    the places: each axis is walked through in another order.
    """
    steps = np.arange(27)
    places: list[Any] = [slice(None)] * x.ndim
    for order, axis in enumerate(reduced):
        places[axis] = (2 * (10**order * steps % 27) + 1) * x.shape[axis] // 54
    values = jnp.moveaxis(x[tuple(places)], reduced[0] * _together(reduced), 0)
    middle = _median_of_3(_median_of_3(values.astype(working_dtype(x.dtype))))
    # As a product of matrices, since XLA computes a plain sum anew for each value of x.
    weights = np.array([0.25, 0.5, 0.25], middle.dtype)
    origin = jnp.tensordot(weights, middle, 1, precision="highest")
    offset, var = _around(origin, x, None, n, reduced)
    return origin, offset, jnp.maximum(var, 0)


def _together(axes: Axes) -> bool:
    """NumPy leaves the places where the axes were if these are neighbours, else puts them first."""
    return axes == tuple(range(axes[0], axes[-1] + 1))


def _median_of_3(rows: jax.Array) -> jax.Array:
    """Of three at a time along the first axis."""
    a, b, c = jnp.split(rows, 3)
    return jnp.maximum(jnp.minimum(a, b), jnp.minimum(jnp.maximum(a, b), c))


def _from_running(
    x: jax.Array, mask: jax.Array | None, n: jax.Array, origin: jax.Array, reduced: Axes
) -> Centred:
    """From the running mean, and for the channels where that is far from the mean."""
    offset, var = _around(origin, x, mask, n, reduced)
    bound = _NEAR if x.dtype == origin.dtype else _NEAR_HALF
    # 0 away, with the variance 0: a constant channel that never was anything else.
    near = ((abs2(offset) < bound * var) | (offset == 0)) & (jnp.abs(var) < jnp.inf)

    def again() -> Centred:
        # By channel, so that no channel's result depends on the others.
        nearer = jnp.where(near, origin, _bounded(origin + offset))
        return _put_right(nearer, *_around(nearer, x, mask, n, reduced))

    return lax.cond(jnp.all(near), lambda: (origin, offset, var), again)


def _from_mean(x: jax.Array, mask: jax.Array | None, n: jax.Array, reduced: Axes) -> Centred:
    """From the mean itself."""
    unit = _unit(x.shape, reduced, n.dtype)
    (total,) = sums([where(mask, x.astype(working_dtype(x.dtype)) * unit)], reduced)
    mean = _bounded(total / (n * unit))
    return _put_right(mean, *_around(mean, x, mask, n, reduced))


def _around(
    origin: jax.Array, x: jax.Array, mask: jax.Array | None, n: jax.Array, reduced: Axes
) -> tuple[jax.Array, jax.Array]:
    """Mean minus origin, and variance, in one reading."""
    unit = _unit(x.shape, reduced, n.dtype)
    if x.dtype != origin.dtype:  # XLA would write a wide copy of x, for what follows, too
        x, origin = lax.optimization_barrier((x, origin))
    by = jnp.where(jnp.abs(origin) > _HUGE, 1 / _HUGE, 1.0)  # rounding errors have squares, too
    distance = where(mask, deviations(x, origin, reduced))
    squares = abs2(distance * jnp.expand_dims(by, reduced))
    total, squares = sums((distance * unit, squares), reduced)
    offset = total * (1 / (n * unit))
    return offset, (squares * (1 / n) - abs2(offset * by)) * lax.square(1 / by)


def _put_right(origin: jax.Array, offset: jax.Array, var: jax.Array) -> Centred:
    """A constant channel has no offset: that is the rounding error of the origin, as is `var`."""
    constant = var <= abs2(offset) * 2.0**-18
    origin = jnp.where(constant, origin + offset, origin)
    return origin, jnp.where(constant, 0, offset), jnp.where(constant, 0, var)


def _bounded(origin: jax.Array) -> jax.Array:
    # What is taken from x must be the same everywhere, but XLA computes a product anew for each
    # use, here rounded, there (in a fused multiply-add) not: a bound prevents that.
    bound = jnp.finfo(origin.dtype).max
    return origin if jnp.iscomplexobj(origin) else jnp.clip(origin, -bound, bound)


def _unit(shape: Axes, reduced: Axes, dtype: jnp.dtype) -> float | jax.Array:
    """What values are multiplied by so that no sum overflows: a power of two, no digit is lost."""
    rows = math.prod(shape[axis] for axis in reduced)
    if isinstance(rows, int):
        return 0.5 ** math.ceil(math.log2(rows))
    return 1 / jnp.asarray(rows, dtype)
