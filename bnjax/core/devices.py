"""The moments of all devices of a mapped axis, with one all-gather."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from bnjax.core.moments import Moments, abs2, kept
from bnjax.core.sharding import varying_axes

AxisName = str | Sequence[str]
Groups = Sequence[Sequence[int]]
Steps = tuple[tuple[str, ...], ...]  # the names of each gather

# Squared distance of the mean from the reference over variance up to which the digits that are lost
# on the way do not matter: eight standard deviations cost half of one's float32 precision.
_FAR = 64


def pool(
    local: Moments, axis_name: AxisName, groups: Groups | None, reference: jax.Array | None
) -> Moments:
    """Moments of what all devices of a mapped axis see together.

    Each device sends its count, mean and m2, 2C + 1 numbers, and merges those of all. Unequal
    counts and empty shards are exact. The means are sent as distances from a reference; where that
    is too far for their digits, all send them again, as distances from what came out. A derivative
    costs one sum of 2C numbers over the devices.

    Args:
        local: what this device saw.
        axis_name: the name of the axis of `pmap`, `shard_map` or `vmap`, or several.
        groups: lists of indices of that axis; the devices of each pool among themselves.
        reference: a value per channel that all devices know and that is near the mean, such as the
            running mean; None for zeros.
    """
    names = (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)
    table = None if groups is None else tuple(map(tuple, groups))
    origin = local.origin
    if reference is None:
        reference = jnp.zeros(origin.shape, origin.dtype)
    known = lax.stop_gradient(reference).astype(origin.dtype)
    known = jnp.where(jnp.isfinite(known), known, 0)
    parts = local.count, origin, local.offset, local.m2
    count, origin, offset, m2 = _pool(*parts, known, _steps(names), table)
    some = count > 0  # nothing seen: zeros, as on one device
    return Moments(count, jnp.where(some, origin, 0), jnp.where(some, offset, 0), m2)


@functools.partial(jax.custom_jvp, nondiff_argnums=(5, 6))
def _pool(
    count: jax.Array,
    origin: jax.Array,
    offset: jax.Array,
    m2: jax.Array,
    reference: jax.Array,
    steps: Steps,
    groups: Any,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Of all devices; the rule for derivatives sums where this one gathers."""

    def around(reference: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Count, mean minus reference and m2 of each group."""
        mean = (origin - reference) + offset
        parts = (count, jnp.real(mean), m2) + ((jnp.imag(mean),) if jnp.iscomplexobj(mean) else ())
        sent = jnp.concatenate([jnp.ravel(part) for part in parts])
        rows = _by_group(_gather(sent, steps, groups), groups)
        ends = np.cumsum([part.size for part in parts])[:-1]
        counts, means, m2s, *imaginary = (
            columns.reshape(*rows.shape[:2], *part.shape)
            for columns, part in zip(jnp.split(rows, ends, 2), parts, strict=True)
        )
        if imaginary:
            means = lax.complex(means, imaginary[0])
        if counts.ndim == 2:
            counts = counts.reshape(*counts.shape, *(1,) * mean.ndim)
        total = jnp.sum(counts, 1)
        pooled = jnp.sum(counts * means, 1) / jnp.maximum(total, 1)
        between = jnp.sum(counts * abs2(means - jnp.expand_dims(pooled, 1)), 1)
        return total, pooled, jnp.sum(m2s, 1) + between

    totals, offsets, pooled = around(reference)
    spread = pooled / jnp.maximum(totals, 1)
    if groups is None:  # a constant channel has come near when that is all that rounding leaves
        spread = spread + abs2(reference) * 2.0**-40
    # All devices decide alike: about all groups, where each knows its own reference alone.
    far = jnp.any(abs2(offsets) > _FAR * spread)
    found = reference + _mine(offsets, steps, groups)
    nearer = jnp.where(jnp.isfinite(found), found, reference)
    offsets, pooled = lax.cond(far, lambda: around(nearer)[1:], lambda: (offsets, pooled))
    total, offset, m2 = (_mine(each, steps, groups) for each in (totals, offsets, pooled))
    return total.reshape(count.shape), jnp.where(far, nearer, reference), offset, m2


@_pool.defjvp
def _pool_jvp(steps, groups, primals, tangents):  # pyright: ignore[reportUnusedFunction]
    count, origin, offset, m2, reference = primals
    _, d_origin, d_offset, d_m2, _ = tangents
    total, middle, shift, pooled = map(
        kept, _pool(count, origin, offset, m2, reference, steps, groups)
    )
    d_mean = d_origin + d_offset
    from_middle = (origin - middle) + offset - shift
    # sum(count * (mean - offset)) is 0, so what the offset's own tangent adds to m2 is 0 too.
    ours = 2 * count * jnp.real(jnp.conj(from_middle) * d_mean)
    sent = jnp.stack([count / jnp.maximum(total, 1) * d_mean, (d_m2 + ours).astype(d_mean.dtype)])
    if groups is None:
        d_shift, d_pooled = lax.psum(sent, _names(steps))
    else:
        d_shift, d_pooled = _mine(
            _by_group(_gather(sent, steps, groups), groups).sum(1), steps, groups
        )
    zero = jnp.zeros_like(total), jnp.zeros_like(middle)
    return (total, middle, shift, pooled), (*zero, d_shift, jnp.real(d_pooled))


def _steps(names: tuple[str, ...]) -> Steps:
    """The names to gather over, all at once where JAX can."""
    if len(names) > 1:
        try:
            lax.all_gather(0.0, names)
        except AssertionError:  # there is no rule for several names of nested vmaps: one by one
            return tuple((name,) for name in reversed(names))
    return (names,)


def _names(steps: Steps) -> tuple[str, ...]:
    return tuple(name for step in reversed(steps) for name in step)


def _gather(values: jax.Array, steps: Steps, groups: Any) -> jax.Array:
    """The values of all devices, stacked."""
    # Where JAX tracks which values differ between devices, it must learn that sums of these do not.
    alike = groups is None and not varying_axes(values).isdisjoint(_names(steps))
    to = "invarying" if alike else "varying"
    rows = values
    for names in steps:
        rows = lax.all_gather(rows, names, to=to)
    return rows.reshape(-1, *values.shape)


def _by_group(rows: jax.Array, groups: Any) -> jax.Array:
    """Rows of devices as (groups, devices of each, ...)."""
    return rows[None] if groups is None else rows[np.asarray(groups)]


def _mine(values: jax.Array, steps: Steps, groups: Any) -> jax.Array:
    """Of a value for each group, that of the group that this device is in."""
    if groups is None:
        return values[0]
    group_of = np.empty(sum(map(len, groups)), int)
    for number, group in enumerate(groups):
        group_of[list(group)] = number
    return values[jnp.asarray(group_of)[lax.axis_index(_names(steps))]]
