"""Choose the origin of a batch's sums so that no digits cancel.

`var = mean(|x - origin|^2) - |mean - origin|^2` is exact if the origin is within about a standard
deviation of the mean. Each function here takes it from elsewhere, and returns origin, mean minus
origin, and biased variance:

- `_from_typical`: a median of 27 values, or of 9. It costs no pass over x and is never far, but the
  sums must wait for x, and if a batch is split over devices, it costs a message.
- `_from_chunks`: a value of each chunk. It costs no pass and is never far. If a batch is split, it
  needs one message, which grows with the number of devices.
- `_from_running`: the running mean, known before x is. It is close once training has settled; in
  the first steps, and whenever it is far, x is read again, around the mean itself.
- `_from_mean`: the mean. Always accurate, always one more pass.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from bnjax.core import compat, sharding
from bnjax.core.moments import Axes, abs2, deviations, where, working_dtype
from bnjax.core.sums import at_once, in_chunks, sums

# Limits of the squared distance from mean to origin, over the variance: up to there, sums lose at
# most a factor of 1 + _NEAR in precision. Rounding to half precision has already cost more.
_NEAR, _NEAR_HALF = 3, 16
_FEW = 32  # devices
_HUGE = 2.0**64  # squares of larger numbers overflow in float32

Centred = tuple[jax.Array, jax.Array, jax.Array]
Chosen = Callable[[jax.Array, Axes], jax.Array]  # some values of each channel


# Under jit, it is traced and lowered once for all layers of the same shape.
@functools.partial(jax.jit, static_argnums=(4, 5))
def centred(
    x: jax.Array,
    mask: jax.Array | None,
    n: jax.Array,
    running: jax.Array | None,
    reduced: Axes,
    apart: bool,
) -> Centred:
    """Origin, mean minus origin, and biased variance of n values, from the cheapest origin.

    With `apart`, channels may be on devices that must not communicate, so nothing is decided
    jointly.
    """
    known = all(isinstance(size, int) for size in x.shape)
    if mask is None and known and all(x.shape[axis] == 1 for axis in reduced):
        origin = lax.squeeze(x, reduced).astype(working_dtype(x.dtype))
        return origin, jnp.zeros_like(origin), jnp.zeros_like(jnp.real(origin))
    if compat.plain.value:
        mean = jnp.sum(where(mask, x.astype(working_dtype(x.dtype))), reduced) / n
        mean = lax.stop_gradient(mean)
        return _put_right(mean, *_around(mean, x, mask, n, reduced))
    if apart and (mask is not None or not known):
        return _from_mean(x, mask, n, reduced)
    if apart:
        return _from_typical(x, n, reduced, _nine)
    if running is None:
        running = jnp.zeros([x.shape[a] for a in range(x.ndim) if a not in reduced])
    origin = lax.stop_gradient(jnp.where(jnp.isfinite(running), running, 0))
    origin = origin.astype(working_dtype(x.dtype))
    if mask is not None or not known:
        return _from_running(x, mask, n, origin, reduced)
    arrays = sharding.varying_alike((x, n, origin))
    return tuple(_by_platform(*arrays, reduced=reduced))


def _on_cpu(
    x: jax.Array, n: jax.Array, origin: jax.Array, *, reduced: Axes, devices: int
) -> Centred:
    if devices == 1:
        return _from_typical(x, n, reduced, _twenty_seven)
    return _from_running(x, None, n, origin, reduced)


def _on_gpu(
    x: jax.Array, n: jax.Array, origin: jax.Array, *, reduced: Axes, devices: int
) -> Centred:
    if devices <= _FEW:
        return _from_chunks(x, n, reduced)
    return _from_running(x, None, n, origin, reduced)


def _elsewhere(
    x: jax.Array, n: jax.Array, origin: jax.Array, *, reduced: Axes, devices: int
) -> Centred:
    return _from_running(x, None, n, origin, reduced)


def _types(x: jax.Array, n: jax.Array, origin: jax.Array, *, reduced: Axes) -> Centred:
    mean = lax.reduce_sum(x.astype(origin.dtype), reduced)
    return mean, mean, jnp.real(mean)


_by_platform = compat.by_platform(
    "centred", _elsewhere, _types, cpu=_on_cpu, cuda=_on_gpu, rocm=_on_gpu
)


def _from_typical(x: jax.Array, n: jax.Array, reduced: Axes, chosen: Chosen) -> Centred:
    """From a median of the values that `chosen` returns.

    Rare outliers do not affect the median.
    """
    middle = chosen(x, reduced).astype(working_dtype(x.dtype))
    while middle.shape[0] > 3:
        middle = _median_of_3(middle)
    # A matrix product, because XLA would recompute a plain sum for each value of x.
    weights = np.array([0.25, 0.5, 0.25], middle.dtype)
    origin = jnp.tensordot(weights, middle, 1, precision="highest")
    # Without the barrier, XLA writes a float32 copy of half-precision x, shared with the output.
    x, origin = lax.optimization_barrier((x, origin))
    offset, var = _around(origin, x, None, n, reduced)
    return origin, offset, jnp.maximum(var, 0)


def _twenty_seven(x: jax.Array, reduced: Axes) -> jax.Array:
    """27 values of each channel, in one gather."""
    places: list[Any] = [slice(None)] * x.ndim
    for axis, place in _places(x, reduced, 27, 10).items():
        places[axis] = place
    return jnp.moveaxis(x[tuple(places)], reduced[0] * _together(reduced), 0)


def _nine(x: jax.Array, reduced: Axes) -> jax.Array:
    """Three medians of three values of each channel, in slices: faster for many parts."""
    places = _places(x, reduced, 9, 4)

    def value(number: int) -> jax.Array:
        start, size = [0] * x.ndim, list(x.shape)
        for axis, place in places.items():
            start[axis], size[axis] = int(place[number]), 1
        end = [a + b for a, b in zip(start, size, strict=True)]
        return lax.squeeze(lax.slice(x, start, end), reduced)

    values = [value(number) for number in range(9)]
    return jnp.stack([_median(*values[third::3]) for third in range(3)])


def _places(x: jax.Array, reduced: Axes, some: int, stride: int) -> dict[int, np.ndarray]:
    """Indices of `some` values along each axis.

    They visit each axis in a different order, so no example, row or column contributes more than a
    few.
    """
    return {
        axis: (2 * (stride**order * np.arange(some) % some) + 1) * x.shape[axis] // (2 * some)
        for order, axis in enumerate(reduced)
    }


def _together(axes: Axes) -> bool:
    """Whether axes are adjacent; indexing keeps adjacent axes in place, and moves others first."""
    return axes == tuple(range(axes[0], axes[-1] + 1))


def _median_of_3(rows: jax.Array) -> jax.Array:
    """The median of the three thirds of the first axis."""
    return _median(*jnp.split(rows, 3))


def _median(a: jax.Array, b: jax.Array, c: jax.Array) -> jax.Array:
    return jnp.maximum(jnp.minimum(a, b), jnp.minimum(jnp.maximum(a, b), c))


def _from_chunks(x: jax.Array, n: jax.Array, reduced: Axes) -> Centred:
    """Sum each chunk of x around a median of three of its values, and merge the chunks."""
    values, inner = in_chunks(x, reduced, _FEW)
    chunks, size = values.shape[0], math.prod(values.shape[axis] for axis in inner)

    def value(third: int) -> jax.Array:
        # From one row, if there are rows: a GPU reads at least 32 bytes at a time.
        start = [n // 2 if axis in inner else 0 for axis, n in enumerate(values.shape)]
        if inner:
            start[inner[-1]] = third * values.shape[inner[-1]] // 3
        end = [start[a] + 1 if a in inner else n for a, n in enumerate(values.shape)]
        return lax.squeeze(lax.slice(values, start, end), inner)

    origin = _median(*map(value, range(3))).astype(working_dtype(x.dtype))
    distance = deviations(values, origin, inner)
    total, squares = at_once((distance, abs2(distance)), inner)
    # Always `size`, but computed from another array, because XLA would write a constant to memory.
    count = jnp.minimum(jnp.abs(origin) + size, size)
    if chunks == 1:
        origin, total, squares = origin[0], total[0], squares[0]
    else:
        parts = count, origin, total, squares
        zeros = tuple(np.zeros((), part.dtype) for part in parts)
        _, origin, total, squares = lax.reduce(parts, zeros, _merged, (0,))
    offset = total * (1 / n)
    return origin, offset, jnp.maximum(squares * (1 / n) - abs2(offset), 0)


Sums = tuple[jax.Array, jax.Array, jax.Array, jax.Array]


def _merged(a: Sums, b: Sums) -> Sums:
    """Merge count, origin, and sum and sum of squares around it (Chan et al. 1983).

    The new origin is the mean of the first nonempty set, so squares never grow.
    """
    (count_a, origin_a, total_a, squares_a), (count_b, origin_b, total_b, squares_b) = a, b
    count = count_a + count_b
    mean_a, mean_b = (
        total / jnp.maximum(n, 1) for n, total, *_ in ((count_a, total_a), (count_b, total_b))
    )
    some = count_a > 0
    origin, mean = jnp.where(some, origin_a, origin_b), jnp.where(some, mean_a, mean_b)
    apart = jnp.where(some & (count_b > 0), (origin_b - origin_a) + (mean_b - mean_a), 0)
    share = count_b / jnp.maximum(count, 1)
    new = origin + mean
    offset = (origin - new) + mean + apart * share
    m2 = squares_a - abs2(mean_a) * count_a + squares_b - abs2(mean_b) * count_b
    m2 = m2 + abs2(apart) * count_a * share
    return count, new, offset * count, m2 + abs2(offset) * count


def _from_running(
    x: jax.Array, mask: jax.Array | None, n: jax.Array, origin: jax.Array, reduced: Axes
) -> Centred:
    """From the running mean; channels that are far from it are summed again around their mean."""
    origin, _ = sharding.varying_alike((origin, x))
    offset, var = _around(origin, x, mask, n, reduced)
    bound = _NEAR if x.dtype == origin.dtype else _NEAR_HALF
    # An offset of 0 with variance 0 is a channel that has always been constant.
    near = ((abs2(offset) < bound * var) | (offset == 0)) & (jnp.abs(var) < jnp.inf)

    def again() -> Centred:
        # Per channel, so that no result depends on other channels.
        nearer = jnp.where(near, origin, _mean(x, mask, n, reduced))
        return _put_right(nearer, *_around(nearer, x, mask, n, reduced))

    return lax.cond(jnp.all(near), lambda: (origin, offset, var), again)


def _from_mean(x: jax.Array, mask: jax.Array | None, n: jax.Array, reduced: Axes) -> Centred:
    """From the mean itself."""
    mean = _mean(x, mask, n, reduced)
    return _put_right(mean, *_around(mean, x, mask, n, reduced))


def _mean(x: jax.Array, mask: jax.Array | None, n: jax.Array, reduced: Axes) -> jax.Array:
    """The mean, computed without overflow."""
    unit = _unit(x.shape, reduced, n.dtype)
    scaled = x.astype(working_dtype(x.dtype)) * unit
    (total,) = sums([where(mask, scaled)], reduced)
    mean = total / (n * unit)
    # The same mean must be subtracted everywhere, but XLA recomputes a product for each use, either
    # rounded or, in a fused multiply-add, not. Clipping prevents that.
    bound = jnp.finfo(mean.dtype).max
    return mean if jnp.iscomplexobj(mean) else jnp.clip(mean, -bound, bound)


def _around(
    origin: jax.Array, x: jax.Array, mask: jax.Array | None, n: jax.Array, reduced: Axes
) -> tuple[jax.Array, jax.Array]:
    """Mean minus origin, and variance, in one pass."""
    huge = jnp.abs(origin) > _HUGE  # even its squared rounding errors overflow
    by, back = jnp.where(huge, 1 / _HUGE, 1.0), jnp.where(huge, _HUGE, 1.0)
    distance = where(mask, deviations(x, origin, reduced))
    squares = abs2(distance * jnp.expand_dims(by, reduced))
    total, squares = sums((distance, squares), reduced)
    offset = total * (1 / n)
    return offset, (squares * (1 / n) - abs2(offset * by)) * back * back


def _put_right(origin: jax.Array, offset: jax.Array, var: jax.Array) -> Centred:
    """Set offset and `var` of constant channels, which are rounding errors of the origin, to 0."""
    constant = var <= abs2(offset) * 2.0**-18
    origin = jnp.where(constant, origin + offset, origin)
    return origin, jnp.where(constant, 0, offset), jnp.where(constant, 0, var)


def _unit(shape: Axes, reduced: Axes, dtype: jnp.dtype) -> float | jax.Array:
    """A factor that keeps sums from overflowing; as a power of two, it loses no digits."""
    rows = math.prod(shape[axis] for axis in reduced)
    if isinstance(rows, int):
        return 0.5 ** math.ceil(math.log2(rows))
    return 1 / jnp.asarray(rows, dtype)
