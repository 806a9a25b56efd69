"""Update the running statistics with a batch."""

import functools
from collections.abc import Mapping

import chex
import jax
import jax.numpy as jnp
from jax import lax

from bnjax.core.checks import POOLED
from bnjax.core.devices import pool
from bnjax.core.moments import Moments, abs2, at_least
from bnjax.core.settings import Momentum, Settings, at

Shares = tuple[chex.Numeric, chex.Numeric] | None


def update(
    batch_stats: dict[str, jax.Array], batch: Moments, group: int | None, settings: Settings
) -> dict[str, jax.Array]:
    """Update the running statistics with a batch, or with the average of its virtual batches."""
    if settings.pooled:
        if group is not None:
            batch = _united(batch, group)
            if settings.axis_name is not None:
                batch = pool(batch, settings.axis_name)
        return move(batch_stats, batch, "pooled")
    shares = weights(settings.momentum)
    return _update(batch_stats, batch, shares, settings.correction, group, settings.axis_name)


def move(
    batch_stats: Mapping[str, jax.Array],
    batch: Moments,
    momentum: Momentum,
    correction: chex.Numeric = 0,
) -> dict[str, jax.Array]:
    """Update the running statistics with the moments of a batch.

    Args:
        batch_stats: the old running statistics.
        batch: the moments of the batch.
        momentum: as for `batch_norm`.
        correction: subtracted from the count in the variance, unless all values are pooled.
    """
    if isinstance(momentum, str):
        return _pooled(dict(batch_stats), batch)
    weight, _ = at(batch_stats.get("count"), momentum, None)
    counts = batch.count > correction
    return _decayed(batch_stats, batch.mean, batch.variance(correction), counts, weights(weight))


def weights(momentum: chex.Numeric | None) -> Shares:
    """The weights of the old statistics and the new; None for the cumulative average."""
    return None if momentum is None else (1 - momentum, momentum)


@functools.partial(jax.jit, static_argnums=(4, 5))
def _update(
    batch_stats: dict[str, jax.Array],
    batch: Moments,
    shares: Shares,
    correction: chex.Numeric,
    group: int | None,
    axis_name: tuple[str, ...] | None,
) -> dict[str, jax.Array]:
    counts = batch.count > correction
    mean, var = batch.mean, batch.variance(correction)
    if group is not None:  # average over groups and devices, weighted by count
        weight = jnp.broadcast_to(jnp.where(counts, batch.count, 0), mean.shape)
        sums = jnp.stack([weight.astype(mean.dtype), weight * mean, weight * var]).sum(group + 1)
        if axis_name is not None:
            sums = lax.psum(sums, axis_name)
        total = jnp.real(sums[0])
        some, counts = jnp.maximum(total, 1), total > 0
        mean, var = sums[1] / some, jnp.real(sums[2]) / some
    return _decayed(batch_stats, mean, var, counts, shares)


def _decayed(
    batch_stats: Mapping[str, jax.Array],
    mean: jax.Array,
    var: jax.Array,
    counts: jax.Array,
    shares: Shares,
) -> dict[str, jax.Array]:
    """Update each channel whose batch statistics are finite.

    In a cumulative average, a channel with exactly the mean 0 and variance 1 from `init` has seen
    nothing yet, so its first batch replaces them, however many batches came before.
    """
    counts = counts & jnp.isfinite(mean) & jnp.isfinite(var)
    updated = dict(batch_stats)
    if "count" in batch_stats:
        updated["count"], channels = _counted(batch_stats, counts)
        if shares is None:
            new = (batch_stats["mean"] == 0) & (batch_stats["var"] == 1)
            seen = jnp.where(new, 1, jnp.expand_dims(jnp.maximum(updated["count"], 1), channels))
            share = 1 / seen.astype(at_least(var.dtype, batch_stats["var"]).dtype)
            shares = 1 - share, share
        elif jnp.ndim(shares[1]):  # a schedule of several counts
            old, new = (jnp.expand_dims(share, channels) for share in shares)
            shares = old, new
    assert shares is not None, "checks.trees: without a momentum there is a count"
    for key, new in (("mean", mean), ("var", var)):
        old = at_least(new.dtype if jnp.iscomplexobj(new) else jnp.float32, batch_stats[key])
        of_old, of_new = (jnp.asarray(share, old.dtype) for share in shares)
        updated[key] = jnp.where(counts, of_old * old + of_new * new.astype(old.dtype), old)
    return updated


def _counted(
    batch_stats: Mapping[str, jax.Array], counts: jax.Array
) -> tuple[jax.Array, tuple[int, ...]]:
    """Count a step if any channel was updated; return the new count and the channel axes.

    The statistics of several layers or banks may be stacked, as in nn.scan, with a count for each.
    """
    channels = tuple(range(jnp.ndim(batch_stats["count"]), counts.ndim))
    return batch_stats["count"] + jnp.any(counts, channels).astype("int32"), channels


@jax.jit
def _pooled(batch_stats: dict[str, jax.Array], batch: Moments) -> dict[str, jax.Array]:
    """Pool mean and biased variance of all values ever seen (Chan et al. 1983).

    Updates soon become smaller than the last digit of a float32. So each number is kept as two
    floats, the second of which holds the digits that do not fit into the first.
    """
    mean, var, old = batch_stats["mean"], batch_stats["var"], batch_stats["values"]
    count = jnp.broadcast_to(batch.count, old.shape).astype(old.dtype)
    counts = (count > 0) & jnp.isfinite(batch.mean) & jnp.isfinite(batch.m2)
    share = jnp.where(counts, count / jnp.maximum(old + count, 1), 0)
    first = old == 0
    from_old = (batch.origin - mean) + (batch.offset - batch_stats["mean_low"])
    from_old = jnp.where(counts, from_old, 0)
    within = jnp.where(counts, batch.variance() - var - batch_stats["var_low"], 0)
    between = share * (1 - share) * abs2(from_old)
    steps = {
        "mean": share * from_old,
        "var": share * within + between,
        "values": jnp.where(counts, count, 0),
    }
    new = dict(batch_stats)
    if "count" in batch_stats:
        new["count"], _ = _counted(batch_stats, counts)
    for name, step in steps.items():
        low = batch_stats[f"{name}_low"]
        total, rest = _two_sum(batch_stats[name], (low + step).astype(low.dtype))
        new[name], new[f"{name}_low"] = total, rest
    # The first batch replaces the initial values, to the last digit.
    alone = {"mean": batch.origin + batch.offset, "var": batch.variance()}
    alone |= {"mean_low": (batch.origin - alone["mean"]) + batch.offset, "var_low": 0 * var}
    for name, value in alone.items():
        new[name] = jnp.where(first & counts, value.astype(new[name].dtype), new[name])
    return new


def _two_sum(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The rounded sum and its rounding error (Knuth)."""
    total = a + b
    of_b = total - a
    return total, (a - (total - of_b)) + (b - of_b)


def _united(batch: Moments, group: int) -> Moments:
    """Merge the moments of all virtual batches."""
    shape = batch.m2.shape
    count = jnp.broadcast_to(batch.count, shape)
    most = jnp.argmax(count, group, keepdims=True)
    origin = jnp.take_along_axis(batch.origin, most, group)
    total = jnp.sum(count, group)
    mean = jnp.where(count > 0, (batch.origin - origin) + batch.offset, 0)
    offset = jnp.sum(count * mean, group) / jnp.maximum(total, 1)
    between = count * abs2(mean - jnp.expand_dims(offset, group))
    m2 = jnp.sum(batch.m2 + between, group)
    return Moments(total, jnp.squeeze(origin, group), offset, m2)


def pooled_from(mean: jax.Array, var: jax.Array) -> dict[str, jax.Array]:
    """The initial values of what is kept beside mean and variance to pool all values."""
    values = {"values": var, "values_low": var, "mean_low": mean, "var_low": var}
    assert tuple(values) == POOLED
    return {name: jnp.zeros_like(value) for name, value in values.items()}
