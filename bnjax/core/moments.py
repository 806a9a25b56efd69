"""Count, mean and variance of a batch, without cancellation at any mean.

Everything that pools statistics (a batch, a mask, devices, micro-batches, a data set) does it with
`Moments` and `merge`. The mean is kept as a sum of two numbers, `origin + offset`: the origin is a
typical value of the data, so that `x - origin` is exact and of the size of the deviations, and
`offset`, small, carries the digits that the mean itself has no room for.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from bnjax.core.sums import Axes, sums

# Squared mean over variance up to which plain sums will do: they lose a factor 1 + _NEAR of the
# precision.
_NEAR = 4
_STATISTICS = "bnjax.statistics"  # what `remat_policy` keeps
_HUGE = 2.0**64  # squares of larger numbers overflow in float32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Moments:
    """Count, mean and sum of squared deviations of a set of values, per channel.

    Attributes:
        count: how many values were seen; real, shape () or (C,).
        origin: a reference point near the values, shape (C,).
        offset: mean minus origin, shape (C,).
        m2: sum of |value - mean|^2, real, shape (C,).
    """

    count: jax.Array
    origin: jax.Array
    offset: jax.Array
    m2: jax.Array

    @property
    def mean(self) -> jax.Array:
        """The mean, rounded to the working precision."""
        return self.origin + self.offset

    def variance(self, correction: int = 0) -> jax.Array:
        """`m2 / (count - correction)`: 0 gives the biased variance, 1 the unbiased one.

        Where count <= correction there is no variance; the result there is m2, which is 0.
        """
        return self.m2 / jnp.maximum(self.count - correction, 1)


def measure(
    x: jax.Array,
    axes: Axes,
    mask: jax.Array | None = None,
    wide: jax.Array | None = None,
    *,
    apart: bool = False,
) -> Moments:
    """Moments of `x` over all axes but the feature axes.

    It reads x once, and once or twice more where a mean is far from zero; on accelerators, instead,
    once more under a mask or where an example has fewer than nine positions.

    Args:
        x: values of any shape and dtype; integers and half precision are taken as float32.
        axes: the feature axes, non-negative and sorted.
        mask: bool, of x's rank (sizes 1 broadcast); only True positions are seen.
        wide: x in the working dtype, whose derivative is taken in place of that of x. Functions
            that share it add their gradients before these are rounded to x's dtype.
        apart: the channels may be on devices that should not talk: nothing is decided for all.

    Returns:
        Moments in float32 at least, of the shape of the feature axes; zeros if no value is seen.
    """
    features = tuple(x.shape[a] for a in axes)
    reduced = other_axes(x.ndim, axes)
    working = working_dtype(x.dtype)
    real = jnp.finfo(working).dtype
    if x.size == 0:
        empty = jnp.zeros(features, working)
        return Moments(jnp.zeros((), real), empty, empty, jnp.zeros(features, real))
    count = _count(x.shape, reduced, features, mask, real)
    wide = x.astype(working) if wide is None else wide
    origin, offset, var = _centred(x, wide, mask, count, reduced, apart)
    return _moments(count, origin, offset, var)


@jax.jit
def _moments(
    count: jax.Array, origin: jax.Array, offset: jax.Array, variance: jax.Array
) -> Moments:
    finite = variance < jnp.inf  # by an infinite one, all would be normal: 0
    return Moments(count, origin, offset, jnp.where(finite, variance, jnp.nan) * count)


def merge(a: Moments, b: Moments) -> Moments:
    """Moments of the union of two disjoint sets (Chan, Golub and LeVeque 1983).

    `m2 = a.m2 + b.m2 + delta^2 * a.count * b.count / count`, with delta the difference of the
    means taken between offsets and origins separately, so that nothing cancels. Either side may be
    empty.
    """
    origin = jnp.where(a.count > 0, a.origin, b.origin)
    from_origin_a = (a.origin - origin) + a.offset
    from_origin_b = (b.origin - origin) + b.offset
    count = a.count + b.count
    weight = b.count / jnp.maximum(count, 1)
    delta = jnp.where((a.count > 0) & (b.count > 0), from_origin_b - from_origin_a, 0)
    offset = jnp.where(a.count > 0, from_origin_a + delta * weight, from_origin_b)
    return Moments(count, origin, offset, a.m2 + b.m2 + abs2(delta) * a.count * weight)


def remat_policy() -> Callable[..., bool]:
    """A policy for `jax.checkpoint` and `nn.remat`: keep what is dear, recompute what is cheap.

    It keeps the outputs of convolutions and matrix products, and the statistics of batch norms: a
    backward pass reduces nothing again, and devices do not talk again. Normalization, activations
    and sums are recomputed. Between the passes stays about half of what stays without it.

    >>> from flax import linen as nn
    >>> Block = nn.remat(nn.Sequential, policy=remat_policy())
    """
    return jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_saveable,
        jax.checkpoint_policies.save_only_these_names(_STATISTICS),
    )


def deviations(x: jax.Array, origin: jax.Array, reduced: Axes) -> jax.Array:
    """`x - origin` in the working precision, with the origin given per channel."""
    return x.astype(working_dtype(x.dtype)) - jnp.expand_dims(origin, reduced)


def kept(statistic: jax.Array) -> jax.Array:
    """A value under the name that `remat_policy` knows."""
    return checkpoint_name(statistic, _STATISTICS)


def abs2(x: jax.Array) -> jax.Array:
    """`|x|^2`, real."""
    return (
        lax.square(jnp.real(x)) + lax.square(jnp.imag(x)) if jnp.iscomplexobj(x) else lax.square(x)
    )


def working_dtype(dtype: jax.typing.DTypeLike) -> jnp.dtype:
    """The dtype in which statistics of `dtype` are taken: float32 at least."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.promote_types(dtype, jnp.float32)


def other_axes(ndim: int, axes: Sequence[int]) -> Axes:
    """The axes that are not in `axes`."""
    return tuple(i for i in range(ndim) if i not in axes)


def _count(
    shape: Axes, reduced: Axes, features: Axes, mask: jax.Array | None, dtype: jnp.dtype
) -> jax.Array:
    """How many positions count: a number, or one per channel where the mask differs by channel."""
    if mask is None:
        return jnp.asarray(math.prod(shape[a] for a in reduced), dtype)
    unseen = math.prod(shape[a] for a in reduced if mask.shape[a] == 1)
    count = jnp.sum(mask, reduced, dtype=dtype) * unseen
    return count.reshape(()) if count.size == 1 else jnp.broadcast_to(count, features)


@functools.partial(jax.custom_jvp, nondiff_argnums=(4, 5))
def _centred(
    x: jax.Array,
    wide: jax.Array,
    mask: jax.Array | None,
    count: jax.Array,
    reduced: Axes,
    apart: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Origin, mean minus origin, and biased variance.

    The rule for derivatives is written out because it is so much simpler than what happens above:
    however the origin was chosen, it does not move, and d mean = mean(dx),
    d var = 2 mean(Re(conj(x - mean) dx)).
    """
    del wide
    return _statistics(x, mask, count, reduced, apart)


# Compiled by itself, it is traced and lowered once for all layers of a shape.
@functools.partial(jax.jit, static_argnums=(3, 4))
def _statistics(
    x: jax.Array, mask: jax.Array | None, count: jax.Array, reduced: Axes, apart: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    n = jnp.maximum(count, 1)
    seen = mask is None and all(isinstance(size, int) for size in x.shape)

    def anywhere(x: jax.Array, mask: jax.Array | None, n: jax.Array) -> Any:
        origin = _sample(x, n, reduced) if seen else _mean(x, mask, n, reduced)
        return _centred_at(origin, x, mask, n, reduced)

    if apart:
        return anywhere(x, mask, n)
    on_cpu = functools.partial(_centred_at_zero_or_mean, reduced=reduced)
    return lax.platform_dependent(x, mask, n, cpu=on_cpu, default=anywhere)


def _centred_at_zero_or_mean(
    x: jax.Array, mask: jax.Array | None, n: jax.Array, reduced: Axes
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The same with the origin 0, if no mean is far from it.

    That is nearly always so, and 0 costs nothing: no reading, and under plain jit no message.
    """
    wide = working_dtype(x.dtype)
    # For half precision or channels first, XLA has kernels for one plain sum of which two take no
    # longer than one loop for both sums.
    alone = mask is None and (x.dtype != wide or x.ndim - 1 in reduced)
    if alone:
        # The barrier lets each of them read x itself, not one float32 copy.
        one, other = (each.astype(wide) for each in lax.optimization_barrier((x, x)))
        mean, square_mean = jnp.sum(one, reduced) / n, jnp.sum(abs2(other), reduced) / n
    else:
        values = _where(mask, x.astype(wide))
        unit = _unit(x.shape, reduced, n.dtype)
        total, squares = sums((values * unit, abs2(values)), reduced)
        mean, square_mean = total / (n * unit), squares / n
    square = abs2(mean)
    var = square_mean - square
    near = ((square < _NEAR * var) | (mean == 0)) & jnp.isfinite(var)
    at_zero = jnp.zeros_like(mean), mean, var

    def mixed() -> tuple[jax.Array, jax.Array, jax.Array]:
        # By channel, so that no channel's result depends on the others.
        origin = _mean(x, mask, n, reduced) if alone else mean
        at_mean = _centred_at(origin, x, mask, n, reduced)
        return jax.tree.map(lambda zero, other: jnp.where(near, zero, other), at_zero, at_mean)

    return lax.cond(jnp.all(near), lambda: at_zero, mixed)


def _centred_at(
    origin: jax.Array, x: jax.Array, mask: jax.Array | None, n: jax.Array, reduced: Axes
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The same with a given origin, which is within about a standard deviation of the mean."""
    unit = jnp.where(jnp.abs(origin) > _HUGE, 1 / _HUGE, 1)  # rounding errors have squares, too
    from_origin = _where(mask, deviations(x, origin, reduced))
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
    mean = jnp.sum(_where(mask, scaled), reduced) / (n * unit)
    # What is taken from x must be the same everywhere, but XLA computes a product anew for each
    # use, here rounded, there (in a fused multiply-add) not: a bound prevents that.
    bound = jnp.finfo(mean.dtype).max
    return mean if jnp.iscomplexobj(mean) else jnp.clip(mean, -bound, bound)


def _unit(shape: Axes, reduced: Axes, dtype: jnp.dtype) -> float | jax.Array:
    """What values are multiplied by so that no sum overflows: a power of two, no digit is lost."""
    rows = math.prod(shape[axis] for axis in reduced)
    if isinstance(rows, int):
        return 0.5 ** math.ceil(math.log2(rows))
    return 1 / jnp.asarray(rows, dtype)


@_centred.defjvp
def _centred_jvp(reduced, apart, primals, tangents):  # pyright: ignore[reportUnusedFunction]
    x, wide, mask, count = primals
    # Named here, not inside a jit: there, a policy of jax 0.12 does not see it.
    origin, offset, var = map(kept, _centred(x, wide, mask, count, reduced, apart))
    n = jnp.maximum(count, 1)
    d_offset, d_var = _tangent(x, mask, n, origin, offset, tangents[1], reduced)
    return (origin, offset, var), (jnp.zeros_like(origin), d_offset, d_var)


# With checkpoint, a backward pass keeps x itself, not a float32 copy of its deviations.
@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=6)
def _tangent(x, mask, n, origin, offset, dx, reduced):
    dx = _where(mask, dx)
    from_mean = deviations(x, origin, reduced) - jnp.expand_dims(offset, reduced)
    from_mean = _where(mask, from_mean)
    d_sum, d_squares = sums((dx, jnp.real(jnp.conj(from_mean) * dx)), reduced)
    return d_sum / n, 2 * d_squares / n


def _sample(x: jax.Array, n: jax.Array, reduced: Axes) -> jax.Array:
    """A typical value of each channel: the mean over the examples of a median of nine positions.

    Rare wild values are not the median, and a wild example weighs as one of many. Examples of
    fewer positions are read whole.
    """
    positions = reduced[1:]
    sizes = tuple(x.shape[a] for a in positions)
    if math.prod(sizes) < 9:
        return _mean(x, None, n, reduced)
    # Spread over each axis, in another order each: never along one edge, which may be padding.
    steps = ((2**axis * np.arange(9) % 9, size) for axis, size in enumerate(sizes))
    places = tuple((2 * step + 1) * size // 18 for step, size in steps)
    values = jnp.moveaxis(x, positions, range(len(sizes)))[places].astype(working_dtype(x.dtype))
    middle = _median_of_3(_median_of_3(values.reshape(3, 3, *values.shape[1:])))
    return _mean(middle, None, n / math.prod(sizes), reduced[:1])


def _median_of_3(rows: jax.Array) -> jax.Array:
    """The median over a leading axis of size 3: the largest of the smaller ones of each pair."""
    return jnp.max(jnp.minimum(rows, jnp.roll(rows, 1, 0)), 0)


def _where(mask: jax.Array | None, values: jax.Array) -> jax.Array:
    return values if mask is None else jnp.where(mask, values, 0)
