"""Banks: several sets of statistics in one layer, and which examples share which.

Statistics of K banks are arrays of K rows. Each example of a batch is measured by itself, and those
of one bank are merged: one reading of x for all banks, whatever their number.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from bnjax.core.moments import Moments, abs2

Bank = Any  # an int, or int32, () or (N,)
# Up to so many banks, choosing among them and summing over each is done by comparison: it fuses.
_FEW = 16


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

    def rows(values: jax.Array) -> jax.Array:
        if by_example(bank):
            return values
        return lax.dynamic_index_in_dim(values, bank, keepdims=False)

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
    """For each example the row of its bank, (N, ...) of (K, ...)."""
    banks = len(values)
    if banks > _FEW:
        return jnp.take(values, bank, 0, mode="clip")
    index = _beside(bank, values)
    chosen = jnp.broadcast_to(values[0], (len(bank), *values.shape[1:]))
    for number in range(1, banks):
        chosen = jnp.where(index == number, values[number], chosen)
    return chosen


def totals(values: jax.Array, bank: jax.Array, banks: int) -> jax.Array:
    """For each bank the sum over its examples, (K, ...) of (N, ...)."""
    if banks > _FEW:
        values = jnp.where(_beside(is_there(bank, banks), values), values, 0)
        return jax.ops.segment_sum(values, jnp.clip(bank, 0, banks - 1), banks)
    index = _beside(bank, values)
    return jnp.stack([jnp.sum(jnp.where(index == n, values, 0), 0) for n in range(banks)])


def _beside(index: jax.Array, values: jax.Array) -> jax.Array:
    return index.reshape(-1, *(1,) * (values.ndim - 1))


@functools.partial(jax.jit, static_argnums=2)
def merged(each: Moments, bank: jax.Array, banks: int) -> Moments:
    """The moments of each bank from those of the examples, along the first axis."""
    origin = each.origin
    count = each.count if each.count.ndim else each.count.reshape((1,) * origin.ndim)
    count = jnp.broadcast_to(count, (len(bank), *count.shape[1:]))
    # Distances from the first example of each bank: nothing cancels, however far the banks.
    counted = jnp.any(count > 0, tuple(range(1, count.ndim)))
    known = jnp.where(counted, bank, banks)
    firsts = jnp.stack([jnp.argmax(known == number) for number in range(banks)])
    near = lax.stop_gradient(origin[firsts])
    mean = (origin - to_examples(near, bank)) + each.offset
    total = totals(count, bank, banks)
    some = jnp.maximum(total, 1)
    offset = totals(jnp.where(count > 0, count * mean, 0), bank, banks) / some
    between = abs2(mean - to_examples(offset, bank)) * count
    m2 = totals(jnp.where(count > 0, each.m2 + between, 0), bank, banks)
    near = jnp.where(total > 0, near, 0)
    return Moments(total, near, offset, m2)
