"""What moves: the running statistics after one more batch."""

import functools
from collections.abc import Mapping

import chex
import jax
import jax.numpy as jnp
from jax import lax

from bnjax.core.moments import Moments, at_least
from bnjax.core.settings import Settings

Shares = tuple[chex.Numeric, chex.Numeric] | None


def update(
    batch_stats: dict[str, jax.Array], batch: Moments, group: int | None, settings: Settings
) -> dict[str, jax.Array]:
    """The running statistics, moved by those of the batch; of virtual ones by their average."""
    shares = weights(settings.momentum)
    return _update(batch_stats, batch, shares, settings.correction, group, settings.axis_name)


def weights(momentum: chex.Numeric | None) -> Shares:
    """Those of the old statistics and of the new; None for the cumulative average."""
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
    if group is not None:  # on all devices, weighed by their counts
        weight = jnp.broadcast_to(jnp.where(counts, batch.count, 0), mean.shape)
        sums = jnp.stack([weight.astype(mean.dtype), weight * mean, weight * var]).sum(group + 1)
        if axis_name is not None:
            sums = lax.psum(sums, axis_name)
        total = jnp.real(sums[0])
        some, counts = jnp.maximum(total, 1), total > 0
        mean, var = sums[1] / some, jnp.real(sums[2]) / some
    return move(batch_stats, mean, var, counts, shares)


def move(
    batch_stats: Mapping[str, jax.Array],
    mean: jax.Array,
    var: jax.Array,
    counts: jax.Array,
    shares: Shares,
) -> dict[str, jax.Array]:
    """The running statistics after one more batch, in each channel where that is a number.

    In a cumulative average, a channel with exactly the mean 0 and the variance 1 that `init` gives
    has seen nothing yet: its first batch counts fully, however many came before.
    """
    counts = counts & jnp.isfinite(mean) & jnp.isfinite(var)
    updated = {}
    if "count" in batch_stats:
        # The statistics of several layers may be stacked, as by nn.scan: one count for each.
        channels = tuple(range(jnp.ndim(batch_stats["count"]), counts.ndim))
        updated["count"] = batch_stats["count"] + jnp.any(counts, channels).astype("int32")
        if shares is None:
            new = (batch_stats["mean"] == 0) & (batch_stats["var"] == 1)
            seen = jnp.where(new, 1, jnp.expand_dims(jnp.maximum(updated["count"], 1), channels))
            share = 1 / seen.astype(at_least(var.dtype, batch_stats["var"]).dtype)
            shares = 1 - share, share
    assert shares is not None, "checks.trees: without a momentum there is a count"
    for key, new in (("mean", mean), ("var", var)):
        old = at_least(new.dtype if jnp.iscomplexobj(new) else jnp.float32, batch_stats[key])
        of_old, of_new = (jnp.asarray(share, old.dtype) for share in shares)
        updated[key] = jnp.where(counts, of_old * old + of_new * new.astype(old.dtype), old)
    return {key: updated[key] for key in batch_stats}
