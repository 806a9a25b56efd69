"""Banks: several sets of statistics in one layer, and which examples share which.

Statistics of K banks are arrays with K rows. Each example is measured separately, and those of the
same bank are merged, so one pass over x serves any number of banks.
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
from bnjax.core.sums import at_once

Bank = Any  # an int, or int32, () or (N,)
_FEW = 16  # up to this many banks, sums by comparison are fast
_MANY = 64  # from this many examples on, they are summed in blocks
_BLOCK = 8  # examples in a block, which XLA unrolls
_MOST = 2**28  # banks times examples, for which a pair of them fits into an int32
_CHUNK = 256
_PARTS = 8


def by_example(bank: Bank | None) -> bool:
    """Whether each example has its own bank."""
    return jnp.ndim(bank) == 1 if bank is not None else False


def held(
    batch_stats: Mapping[str, jax.Array],
    params: Mapping[str, jax.Array],
    bank: Bank | None,
    banks: int | None,
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Statistics and affine map of one bank; rows of all if each example has its own."""
    if banks is None or bank is None:
        return dict(batch_stats), dict(params)

    rows = functools.partial(row, bank=bank)
    stats = {name: rows(value) for name, value in batch_stats.items()}
    learned = {key: params[key] for key in ("scale", "bias") if key in params}
    for key, value in learned.items():
        if value.ndim == batch_stats["mean"].ndim:  # one per bank
            learned[key] = rows(value)
        if f"bank_{key}" in params:
            learned[key] = value + rows(params[f"bank_{key}"])
    if not (by_example(bank) or isinstance(bank, int)):
        learned["bias"] = learned.get("bias", 0) + nowhere(bank, banks)
    return stats, learned


def row(values: Any, bank: Bank | None) -> Any:
    """The row of one bank; all values if each example has its own, or without banks."""
    if values is None or bank is None or by_example(bank):
        return values
    return lax.dynamic_index_in_dim(values, bank, keepdims=False)


def put(
    batch_stats: Mapping[str, jax.Array], bank: Bank | None, moved: Mapping[str, jax.Array]
) -> dict[str, jax.Array]:
    """The statistics of all banks after an update of one; unchanged if there is no such bank."""
    if bank is None or by_example(bank):
        return dict(moved)
    known = len(batch_stats["mean"]) if batch_stats else 0
    place = bank if isinstance(bank, int) else jnp.where(is_there(bank, known), bank, known)
    return {
        name: old.astype(moved[name].dtype).at[place].set(moved[name], mode="drop")
        for name, old in batch_stats.items()
    }


def nowhere(bank: jax.Array, banks: int) -> jax.Array:
    """NaN for each number out of range, else 0: added to an output, it invalidates it."""
    return jnp.where(is_there(bank, banks), 0.0, jnp.nan)


def is_there(bank: jax.Array, banks: int) -> jax.Array:
    """Whether a bank's number is in range."""
    return (bank >= 0) & (bank < banks)


def to_examples(values: Sequence[jax.Array], bank: jax.Array) -> list[jax.Array]:
    """The rows of each example's bank, (N, ...) from (K, ...); zeros if out of range."""
    bank, *values = varying_alike((bank, *values))
    banks = values[0].shape[0]
    if compat.plain.value:
        return _rows(bank, *values, banks=banks)
    return _to_examples.bind(bank, *values, banks=banks)


def totals(values: Sequence[jax.Array], bank: jax.Array, banks: int) -> list[jax.Array]:
    """The sums over each bank's examples, (K, ...) from (N, ...)."""
    bank, *values = varying_alike((bank, *values))
    if compat.plain.value:
        return _by_comparison(bank, *values, banks=banks)
    return _totals.bind(bank, *values, banks=banks)


def _rows(bank: jax.Array, *values: jax.Array, banks: int, devices: int = 1) -> list[jax.Array]:
    def rows(values: jax.Array) -> jax.Array:
        if not values.size:
            return jnp.zeros((*bank.shape, *values.shape[1:]), values.dtype)
        there = _beside(is_there(bank, banks), values)
        return jnp.where(there, jnp.take(values, bank, 0, mode="clip"), 0)

    return [rows(each) for each in values]


def _by_comparison(
    bank: jax.Array, *values: jax.Array, banks: int, devices: int = 1
) -> list[jax.Array]:
    """Sum by comparison, which fuses with its inputs, and all-reduces sharded arrays."""
    if banks > _FEW:
        return [_added(each, bank, banks) for each in values]

    def total(values: jax.Array) -> jax.Array:
        index = _beside(bank, values)
        return jnp.stack([jnp.sum(jnp.where(index == n, values, 0), 0) for n in range(banks)])

    return [total(each) for each in values]


def _by_place(bank: jax.Array, *values: jax.Array, banks: int, devices: int) -> list[jax.Array]:
    """Sum in one pass for any number of banks, unless the batch is split over devices."""
    if devices > 1 and banks <= _FEW:
        return _by_comparison(bank, *values, banks=banks)
    size = bank.shape[0]
    if not isinstance(size, int) or size < _MANY or banks * (size + _BLOCK * banks) > _MOST:
        return [_added(each, bank, banks) for each in values]
    places, valid, owner = _blocks(bank, banks)
    # XLA gathers the rows as it sums, without writing an array in this order.
    rows = [jnp.where(_beside(valid, each[None]), each[places], 0) for each in values]
    return [_added(each, owner, banks) for each in at_once(rows, (1,))]


def _blocks(bank: jax.Array, banks: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Blocks of eight examples of a bank: their indices, which are valid, and each block's bank."""
    size = bank.shape[0]
    known = jnp.where(is_there(bank, banks), bank, banks)
    counts = jnp.sum(known == jnp.arange(banks)[:, None], 1)
    # Fill the last block of each bank, and the last of all.
    places = np.arange(-(-size // _BLOCK) * _BLOCK + banks * _BLOCK, dtype=np.int32)
    number, rank = np.divmod(places[size:] - size, _BLOCK)
    fill = jnp.where(rank < -counts[np.minimum(number, banks - 1)] % _BLOCK, number, banks)
    keys = jnp.concatenate([known, fill.astype(known.dtype)])
    bits = len(places).bit_length()
    order = jnp.sort((keys << bits) + places).reshape(-1, _BLOCK)
    places = order & ((1 << bits) - 1)  # cheap, because XLA repeats it for each value
    return places, places < size, order[:, 0] >> bits


def _added(values: jax.Array, bank: jax.Array, banks: int) -> jax.Array:
    """Scatter-add each row to its bank."""
    size = bank.shape[0]
    # In chunks, because a sequential sum of thousands would lose precision.
    chunks = max(1, -(-size // _CHUNK)) if isinstance(size, int) else 1
    place = jnp.where(is_there(bank, banks), bank, chunks * banks)
    if chunks > 1:
        place = place + np.arange(size, dtype=np.int32) // _CHUNK * banks
    found = jax.ops.segment_sum(values, place, chunks * banks)
    return found.reshape(chunks, banks, *values.shape[1:]).sum(0) if chunks > 1 else found


def _beside(index: jax.Array, values: jax.Array) -> jax.Array:
    return index.reshape(*index.shape, *(1,) * (values.ndim - index.ndim))


def _batched(
    made: compat.Primitive, arrays: Sequence[Any], dims: Sequence[Any], banks: int
) -> tuple[list[jax.Array], int]:
    """Batch calls that share an index along a new axis, and others as a call with more banks."""
    (bank, *values), (of_bank, *of_values) = arrays, dims
    if of_bank is None:
        moved = [
            jnp.expand_dims(each, 1) if dim is None else jnp.moveaxis(each, dim, 1)
            for each, dim in zip(values, of_values, strict=True)
        ]
        size = max(each.shape[1] for each in moved)
        wide = [jnp.broadcast_to(v, (v.shape[0], size, *v.shape[2:])) for v in moved]
        return made.bind(bank, *wide, banks=banks), 1
    bank = jnp.moveaxis(bank, of_bank, 0)
    size = bank.shape[0]
    first = banks * np.arange(size, dtype=np.int32)[:, None]
    bank = jnp.where(is_there(bank, banks), bank + first, -1).reshape(-1)
    wide = [
        jnp.broadcast_to(each, (size, *each.shape)) if dim is None else jnp.moveaxis(each, dim, 0)
        for each, dim in zip(values, of_values, strict=True)
    ]
    wide = [each.reshape(-1, *each.shape[2:]) for each in wide]
    found = made.bind(bank, *wide, banks=banks * size)
    return [each.reshape(size, -1, *each.shape[1:]) for each in found], 0


_to_examples = compat.primitive("rows_of_banks", _rows)
_totals = compat.primitive("totals_of_banks", _by_comparison, cpu=_by_place)
compat.each_others_transpose(_to_examples, _totals, _batched)


@functools.partial(jax.jit, static_argnums=2)
def merged(each: Moments, bank: jax.Array, banks: int) -> Moments:
    """Merge the moments of examples, along the first axis, into those of each bank."""
    origin, count = each.origin, _count_of_each(each, bank)
    if not origin.size:
        zeros = (jnp.zeros((banks, *part.shape[1:]), part.dtype) for part in (origin, each.m2))
        origin, m2 = zeros
        return Moments(jnp.zeros((banks, *count.shape[1:]), m2.dtype), origin, origin, m2)
    near = lax.stop_gradient(_nearby(origin, count, bank, banks))
    mean = (origin - to_examples([near], bank)[0]) + each.offset
    (total,) = totals([count], bank, banks)
    parts = count * mean, each.m2 + count * abs2(mean)
    offset, m2 = totals([jnp.where(count > 0, part, 0) for part in parts], bank, banks)
    offset = offset / jnp.maximum(total, 1)
    m2 = jnp.maximum(m2 - total * abs2(offset), 0)
    return Moments(total, jnp.where(total > 0, near, 0), offset, m2)


def _count_of_each(each: Moments, bank: jax.Array) -> jax.Array:
    count = each.count
    count = count if count.ndim else count.reshape((1,) * each.origin.ndim)
    return jnp.broadcast_to(count, (bank.shape[0], *count.shape[1:]))


def _nearby(origin: jax.Array, count: jax.Array, bank: jax.Array, banks: int) -> jax.Array:
    """A typical value of each bank: sums around it lose few digits, and none for one example.

    Where a batch is split over devices, it is that of the first: more would be more messages.
    """
    if not isinstance(bank.shape[0], int) or compat.plain.value:
        return _first(origin, count, bank, banks)
    return _typical(*varying_alike((origin, count, bank)), banks=banks)[0]


def _of_parts(origin: jax.Array, count: jax.Array, bank: jax.Array, banks: int) -> jax.Array:
    """The mean of one value from each part of the batch: an outlier is one of several."""
    size = bank.shape[0]
    length = -(-size // _PARTS)
    known = _known(count, bank, banks)
    fill = [(0, length * _PARTS - size if axis == 1 else 0) for axis in range(known.ndim)]
    known = jnp.pad(known, fill).reshape(banks, _PARTS, length, *known.shape[2:])
    place = jnp.argmax(known, 2) + length * _beside(jnp.arange(_PARTS), known[0, :, 0])
    values, some = _taken(origin, jnp.minimum(place, size - 1)), jnp.any(known, 2)
    first = jnp.take_along_axis(values, jnp.argmax(some, 1)[:, None], 1)
    apart = jnp.where(some, values - first, 0)
    apart = apart / jnp.maximum(jnp.sum(some, 1, keepdims=True), 1)
    # As a matrix product: XLA would recompute a plain sum for each value of x.
    ones = np.ones(_PARTS + 1, origin.dtype)
    terms = jnp.concatenate([first, apart], 1)
    return jnp.tensordot(ones, terms, (0, 1), precision="highest")


def _first(origin: jax.Array, count: jax.Array, bank: jax.Array, banks: int) -> jax.Array:
    """The value of the first example that counts."""
    return _taken(origin, jnp.argmax(_known(count, bank, banks), 1)[:, None])[:, 0]


def _types(origin: jax.Array, count: jax.Array, bank: jax.Array, *, banks: int) -> list[jax.Array]:
    return [_first(origin, count, bank, banks)]


def _by_devices(
    origin: jax.Array, count: jax.Array, bank: jax.Array, *, banks: int, devices: int
) -> list[jax.Array]:
    return [(_of_parts if devices == 1 else _first)(origin, count, bank, banks)]


_typical = compat.by_platform("values_of_banks", _by_devices, _types)


def _known(count: jax.Array, bank: jax.Array, banks: int) -> jax.Array:
    """Which examples count in each bank, (K, N, 1), or (K, N, C) if channels differ in that."""
    return (count > 0) & (_beside(bank, count) == _beside(jnp.arange(banks)[:, None], count[None]))


def _taken(origin: jax.Array, place: jax.Array) -> jax.Array:
    """The values of several examples for each bank, (K, several, C); 0 where not finite."""
    if all(size == 1 for size in place.shape[2:]):
        values = origin[place.reshape(place.shape[:2])]
    else:
        values = jnp.take_along_axis(origin[None], place, 1)
    return jnp.where(jnp.isfinite(values), values, 0)
