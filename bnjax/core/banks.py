"""Banks: several sets of statistics in one layer, and which examples share which.

Statistics of K banks are arrays of K rows. Each example of a batch is measured by itself, and those
of one bank are merged: one reading of x for all banks, whatever their number.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from bnjax.core import compat
from bnjax.core.moments import Moments, abs2
from bnjax.core.sharding import varying_alike

Bank = Any  # an int, or int32, () or (N,)
_FEW = 16  # banks: up to there, sums by comparison are fast
_CHUNK = 256


def by_example(bank: Bank | None) -> bool:
    """Whether each example has a bank of its own."""
    return jnp.ndim(bank) == 1 if bank is not None else False


def held(
    batch_stats: Mapping[str, jax.Array],
    params: Mapping[str, jax.Array],
    bank: Bank | None,
    banks: int | None,
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Statistics and affine map of one bank; rows of all, where each example has its own."""
    if banks is None or bank is None:
        return dict(batch_stats), dict(params)

    rows = functools.partial(row, bank=bank)
    stats = {name: rows(value) for name, value in batch_stats.items()}
    learned = {key: params[key] for key in ("scale", "bias") if key in params}
    for key, value in learned.items():
        if value.ndim == batch_stats["mean"].ndim:  # own ones
            learned[key] = rows(value)
        if f"bank_{key}" in params:
            learned[key] = value + rows(params[f"bank_{key}"])
    if not (by_example(bank) or isinstance(bank, int)):
        learned["bias"] = learned.get("bias", 0) + nowhere(bank, banks)
    return stats, learned


def row(values: Any, bank: Bank | None) -> Any:
    """Those of one bank; of all, where each example has its own, or there is just one."""
    if values is None or bank is None or by_example(bank):
        return values
    return lax.dynamic_index_in_dim(values, bank, keepdims=False)


def put(
    batch_stats: Mapping[str, jax.Array], bank: Bank | None, moved: Mapping[str, jax.Array]
) -> dict[str, jax.Array]:
    """The statistics of all banks after those of one have moved; of none if there is no such."""
    if bank is None or by_example(bank):
        return dict(moved)
    known = len(batch_stats["mean"]) if batch_stats else 0
    place = bank if isinstance(bank, int) else jnp.where(is_there(bank, known), bank, known)
    return {
        name: old.astype(moved[name].dtype).at[place].set(moved[name], mode="drop")
        for name, old in batch_stats.items()
    }


def nowhere(bank: jax.Array, banks: int) -> jax.Array:
    """NaN for each number that is no bank, 0 for others: what is added to an output."""
    return jnp.where(is_there(bank, banks), 0.0, jnp.nan)


def is_there(bank: jax.Array, banks: int) -> jax.Array:
    """Whether there is such a bank."""
    return (bank >= 0) & (bank < banks)


def to_examples(values: jax.Array, bank: jax.Array) -> jax.Array:
    """For each example the row of its bank, (N, ...) of (K, ...); zeros where there is no such."""
    bank, values = varying_alike((bank, values))
    if compat.plain.value:
        return _rows(bank, values, banks=values.shape[0])[0]
    return _to_examples.bind(bank, values, banks=values.shape[0])[0]


def totals(values: jax.Array, bank: jax.Array, banks: int) -> jax.Array:
    """For each bank the sum over its examples, (K, ...) of (N, ...)."""
    bank, values = varying_alike((bank, values))
    if compat.plain.value:
        return _by_comparison(bank, values, banks=banks)[0]
    return _totals.bind(bank, values, banks=banks)[0]


def _rows(bank: jax.Array, values: jax.Array, banks: int) -> list[jax.Array]:
    there = _beside(is_there(bank, banks), values)
    if not values.size:
        return [jnp.zeros((*bank.shape, *values.shape[1:]), values.dtype)]
    return [jnp.where(there, jnp.take(values, bank, 0, mode="clip"), 0)]


def _by_comparison(bank: jax.Array, values: jax.Array, banks: int) -> list[jax.Array]:
    """It fuses with what the values come from, and is a plain sum for arrays that are split."""
    if banks > _FEW:
        return _by_place(bank, values, banks, devices=1)
    index = _beside(bank, values)
    return [jnp.stack([jnp.sum(jnp.where(index == n, values, 0), 0) for n in range(banks)])]


def _by_place(bank: jax.Array, values: jax.Array, banks: int, devices: int) -> list[jax.Array]:
    """In one reading, whatever the number of banks: each example is added where its bank is."""
    if devices > 1 and banks <= _FEW:
        return _by_comparison(bank, values, banks)
    size = bank.shape[0]
    known = isinstance(size, int)
    # A few at a time: of thousands, one after the other, the sum would be less exact.
    chunks = -(-size // _CHUNK) if known else 1
    place = jnp.where(is_there(bank, banks), bank, chunks * banks)
    if chunks > 1:
        place = place + np.arange(size, dtype=np.int32) // _CHUNK * banks
    found = jax.ops.segment_sum(values, place, chunks * banks)
    return [found.reshape(chunks, banks, *values.shape[1:]).sum(0) if chunks > 1 else found]


def _beside(index: jax.Array, values: jax.Array) -> jax.Array:
    return index.reshape(*index.shape, *(1,) * (values.ndim - 1))


def _batched(
    made: compat.Primitive, arrays: Sequence[Any], dims: Sequence[Any], banks: int
) -> tuple[jax.Array, int]:
    """Several calls at once: those of one index side by side, others as one call of more banks."""
    bank, values = arrays
    if dims[0] is None:
        return made.bind(bank, jnp.moveaxis(values, dims[1], 1), banks=banks)[0], 1
    bank = jnp.moveaxis(bank, dims[0], 0)
    size = bank.shape[0]
    if dims[1] is None:
        values = jnp.broadcast_to(values, (size, *values.shape))
    else:
        values = jnp.moveaxis(values, dims[1], 0)
    first = banks * np.arange(size, dtype=np.int32)[:, None]
    bank = jnp.where(is_there(bank, banks), bank + first, -1).reshape(-1)
    values = values.reshape(-1, *values.shape[2:])
    found = made.bind(bank, values, banks=banks * size)[0]
    return found.reshape(size, -1, *found.shape[1:]), 0


_to_examples = compat.linear("rows_of_banks", _rows)
_totals = compat.linear("totals_of_banks", _by_comparison, on_cpu=_by_place)
compat.each_others_transpose(_to_examples, _totals, _batched)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def merged(each: Moments, bank: jax.Array, banks: int) -> Moments:
    """The moments of each bank from those of the examples, along the first axis."""
    return _merged(each, bank, banks)


@functools.partial(jax.jit, static_argnums=2)
def _merged(each: Moments, bank: jax.Array, banks: int) -> Moments:
    origin, count = each.origin, _count_of_each(each, bank)
    if not origin.size:
        zeros = (jnp.zeros((banks, *part.shape[1:]), part.dtype) for part in (origin, each.m2))
        origin, m2 = zeros
        return Moments(jnp.zeros((banks, *count.shape[1:]), m2.dtype), origin, origin, m2)
    near = _nearby(origin, count, bank, banks)
    mean = (origin - to_examples(near, bank)) + each.offset
    total = totals(count, bank, banks)
    offset = totals(jnp.where(count > 0, count * mean, 0), bank, banks) / jnp.maximum(total, 1)
    between = abs2(mean - to_examples(offset, bank)) * count
    m2 = totals(jnp.where(count > 0, each.m2 + between, 0), bank, banks)
    return Moments(total, jnp.where(total > 0, near, 0), offset, m2)


@merged.defjvp
def _merged_jvp(banks, primals, tangents):  # pyright: ignore[reportUnusedFunction]
    (each, bank), (d_each, _) = primals, tangents
    found = merged(each, bank, banks)
    d_offset, d_m2 = _tangent(each, bank, found, d_each.origin + d_each.offset, d_each.m2, banks)
    zeros = jnp.zeros_like(found.count), jnp.zeros_like(found.origin)
    return found, Moments(*zeros, d_offset, d_m2)


@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=5)
def _tangent(each: Moments, bank, found: Moments, d_mean, d_m2, banks: int):
    count = _count_of_each(each, bank)
    origin, offset = (to_examples(part, bank) for part in (found.origin, found.offset))
    from_mean = (each.origin - origin) + each.offset - offset
    # sum(count * from_mean) is 0, so what the offset's own tangent adds to m2 is 0 too.
    d_m2 = d_m2 + 2 * count * jnp.real(jnp.conj(from_mean) * d_mean)
    d_sum, d_m2 = (
        totals(jnp.where(count > 0, part, 0), bank, banks) for part in (count * d_mean, d_m2)
    )
    return d_sum / jnp.maximum(found.count, 1), d_m2


def _count_of_each(each: Moments, bank: jax.Array) -> jax.Array:
    count = each.count
    count = count if count.ndim else count.reshape((1,) * each.origin.ndim)
    return jnp.broadcast_to(count, (bank.shape[0], *count.shape[1:]))


def _nearby(origin: jax.Array, count: jax.Array, bank: jax.Array, banks: int) -> jax.Array:
    """A typical value of each bank, from its first example that counts: nothing cancels."""
    counted = count > 0
    known = _beside(bank, count) == _beside(jnp.arange(banks), jnp.expand_dims(count, 0))
    known = jnp.expand_dims(counted, 0) & known
    first = jnp.argmax(known, 1)
    alike = all(size == 1 for size in count.shape[1:])
    near = origin[first.reshape(-1)] if alike else jnp.take_along_axis(origin, first, 0)
    return lax.stop_gradient(jnp.where(jnp.isfinite(near), near, 0))
