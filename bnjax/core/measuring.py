"""Count, mean and variance of each part of a batch, without cancellation at any mean."""

import dataclasses
import functools
import math

import chex
import jax
import jax.numpy as jnp
from jax import lax

from bnjax.core import banks, compat, origins
from bnjax.core.moments import Axes, Moments, deviations, kept, where, working_dtype
from bnjax.core.partition import Parts, Sharing, whole
from bnjax.core.sums import sums


def measure(
    x: chex.Array,
    axes: Axes,
    mask: chex.Array | None = None,
    bank: chex.Numeric | None = None,
    banks: int | None = None,
) -> Moments:
    """Compute the moments of `x` over all axes except the feature axes.

    It reads x once, or three times if the mean is far from zero and no better origin than a running
    mean is available, as under a mask.

    Args:
        x: values of any shape and dtype; integers and half precision are cast to float32.
        axes: the feature axes, non-negative and sorted.
        mask: bool, with x's rank (sizes 1 broadcast); only True positions count.
        bank: the bank of x, or of each example.
        banks: the number of banks, each of which has its own moments.

    Returns:
        Moments in at least float32, with the shape of the feature axes after an axis of banks, if
        there are any; zeros where no value counts.
    """
    parts = whole(jnp.asarray(x), None if mask is None else jnp.asarray(mask), axes)
    if banks is None:
        return moments_of(parts)
    sharing = Sharing(parts, banks=banks)
    bank = jnp.broadcast_to(jnp.asarray(bank, jnp.int32), x.shape[sharing.batch])
    return shared(dataclasses.replace(sharing, bank=bank))


def shared(sharing: Sharing, running: jax.Array | None = None) -> Moments:
    """The moments that examples share: of all of them, of virtual batches, or of banks."""
    if sharing.bank is None:
        return moments_of(sharing.parts, sharing.near(running))
    find = _of_banks.fun if compat.plain.value else _of_banks
    return find(sharing.parts, sharing.bank, sharing.banks)


def moments_of(parts: Parts, running: jax.Array | None = None) -> Moments:
    """The moments of each part; virtual batches may be on devices that do not communicate.

    The running mean, if any, only serves as a guess of the means.
    """
    working = working_dtype(parts.x.dtype)
    real = jnp.finfo(working).dtype
    if parts.x.size == 0:
        empty = jnp.zeros(parts.features, working)
        return Moments(jnp.zeros((), real), empty, empty, jnp.zeros(parts.features, real))
    count = _count(parts, real)
    find = _centred.fun if compat.plain.value else _centred
    return _moments(count, *find(parts, count, running))


@jax.jit
def _moments(
    count: jax.Array, origin: jax.Array, offset: jax.Array, variance: jax.Array
) -> Moments:
    finite = variance < jnp.inf  # with an infinite variance, all values would normalize to 0
    origin = jnp.where(count > 0, origin, 0)
    return Moments(count, origin, offset, jnp.where(finite, variance, jnp.nan) * count)


def _count(parts: Parts, dtype: jnp.dtype) -> jax.Array:
    """How many positions count: one number, or one per channel if the mask differs by channel."""
    shape, mask, reduced = parts.x.shape, parts.mask, parts.reduced
    if mask is None:
        return jnp.asarray(math.prod(shape[a] for a in reduced), dtype)
    unseen = math.prod(shape[a] for a in reduced if mask.shape[a] == 1)
    count = jnp.sum(mask, reduced, dtype=dtype) * unseen
    return count.reshape(()) if count.size == 1 else jnp.broadcast_to(count, parts.features)


@jax.custom_jvp
def _centred(
    parts: Parts, count: jax.Array, running: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Origin, mean minus origin, and biased variance.

    Its derivative is written out, since it is much simpler than that of the steps above: however it
    was chosen, the origin is constant, d mean = mean(dx), and
    d var = 2 mean(Re(conj(x - mean) dx)).
    """
    n, apart = jnp.maximum(count, 1), parts.group is not None
    return origins.centred(parts.x, parts.mask, n, running, parts.reduced, apart)


@_centred.defjvp
def _centred_jvp(primals, tangents):  # pyright: ignore[reportUnusedFunction]
    parts, count, running = primals
    # Named here, because a policy of jax 0.12 does not see names inside a jit.
    origin, offset, var = map(kept, _traced_once(parts, count, running))
    n, dx = jnp.maximum(count, 1), tangents[0].wide
    d_offset, d_var = _tangent(parts.x, parts.mask, n, origin, offset, dx, parts.reduced)
    return (origin, offset, var), (jnp.zeros_like(origin), d_offset, d_var)


# For all layers of the same shape.
_traced_once = jax.jit(_centred, inline=True)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _of_banks(parts: Parts, bank: jax.Array, number: int) -> Moments:
    """The moments of each bank, merged from those of its examples.

    Its derivative is that of `_centred`, by bank, so nothing of each example is kept for it.
    """
    batch = _batch(parts)
    first = jax.tree.map(lambda a: jnp.moveaxis(a, batch, 0) if a.ndim else a, moments_of(parts))
    return banks.merged(first, bank, number)


@_of_banks.defjvp
def _of_banks_jvp(number, primals, tangents):  # pyright: ignore[reportUnusedFunction]
    parts, bank = primals
    found = jax.tree.map(kept, _of_banks(parts, bank, number))
    d_offset, d_m2 = _tangent_of_banks(parts, bank, found, tangents[0].wide, number)
    zeros = jnp.zeros_like(found.count), jnp.zeros_like(found.origin)
    return found, Moments(*zeros, d_offset, d_m2)


@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=4)
def _tangent_of_banks(parts: Parts, bank, found: Moments, dx, number: int):
    x, mask, reduced, batch = parts.x, parts.mask, parts.reduced, _batch(parts)
    # The barrier, because XLA would write rows that it shares with the output: as large as x.
    rows = banks.to_examples(lax.optimization_barrier([found.origin, found.offset]), bank)
    origin, offset = (jnp.moveaxis(each, 0, batch) for each in rows)
    dx = where(mask, dx)
    from_mean = where(mask, deviations(x, origin, reduced) - jnp.expand_dims(offset, reduced))
    each = sums((dx, jnp.real(jnp.conj(from_mean) * dx)), reduced, sources=2)
    d_sum, d_squares = banks.totals([jnp.moveaxis(a, batch, 0) for a in each], bank, number)
    return d_sum / jnp.maximum(found.count, 1), 2 * d_squares


def _batch(parts: Parts) -> int:
    """The axis of the examples, each of which is a part."""
    assert parts.group is not None, "partition.apart"
    return parts.group


# With checkpoint, the backward pass keeps x itself rather than a float32 copy of its deviations.
@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=6)
def _tangent(x, mask, n, origin, offset, dx, reduced: Axes):
    dx = where(mask, dx)
    from_mean = where(mask, deviations(x, origin, reduced) - jnp.expand_dims(offset, reduced))
    d_sum, d_squares = sums((dx, jnp.real(jnp.conj(from_mean) * dx)), reduced, sources=2)
    return d_sum / n, 2 * d_squares / n
