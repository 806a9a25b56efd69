"""Batch normalization as pure functions: plain dicts in, plain dicts out."""

from collections.abc import Mapping, Sequence

import chex
import jax
import jax.numpy as jnp

from bnjax.core import checks, compat, partition
from bnjax.core.affine import normalize
from bnjax.core.devices import AxisName, Groups, names, pool, table
from bnjax.core.measuring import moments_of
from bnjax.core.moments import working_dtype
from bnjax.core.policies import choose
from bnjax.core.running import update
from bnjax.core.settings import Settings
from bnjax.core.sharding import on_auto_axes

Params = dict[str, jax.Array]
BatchStats = dict[str, jax.Array]


def init(
    num_features: int,
    *,
    affine: bool = True,
    track_running_stats: bool = True,
    momentum: float | None = 0.1,
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> tuple[Params, BatchStats]:
    """Parameters and running statistics of a new batch norm.

    Guide: examples/guides/running_statistics.md

    Args:
        num_features: number of channels, C.
        affine: learn a scale (ones) and a bias (zeros); otherwise `params` is `{}`.
        track_running_stats: keep a running mean (zeros) and variance (ones); otherwise
            `batch_stats` is `{}` and each batch is normalized by its own statistics, in
            evaluation too.
        momentum: None, for the cumulative average, adds the `count` of batches seen that it needs.
        dtype: dtype of the parameters. The statistics are float32 at least.

    Returns:
        `(params, batch_stats)`: `{"scale": (C,), "bias": (C,)}` and `{"mean": (C,), "var": (C,)}`,
        Flax's names and trees.

    Raises:
        ValueError: `num_features` is negative, or no integer.

    >>> params, batch_stats = init(3)
    >>> batch_stats["var"].tolist()
    [1.0, 1.0, 1.0]
    """
    checks.num_features(num_features)
    params, batch_stats = {}, {}
    if affine:
        params = {"scale": jnp.ones(num_features, dtype), "bias": jnp.zeros(num_features, dtype)}
    if track_running_stats:
        mean = jnp.zeros(num_features, working_dtype(dtype))
        batch_stats = {"mean": mean, "var": jnp.ones_like(jnp.real(mean))}
        if momentum is None:
            batch_stats["count"] = jnp.zeros((), jnp.int32)
    return params, batch_stats


def batch_norm(
    params: Mapping[str, chex.Array],
    batch_stats: Mapping[str, chex.Array],
    x: chex.Array,
    *,
    mutable: bool,
    axis: int | Sequence[int] = -1,
    eps: chex.Numeric = 1e-5,
    momentum: chex.Numeric | None = 0.1,
    correction: int = 1,
    mask: chex.Array | None = None,
    axis_name: AxisName | None = None,
    axis_index_groups: Groups | None = None,
    virtual_batch_size: int | None = None,
    dtype: jax.typing.DTypeLike | None = None,
) -> tuple[jax.Array, BatchStats]:
    """Normalize `x` per channel; return it with the updated running statistics.

    `y = (x - mean) / sqrt(var + eps) * scale + bias` (Ioffe and Szegedy 2015), where mean and
    (biased) variance are those of this batch if `mutable`, or if there are no running statistics,
    and the running ones otherwise. If `mutable`,
    `running = (1 - momentum) * running + momentum * batch`, as in `torch.nn.BatchNorm2d`.

    Guides: examples/guides/conventions.md, examples/guides/numerics_and_speed.md

    Args:
        params: `{"scale": (C,), "bias": (C,)}`, either alone, or `{}`.
        batch_stats: `{"mean": (C,), "var": (C,)}` and perhaps `"count": ()`, or `{}` for none.
        x: the input, with C channels along `axis`.
        mutable: True trains, False evaluates. It has no default: this is the decision.
        axis: the channel axis, or axes.
        eps: added to the variance; positive in training.
        momentum: weight of the new batch in the running statistics (PyTorch's convention; one
            minus Flax's). None is the cumulative average over all batches, and needs `count`.
        correction: the batch variance enters the running one times `n / (n - correction)`: 1 is
            PyTorch's unbiased variance, 0 Flax's biased one.
        mask: bool, broadcastable to `x`: statistics are over the True positions only. What stands
            at the others (NaN too) reaches neither the other outputs nor any gradient.
        axis_name: name of a mapped axis (`pmap`, `shard_map`, `vmap`), or several: statistics are
            those of all its devices together, by count. Under plain `jit` a sharded batch needs no
            name. An evaluation communicates nothing.
        axis_index_groups: lists of indices of that axis, of equal sizes: statistics are pooled
            within each.
        virtual_batch_size: normalize groups of this many examples by themselves in training (ghost
            batch norm, Hoffer et al. 2017); the last group may be smaller. The running statistics
            take the average of the groups, by count. Groups are never pooled over devices.
        dtype: dtype of `y`; that of `x` if None (float32 for integers).

    Returns:
        `(y, batch_stats)`. The statistics are a new dict in float32 at least. A channel whose batch
        statistics are not finite keeps its running ones, as all do if no value counts (an empty
        batch, an all-False mask, or not more values than `correction`).

    Raises:
        ValueError: a bad shape, key, `axis`, `eps`, `momentum` or `mask`, or a single value per
            channel in training with `correction=1`.
        TypeError: a mask that is not boolean, or a tree that is not a dict.

    >>> params, batch_stats = init(1)
    >>> x = jnp.array([[1.0], [2.0], [3.0]])
    >>> y, batch_stats = batch_norm(params, batch_stats, x, mutable=True)
    >>> [round(v, 4) for v in y[:, 0].tolist()]
    [-1.2247, 0.0, 1.2247]
    >>> round(float(batch_stats["mean"][0]), 4)  # 0.9 * 0 + 0.1 * 2
    0.2
    """
    x = checks.floating(x)
    settings = Settings(
        axes=checks.feature_axes(axis, x.ndim),
        by_batch=mutable or not batch_stats,
        moves=mutable and bool(batch_stats),
        eps=eps,
        momentum=momentum,
        correction=correction,
        axis_name=None if axis_name is None else names(axis_name),
        axis_index_groups=table(axis_index_groups),
        virtual_batch_size=virtual_batch_size,
        dtype=checks.output_dtype(dtype, x),
    ).checked(x)
    checks.trees(params, batch_stats, tuple(x.shape[a] for a in settings.axes), momentum)
    mask = None if mask is None else checks.mask(mask, x.shape)
    stats = dict(batch_stats)
    with compat.plain_for(x):
        return on_auto_axes(_steps, (dict(params), stats, x, mask, settings), x, like=(x, stats))


def _steps(
    params: Params, batch_stats: BatchStats, x: jax.Array, mask: jax.Array | None, told: Settings
) -> tuple[jax.Array, BatchStats]:
    """Partition, measure, pool, choose, move, affine."""
    size, batch, shape = told.virtual_batch_size, None, x.shape
    if size is None or not told.by_batch:
        parts = partition.whole(x, mask, told.axes)
    else:
        parts = partition.virtual(x, mask, told.axes, size)
    if told.by_batch:
        batch = moments_of(parts, batch_stats.get("mean"))
        if told.axis_name is not None and parts.group is None:
            batch = pool(batch, told.axis_name, told.axis_index_groups)
    chosen = choose(batch, batch_stats, parts)
    if batch is not None and told.moves:
        batch_stats = update(batch_stats, batch, parts.group, told)
    y = normalize(parts, chosen, params, told.eps, told.dtype)
    return partition.join(y, parts, shape), batch_stats
