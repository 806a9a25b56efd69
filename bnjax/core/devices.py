"""Pool moments over the devices of a mapped axis: one gather for few, two sums for many."""

import functools
from collections.abc import Sequence

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from bnjax.core.compat import gathers_at_once, varying_axes
from bnjax.core.moments import Moments, abs2, kept

AxisName = str | Sequence[str]
Groups = Sequence[Sequence[int]]
Steps = tuple[tuple[str, ...], ...]  # the names of each gather
Table = tuple[tuple[int, ...], ...]

# Up to this many devices, one gather of all moments is faster than two sums; from 64 on, XLA:TPU
# turns the gather into an all-reduce.
_GATHERED = 32


def pool(local: Moments, axis_name: AxisName, groups: Groups | None = None) -> Moments:
    """Pool moments over all devices of a mapped axis.

    Each device sends its count, origin, offset and m2, and merges those of all. The messages it
    receives grow with the number of devices, so above 32 it takes two sums instead: one for the
    mean, and one around it. Results are exact for unequal counts, empty shards and distant means.
    A derivative costs one sum of 2C numbers over the devices.

    Args:
        local: the moments of this device.
        axis_name: name of the axis of `pmap`, `shard_map` or `vmap`, or several.
        groups: lists of indices of that axis; devices pool within each list.
    """
    return _pool(local, _steps(names(axis_name)), table(groups))


def total(count: chex.Numeric, axis_name: AxisName, groups: Groups | None = None) -> jax.Array:
    """The sum of a count over the devices that pool their moments."""
    count = jnp.asarray(count, jnp.float32)
    if groups is None:
        return lax.psum(count, names(axis_name))
    return _rows(count, _steps(names(axis_name)), table(groups)).sum(0)


def names(axis_name: AxisName) -> tuple[str, ...]:
    """One name or several, as a tuple."""
    return (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)


def table(groups: Groups | None) -> Table | None:
    """Groups as hashable tuples."""
    return None if groups is None else tuple(map(tuple, groups))


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def _pool(local: Moments, steps: Steps, groups: Table | None) -> Moments:
    """The pooled moments; derivatives sum where this function gathers."""
    if groups is None and lax.axis_size(_names(steps)) > _GATHERED:
        return _summed(local, _names(steps))
    return _merged(_rows(_packed(local), steps, groups), local)


def _summed(local: Moments, names: tuple[str, ...]) -> Moments:
    """Sum around an approximate pooled mean; being close to the mean is accurate enough."""
    shape, dtype = local.origin.shape, local.origin.dtype
    count = jnp.broadcast_to(local.count, shape)
    total, around = lax.psum(jnp.stack([count.astype(dtype), count * local.mean]), names)
    total = jnp.real(total)
    origin = around / jnp.maximum(total, 1)
    offset = jnp.where(count > 0, (local.origin - origin) + local.offset, 0)
    m2 = local.m2 + count * abs2(offset)
    offset, m2 = lax.psum(jnp.stack([count * offset, m2.astype(dtype)]), names)
    offset = offset / jnp.maximum(total, 1)
    m2 = jnp.maximum(jnp.real(m2) - total * abs2(offset), 0)
    count = total if local.count.shape else total.reshape(-1)[0]
    return Moments(count, origin, offset, m2)


# Under jit, it is traced and lowered once for all layers of the same shape.
@jax.jit
def _packed(local: Moments) -> jax.Array:
    """The message of a device: a row of C numbers for each part, with the count at its end.

    XLA:TPU gathers rows with an all-gather, but a single vector with an all-reduce, whose size
    grows with the number of devices.
    """
    parts = [local.origin, local.offset, local.m2]
    if jnp.iscomplexobj(local.origin):
        parts = [f(part) for part in parts[:2] for f in (jnp.real, jnp.imag)] + parts[2:]
    numbers = jnp.stack(parts).reshape(len(parts), -1)
    counts = jnp.broadcast_to(local.count.reshape(-1), (len(parts), local.count.size))
    return jnp.concatenate([numbers, counts], 1)


@jax.jit
def _merged(rows: jax.Array, like: Moments) -> Moments:
    """The pooled moments from the messages of all devices, in the form of `like`."""
    ends = like.m2.size
    parts = [rows[:, i, :ends].reshape(-1, *like.m2.shape) for i in range(rows.shape[1])]
    if jnp.iscomplexobj(like.origin):
        parts = [lax.complex(*parts[:2]), lax.complex(*parts[2:4]), parts[4]]
    origin, offset, m2 = parts
    count = rows[:, 0, ends:].reshape(-1, *(like.count.shape or (1,) * like.m2.ndim))
    # Around the origin of the device that saw most values, nothing cancels, however far the means.
    most = jnp.take_along_axis(origin, jnp.argmax(count, 0, keepdims=True), 0)
    mean = jnp.where(count > 0, (origin - most) + offset, 0)
    total = jnp.sum(count, 0)
    middle = jnp.sum(count * mean, 0) / jnp.maximum(total, 1)
    between = jnp.sum(count * abs2(mean - middle), 0)
    seen = jnp.where(total > 0, most[0], 0)
    return Moments(total.reshape(like.count.shape), seen, middle, jnp.sum(m2, 0) + between)


@_pool.defjvp
def _pool_jvp(steps, groups, primals, tangents):  # pyright: ignore[reportUnusedFunction]
    (local,), (d_local,) = primals, tangents
    pooled = jax.tree.map(kept, _pool(local, steps, groups))
    d_mean = d_local.origin + d_local.offset
    from_mean = (local.origin - pooled.origin) + local.offset - pooled.offset
    # sum(count * (mean - offset)) is 0, so the tangent of the offset adds nothing to m2.
    d_m2 = d_local.m2 + 2 * local.count * jnp.real(jnp.conj(from_mean) * d_mean)
    share = local.count / jnp.maximum(pooled.count, 1)
    sent = jnp.stack([share * d_mean, d_m2.astype(d_mean.dtype)])
    if groups is None:
        d_offset, d_m2 = lax.psum(sent, _names(steps))
    else:
        d_offset, d_m2 = _rows(sent, steps, groups).sum(0)
    zeros = jnp.zeros_like(pooled.count), jnp.zeros_like(pooled.origin)
    return pooled, Moments(*zeros, d_offset, jnp.real(d_m2))


def _steps(names: tuple[str, ...]) -> Steps:
    """The names to gather over: all at once if JAX can, else (nested vmaps) one by one."""
    return (names,) if gathers_at_once(names) else tuple((name,) for name in names[::-1])


def _names(steps: Steps) -> tuple[str, ...]:
    return tuple(name for step in reversed(steps) for name in step)


def _rows(values: jax.Array, steps: Steps, groups: Table | None) -> jax.Array:
    """The values of all devices, stacked; with groups, of this device's group only."""
    # If JAX tracks which values vary between devices, tell it that the gathered ones do not.
    invarying = groups is None and not varying_axes(values).isdisjoint(_names(steps))
    rows = values
    for names in steps:
        rows = lax.all_gather(rows, names, to="invarying" if invarying else "varying")
    rows = rows.reshape(-1, *values.shape)
    if groups is None:
        return rows
    members = np.empty((len(rows), len(groups[0])), int)
    for group in groups:
        members[list(group)] = group
    return rows[jnp.asarray(members)[lax.axis_index(_names(steps))]]
