"""Several sums over an array in one pass, and their transpose.

The sums of a batch norm come in pairs: of x and its squares, of a cotangent and its product with x.
Each pair costs one pass over memory. `sums` and `spread` are linear and transposes of each other,
so forward mode, reverse mode and `vmap` work to any order.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from bnjax.core import compat
from bnjax.core.sharding import varying_alike

Axes = tuple[int, ...]

# XLA unrolls the inner loop over this many terms, and vectorizes the one around it. A CPU reads
# fewer at once fast if they come from two arrays, or are _FAR apart.
_TERMS, _FEWER = 16, 8
_LONG, _FAR = 512, 2**14  # adjacent values
_SMALL = 2**12
_MANY = 8  # values for each number that is repeated
_CHUNKS, _ROWS = 512, 128  # at most, and at least: a GPU block sums one chunk or more


def sums(values: Sequence[jax.Array], reduced: Axes, sources: int = 1) -> tuple[jax.Array, ...]:
    """Sum each of several arrays of the same shape over the axes `reduced`.

    `sources` is the number of arrays in memory that they are computed from.
    """
    if compat.plain.value:
        return tuple(_each_by_itself(*values, reduced=reduced))
    return tuple(_sums.bind(*values, reduced=tuple(reduced), sources=sources))


def spread(vectors: Sequence[jax.Array], shape: Axes, reduced: Axes) -> tuple[jax.Array, ...]:
    """Broadcast each of several arrays along the axes `reduced` of `shape`.

    If any varies between devices, all are marked as varying, so that devices sum the gradients of
    a vector rather than those of its copies.
    """
    vectors = varying_alike(vectors)
    if compat.plain.value:
        return tuple(_repeated(*vectors, shape=shape, reduced=reduced))
    return tuple(_spread.bind(*vectors, shape=tuple(shape), reduced=tuple(reduced)))


def _each_by_itself(
    *values: jax.Array, reduced: Axes, sources: int = 1, devices: int = 1
) -> list[jax.Array]:
    return [lax.reduce_sum(value, reduced) for value in values]


def _repeated(*vectors: jax.Array, shape: Axes, reduced: Axes, devices: int = 1) -> list[jax.Array]:
    return [jnp.broadcast_to(jnp.expand_dims(vector, reduced), shape) for vector in vectors]


def _settled_and_repeated(
    *vectors: jax.Array, shape: Axes, reduced: Axes, devices: int
) -> list[jax.Array]:
    """For CPUs: compute the vectors once, before the loop over the values.

    XLA moves cheap arithmetic into that loop and repeats it for each value, but nothing that it
    takes to be expensive, such as this division by 1.
    """
    dtypes = {vector.dtype for vector in vectors}
    known = all(isinstance(size, int) for size in shape)
    alike = len(dtypes) == 1 and not jnp.iscomplexobj(vectors[0])
    if known and alike and math.prod(shape) >= _MANY * vectors[0].size:
        ones = [jnp.minimum(jnp.abs(vector) + 1, 1) for vector in vectors]
        vectors = tuple(jnp.stack(vectors) / jnp.stack(ones))
    return _repeated(*vectors, shape=shape, reduced=reduced)


def _in_one_reading(
    *arrays: jax.Array, reduced: Axes, sources: int, devices: int
) -> Sequence[jax.Array]:
    """For CPUs: sum all arrays in a short inner loop along one axis, then the rest of each alone.

    XLA has fast and exact kernels for a single sum of a large array. Its loop over several arrays
    is not vectorized unless the reduced axis is short enough to be unrolled, and over a small array
    it adds values one by one. So the reduced axes are shortened repeatedly.
    """
    values: Sequence[jax.Array] = arrays
    shape = values[0].shape
    known = all(isinstance(size, int) for size in shape)
    if known and all(shape[axis] == 1 for axis in reduced):
        return [lax.squeeze(value, reduced) for value in values]
    if not known or (len(values) == 1 and _large(shape, reduced)):
        return _each_by_itself(*values, reduced=reduced)
    if len(values) == 1:  # XLA would fuse the sums of sums of one array, but not those of two
        pair = values[0], -values[0]
        plus, minus = _in_one_reading(*pair, reduced=reduced, sources=sources, devices=devices)
        return [plus / 2 - minus / 2]
    most = _TERMS if sources == 1 else _FEWER
    while math.prod(shape[axis] for axis in reduced) > _TERMS:
        axis, parts, terms = _division(shape, reduced, most, devices)
        if terms == 1:
            return _each_by_itself(*values, reduced=reduced)
        values = at_once([_split(value, axis, parts, terms) for value in values], (axis + 1,))
        shape = values[0].shape
        if _large(shape, reduced):
            return _each_by_itself(*values, reduced=reduced)
    # Devices all-reduce plain sums, but would gather the inputs of a joint one.
    return at_once(values, reduced) if devices == 1 else _each_by_itself(*values, reduced=reduced)


def _large(shape: Axes, reduced: Axes) -> bool:
    """Whether XLA has a kernel for a single sum of this shape."""
    rows = math.prod(shape[axis] for axis in reduced)
    return math.prod(shape) > _SMALL and math.prod(shape) > rows


def _in_chunks(
    *values: jax.Array, reduced: Axes, sources: int, devices: int
) -> Sequence[jax.Array]:
    """For GPUs: sum each chunk, then all the chunks' sums at once.

    XLA gives a sum over up to 4,096 rows to a few blocks only and writes the summands first, and it
    makes two kernels of two small sums of sums.
    """
    shape = values[0].shape
    known = all(isinstance(size, int) for size in shape)
    some = len(values) > 1 and known and math.prod(shape) > 0 and reduced
    if not some or shape[reduced[0]] % devices:
        return _each_by_itself(*values, reduced=reduced)
    chunks, inner = zip(*(in_chunks(value, reduced, devices) for value in values), strict=True)
    parts = at_once(chunks, inner[0])
    if devices == 1:
        return at_once(parts, (0,))
    # Plain sums, which devices all-reduce; the barrier keeps XLA from fusing the two steps.
    return _each_by_itself(*lax.optimization_barrier(parts), reduced=(0,))


def in_chunks(value: jax.Array, reduced: Axes, devices: int) -> tuple[jax.Array, Axes]:
    """The value with a leading axis of chunks, and the axes to sum over in each chunk.

    A chunk is an example, a part of one, or several. If a batch is split over `devices`, or over a
    divisor of it, no chunk spans two devices.
    """
    shape = value.shape
    if reduced != tuple(range(len(reduced))):  # channels first
        return value if reduced[0] == 0 else jnp.moveaxis(value, reduced[0], 0), tuple(reduced[1:])
    batch, rows = shape[0], math.prod(shape[1 : len(reduced)])
    most = min(_CHUNKS, batch * rows // _ROWS)
    least = math.gcd(batch, devices)  # divides the number of chunks
    if batch >= most:
        chunks = max(k for k in range(least, max(most, least) + 1, least) if batch % k == 0)
    else:
        chunks = batch * max(k for k in range(1, most // batch + 1) if rows % k == 0)
    return value.reshape(chunks, batch * rows // chunks, *shape[len(reduced) :]), (1,)


def at_once(values: Sequence[jax.Array], reduced: Axes) -> list[jax.Array]:
    """Sum all arrays in one XLA loop."""
    zeros = tuple(np.zeros((), value.dtype) for value in values)
    return list(lax.reduce(tuple(values), zeros, _add, tuple(reduced)))


def _add(a: tuple[jax.Array, ...], b: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    return tuple(map(lax.add, a, b))


def _division(shape: Axes, reduced: Axes, most: int, devices: int) -> tuple[int, int, int]:
    """The axis to sum along, the number of its parts, and the number of terms per sum."""

    def adjacent(axis: int) -> int:
        return math.prod(shape[axis + 1 :])

    def part(axis: int) -> int:
        # An axis may be split over the devices: then its parts can be, too.
        return shape[axis] // (devices if shape[axis] % devices == 0 else 1)

    def terms(axis: int) -> int:
        limit = most if adjacent(axis) < _FAR else _FEWER
        return max((k for k in range(1, limit + 1) if part(axis) % k == 0), default=1)

    order = (*reduced[1:], reduced[0])  # the batch axis last
    good = [axis for axis in order if terms(axis) >= most // 2]
    # The loop around the terms is vectorized over the adjacent values.
    long = (axis for axis in good if adjacent(axis) >= _LONG)
    axis = next(long, good[0] if good else max(order, key=terms))
    if terms(axis) > 1:
        return axis, shape[axis] // part(axis), terms(axis)
    axis = max(order, key=part)  # nothing divides it, so it must be padded
    fewest = min(range(most, most // 2, -1), key=lambda k: -part(axis) % k)
    return axis, shape[axis] // part(axis), fewest if part(axis) > 1 else 1


def _split(value: jax.Array, axis: int, parts: int, terms: int) -> jax.Array:
    """Split the axis into (..., terms), with zero padding at the end of each part."""
    before, size, after = value.shape[:axis], value.shape[axis], value.shape[axis + 1 :]
    if fill := -(size // parts) % terms:
        value = value.reshape(*before, parts, size // parts, *after)
        widths = [(0, fill * (a == axis + 1)) for a in range(value.ndim)]
        value, size = jnp.pad(value, widths), size + fill * parts
    return value.reshape(*before, size // terms, terms, *after)


_sums = compat.primitive(
    "sums", _each_by_itself, cpu=_in_one_reading, cuda=_in_chunks, rocm=_in_chunks
)
_spread = compat.primitive("spread", _repeated, cpu=_settled_and_repeated)
compat.transposed(
    _sums,
    lambda cotangents, shape, reduced, sources: spread(cotangents, shape, reduced),
    lambda values, reduced, sources: sums(values, _shifted(reduced), sources),
)
compat.transposed(
    _spread,
    lambda cotangents, _, shape, reduced: sums(cotangents, reduced, sources=2),
    lambda vectors, shape, reduced: spread(
        vectors, (vectors[0].shape[0], *shape), _shifted(reduced)
    ),
)


def _shifted(axes: Axes) -> Axes:
    return tuple(axis + 1 for axis in axes)
