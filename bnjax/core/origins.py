"""Where the sums of a batch are taken from, so that no digits cancel.

`var = mean(|x - origin|^2) - |mean - origin|^2` is exact as long as the origin is within about a
standard deviation of the mean. Zero often is, and costs nothing; the mean costs a reading more; a
sample of the values is in between. All of it gives origin, mean minus origin, and biased variance.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from bnjax.core import compat
from bnjax.core.moments import Axes, abs2, deviations, where, working_dtype
from bnjax.core.sums import SMALL, sums

# Squared mean over variance up to which plain sums will do: they lose a factor 1 + _NEAR of the
# precision.
_NEAR = 4
_HUGE = 2.0**64  # squares of larger numbers overflow in float32

Centred = tuple[jax.Array, jax.Array, jax.Array]


# Compiled by itself, it is traced and lowered once for all layers of a shape.
@functools.partial(jax.jit, static_argnums=(3, 4))
def centred(
    x: jax.Array, mask: jax.Array | None, n: jax.Array, reduced: Axes, apart: bool
) -> Centred:
    """Origin, mean minus origin, and biased variance of n values, from what is nearest at hand.

    With `apart`, the channels may be on devices that should not talk: nothing is decided for all.
    """
    if compat.plain.value:
        mean = jnp.sum(where(mask, x.astype(working_dtype(x.dtype))), reduced) / n
        return _from(lax.stop_gradient(mean), x, mask, n, reduced)
    anywhere = functools.partial(_from_typical, reduced=reduced)
    if apart:
        return anywhere(x, mask, n)
    on_cpu = functools.partial(_from_zero_or_mean, reduced=reduced)
    return lax.platform_dependent(x, mask, n, cpu=on_cpu, default=anywhere)


def _from_typical(x: jax.Array, mask: jax.Array | None, n: jax.Array, reduced: Axes) -> Centred:
    """From a sample of the values where one can be taken, otherwise from the mean."""
    sizes = tuple(x.shape[a] for a in reduced[1:])
    known = all(isinstance(size, int) for size in x.shape)
    if mask is None and known and math.prod(sizes) >= 9:
        return _from(_sample(x, n, reduced, sizes), x, mask, n, reduced)
    return _from(_mean(x, mask, n, reduced), x, mask, n, reduced)


def _from_zero_or_mean(
    x: jax.Array, mask: jax.Array | None, n: jax.Array, reduced: Axes
) -> Centred:
    """From zero if no mean is far from it, otherwise from the mean, too.

    Near is nearly always so, and 0 costs nothing: no reading, and under plain jit no message.
    """
    wide = working_dtype(x.dtype)
    # For half precision or channels first, XLA has kernels for one plain sum of which two take no
    # longer than one loop for both sums.
    large = not all(isinstance(size, int) for size in x.shape) or x.size > SMALL
    alone = mask is None and (x.dtype != wide or x.ndim - 1 in reduced) and large
    if alone:
        # The barrier lets each of them read x itself, not one float32 copy.
        one, other = (each.astype(wide) for each in lax.optimization_barrier((x, x)))
        mean, square_mean = jnp.sum(one, reduced) / n, jnp.sum(abs2(other), reduced) / n
    else:
        values = where(mask, x.astype(wide))
        unit = _unit(x.shape, reduced, n.dtype)
        total, squares = sums((values * unit, abs2(values)), reduced)
        mean, square_mean = total / (n * unit), squares / n
    square = abs2(mean)
    var = square_mean - square
    near = ((square < _NEAR * var) | (mean == 0)) & jnp.isfinite(var)
    from_zero = jnp.zeros_like(mean), mean, var

    def mixed() -> Centred:
        # By channel, so that no channel's result depends on the others.
        origin = _mean(x, mask, n, reduced) if alone else mean
        from_mean = _from(origin, x, mask, n, reduced)
        return jax.tree.map(lambda zero, other: jnp.where(near, zero, other), from_zero, from_mean)

    return lax.cond(jnp.all(near), lambda: from_zero, mixed)


def _from(
    origin: jax.Array, x: jax.Array, mask: jax.Array | None, n: jax.Array, reduced: Axes
) -> Centred:
    """From a given origin, which is within about a standard deviation of the mean."""
    unit = jnp.where(jnp.abs(origin) > _HUGE, 1 / _HUGE, 1)  # rounding errors have squares, too
    from_origin = where(mask, deviations(x, origin, reduced))
    squares = abs2(from_origin * jnp.expand_dims(unit, reduced))
    offset, square_mean = (total / n for total in sums((from_origin, squares), reduced))
    square = abs2(offset * unit)
    # The offset is at most about one standard deviation, so this difference loses no digits.
    var = jnp.maximum(square_mean - square, 0)
    # Of a constant channel, the offset is the rounding error of the origin, and so are its squares:
    # its value is the origin put right.
    constant = var <= square * 2.0**-18
    origin = jnp.where(constant, origin + offset, origin)
    return origin, jnp.where(constant, 0, offset), jnp.where(constant, 0, var / lax.square(unit))


def _mean(x: jax.Array, mask: jax.Array | None, n: jax.Array, reduced: Axes) -> jax.Array:
    """The mean, as a sum that does not overflow."""
    unit = _unit(x.shape, reduced, n.dtype)
    scaled = x.astype(working_dtype(x.dtype)) * unit
    (total,) = sums([where(mask, scaled)], reduced)
    mean = total / (n * unit)
    # What is taken from x must be the same everywhere, but XLA computes a product anew for each
    # use, here rounded, there (in a fused multiply-add) not: a bound prevents that.
    bound = jnp.finfo(mean.dtype).max
    return mean if jnp.iscomplexobj(mean) else jnp.clip(mean, -bound, bound)


def _sample(x: jax.Array, n: jax.Array, reduced: Axes, sizes: Axes) -> jax.Array:
    """The mean over the examples of a median of nine positions.

    Rare wild values are not the median, and a wild example weighs as one of many.
    """
    # Spread over each axis, in another order each: never along one edge, which may be padding.
    steps = ((2**axis * np.arange(9) % 9, size) for axis, size in enumerate(sizes))
    places = tuple((2 * step + 1) * size // 18 for step, size in steps)
    values = jnp.moveaxis(x, reduced[1:], range(len(sizes)))[places].astype(working_dtype(x.dtype))
    middle = _median_of_3(_median_of_3(values.reshape(3, 3, *values.shape[1:])))
    return _mean(middle, None, n / math.prod(sizes), reduced[:1])


def _median_of_3(rows: jax.Array) -> jax.Array:
    """The median over a leading axis of size 3: the largest of the smaller ones of each pair."""
    return jnp.max(jnp.minimum(rows, jnp.roll(rows, 1, 0)), 0)


def _unit(shape: Axes, reduced: Axes, dtype: jnp.dtype) -> float | jax.Array:
    """What values are multiplied by so that no sum overflows: a power of two, no digit is lost."""
    rows = math.prod(shape[axis] for axis in reduced)
    if isinstance(rows, int):
        return 0.5 ** math.ceil(math.log2(rows))
    return 1 / jnp.asarray(rows, dtype)
