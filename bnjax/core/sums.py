"""Several sums over an array in one reading of it, and their transpose.

The sums of a batch norm come in pairs: of x and of its squares, of a cotangent and of its product
with x. Each pair costs one pass over memory. Forward mode, reverse mode and `vmap` know both
directions, at any order: `sums` and `spread` are linear, and each is the other's transpose.
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

# XLA unrolls the inner loop over so many terms, and vectorizes the one around it.
_TERMS = 16
_LONG = 512  # values side by side
_SMALL = 2**12
_CHUNKS, _ROWS = 512, 128  # at most and at least: a GPU sums one or more in a block


def sums(values: Sequence[jax.Array], reduced: Axes) -> tuple[jax.Array, ...]:
    """The sum of each of several arrays of one shape over the axes `reduced`."""
    if compat.plain.value:
        return tuple(_each_by_itself(*values, reduced=reduced))
    return tuple(_sums.bind(*values, reduced=tuple(reduced)))


def spread(vectors: Sequence[jax.Array], shape: Axes, reduced: Axes) -> tuple[jax.Array, ...]:
    """Each of several arrays, repeated along the axes `reduced` of `shape`.

    Those that are the same on all devices are taken as not, if another one differs: so that devices
    add up the gradients of a vector, not those of its copies.
    """
    vectors = varying_alike(vectors)
    if compat.plain.value:
        return tuple(_repeated(*vectors, shape=shape, reduced=reduced))
    return tuple(_spread.bind(*vectors, shape=tuple(shape), reduced=tuple(reduced)))


def _each_by_itself(*values: jax.Array, reduced: Axes) -> list[jax.Array]:
    return [jnp.sum(value, reduced) for value in values]


def _repeated(*vectors: jax.Array, shape: Axes, reduced: Axes) -> list[jax.Array]:
    return [jnp.broadcast_to(jnp.expand_dims(vector, reduced), shape) for vector in vectors]


def _in_one_reading(*arrays: jax.Array, reduced: Axes, devices: int) -> Sequence[jax.Array]:
    """For CPUs: all in a short inner loop along one axis, then what is left of each by itself.

    XLA has fast, exact and ready kernels for one sum of one large array. Its own loop over several
    is not vectorized, unless the reduced axis is so short that it is unrolled, and over a small
    array it adds one value after the other: that is shortened again and again.
    """
    values: Sequence[jax.Array] = arrays
    shape = values[0].shape
    known = all(isinstance(size, int) for size in shape)
    if known and all(shape[axis] == 1 for axis in reduced):
        return [lax.squeeze(value, reduced) for value in values]
    if not known or (len(values) == 1 and _large(shape, reduced)):
        return _each_by_itself(*values, reduced=reduced)
    if len(values) == 1:  # XLA would make one sum of its sums of sums: not if there are two arrays
        pair = values[0], -values[0]
        plus, minus = _in_one_reading(*pair, reduced=reduced, devices=devices)
        return [plus / 2 - minus / 2]
    while math.prod(shape[axis] for axis in reduced) > _TERMS:
        axis, parts, terms = _division(shape, reduced, devices)
        if terms == 1:
            return _each_by_itself(*values, reduced=reduced)
        values = at_once([_split(value, axis, parts, terms) for value in values], (axis + 1,))
        shape = values[0].shape
        if _large(shape, reduced):
            return _each_by_itself(*values, reduced=reduced)
    # Devices add up plain sums, but gather what is to be added at once.
    return at_once(values, reduced) if devices == 1 else _each_by_itself(*values, reduced=reduced)


def _large(shape: Axes, reduced: Axes) -> bool:
    """Whether XLA has a kernel for one sum of it."""
    rows = math.prod(shape[axis] for axis in reduced)
    return math.prod(shape) > _SMALL and math.prod(shape) > rows


def _in_chunks(*values: jax.Array, reduced: Axes, devices: int) -> Sequence[jax.Array]:
    """For GPUs: those of each chunk, then all of these at once.

    XLA leaves a sum over up to 4,096 rows to a few blocks, and writes what is summed first; and two
    small sums of sums are two kernels.
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
    # As plain sums, which devices add up; with a barrier, or XLA makes one sum of the two.
    return _each_by_itself(*lax.optimization_barrier(parts), reduced=(0,))


def in_chunks(value: jax.Array, reduced: Axes, devices: int) -> tuple[jax.Array, Axes]:
    """With an axis of chunks in front, and the axes of each chunk that are summed over.

    A chunk is an example, or part of one, or several. Where a batch is split over so many devices,
    or over a divisor of them, no chunk is on two.
    """
    shape = value.shape
    if reduced != tuple(range(len(reduced))):  # channels first
        return value if reduced[0] == 0 else jnp.moveaxis(value, reduced[0], 0), tuple(reduced[1:])
    batch, rows = shape[0], math.prod(shape[1 : len(reduced)])
    most = min(_CHUNKS, batch * rows // _ROWS)
    least = math.gcd(batch, devices)  # chunks are a multiple of it
    if batch >= most:
        chunks = max(k for k in range(least, max(most, least) + 1, least) if batch % k == 0)
    else:
        chunks = batch * max(k for k in range(1, most // batch + 1) if rows % k == 0)
    return value.reshape(chunks, batch * rows // chunks, *shape[len(reduced) :]), (1,)


def at_once(values: Sequence[jax.Array], reduced: Axes) -> list[jax.Array]:
    """The sums of all of them in one loop, as XLA makes it."""
    zeros = tuple(np.zeros((), value.dtype) for value in values)
    return list(lax.reduce(tuple(values), zeros, _add, tuple(reduced)))


def _add(a: tuple[jax.Array, ...], b: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    return tuple(map(lax.add, a, b))


def _division(shape: Axes, reduced: Axes, devices: int) -> tuple[int, int, int]:
    """Along which axis, in how many parts by itself, and how many terms are summed."""

    def part(axis: int) -> int:
        # An axis may be split over the devices: then its parts can be, too.
        return shape[axis] // (devices if shape[axis] % devices == 0 else 1)

    def terms(axis: int) -> int:
        return max((k for k in range(1, _TERMS + 1) if part(axis) % k == 0), default=1)

    def long(axis: int) -> bool:  # what the loop around the terms is vectorized over
        return math.prod(shape[axis + 1 :]) >= _LONG

    order = (*reduced[1:], reduced[0])  # the batch last
    good = [axis for axis in order if terms(axis) >= _TERMS // 2]
    axis = next(filter(long, good), good[0] if good else max(order, key=terms))
    if terms(axis) > 1:
        return axis, shape[axis] // part(axis), terms(axis)
    axis = max(order, key=part)  # no number divides it: it must be filled up
    fewest = min(range(_TERMS, _TERMS // 2, -1), key=lambda k: -part(axis) % k)
    return axis, shape[axis] // part(axis), fewest if part(axis) > 1 else 1


def _split(value: jax.Array, axis: int, parts: int, terms: int) -> jax.Array:
    """The axis as (..., terms), filled up with zeros at the end of each part."""
    before, size, after = value.shape[:axis], value.shape[axis], value.shape[axis + 1 :]
    if fill := -(size // parts) % terms:
        value = value.reshape(*before, parts, size // parts, *after)
        widths = [(0, fill * (a == axis + 1)) for a in range(value.ndim)]
        value, size = jnp.pad(value, widths), size + fill * parts
    return value.reshape(*before, size // terms, terms, *after)


_sums = compat.linear("sums", _each_by_itself, on_cpu=_in_one_reading, on_gpu=_in_chunks)
_spread = compat.linear("spread", _repeated)
compat.transposed(
    _sums,
    lambda cotangents, shape, reduced: spread(cotangents, shape, reduced),
    lambda values, reduced: sums(values, _shifted(reduced)),
)
compat.transposed(
    _spread,
    lambda cotangents, _, shape, reduced: sums(cotangents, reduced),
    lambda vectors, shape, reduced: spread(
        vectors, (vectors[0].shape[0], *shape), _shifted(reduced)
    ),
)


def _shifted(axes: Axes) -> Axes:
    return tuple(axis + 1 for axis in axes)
