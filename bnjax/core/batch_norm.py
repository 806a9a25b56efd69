"""Batch normalization as pure functions: plain dicts in, plain dicts out."""

from collections.abc import Mapping, Sequence
from typing import Literal

import chex
import jax
import jax.numpy as jnp

from bnjax.core import banks as bank_rows
from bnjax.core import checks, compat, partition
from bnjax.core.affine import normalize
from bnjax.core.banks import Bank
from bnjax.core.choosing import applied, choose
from bnjax.core.devices import AxisName, Groups, names, pool, table
from bnjax.core.measuring import shared
from bnjax.core.moments import Moments, working_dtype
from bnjax.core.policies import Affine, Policy
from bnjax.core.running import pooled_from, update
from bnjax.core.settings import Momentum, Settings, at, counts
from bnjax.core.sharding import on_auto_axes

Params = dict[str, jax.Array]
BatchStats = dict[str, jax.Array]


def init(
    num_features: int,
    *,
    affine: bool | Literal["own", "both"] = True,
    track_running_stats: bool = True,
    momentum: Momentum = 0.1,
    using: Policy | None = None,
    banks: int | None = None,
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> tuple[Params, BatchStats]:
    """Create the parameters and running statistics of a batch norm.

    Guide: examples/guides/running_statistics.md

    Args:
        num_features: number of channels, C.
        affine: learn a scale (ones) and a bias (zeros); otherwise `params` is `{}`. With banks,
            True shares one of each, "own" has one of each per bank, and "both" adds `bank_scale`
            and `bank_bias`, which start at 0, to shared ones.
        track_running_stats: keep a running mean (zeros) and variance (ones); otherwise
            `batch_stats` is `{}` and each batch is normalized with its own statistics, even in
            evaluation.
        momentum: as for `batch_norm`. None, or a function of the number of training steps, adds
            that `count`; "pooled" adds the number of `values` and low-order digits.
        using: as for `batch_norm`. A policy that depends on the number of training steps adds
            `count`.
        banks: keep this many sets of statistics; each array has an additional leading axis.
        dtype: dtype of the parameters. The statistics are at least float32.

    Returns:
        `(params, batch_stats)`: `{"scale": (C,), "bias": (C,)}` and `{"mean": (C,), "var": (C,)}`,
        Flax's names and trees.

    Raises:
        ValueError: `num_features` is negative or not an integer.

    >>> params, batch_stats = init(3)
    >>> batch_stats["var"].tolist()
    [1.0, 1.0, 1.0]
    """
    checks.num_features(num_features)
    checks.number_of_banks(banks, affine)
    params, batch_stats = {}, {}
    rows = () if banks is None else (banks,)
    if affine:
        shape = (*rows * (affine == "own"), num_features)
        params = {"scale": jnp.ones(shape, dtype), "bias": jnp.zeros(shape, dtype)}
    if affine == "both":
        zeros = jnp.zeros((*rows, num_features), dtype)
        params |= {"bank_scale": zeros, "bank_bias": zeros}
    if track_running_stats:
        mean = jnp.zeros((*rows, num_features), working_dtype(dtype))
        batch_stats = {"mean": mean, "var": jnp.ones_like(jnp.real(mean))}
        if counts(momentum, using):
            batch_stats["count"] = jnp.zeros(rows, jnp.int32)
        if isinstance(momentum, str):
            batch_stats |= pooled_from(mean, batch_stats["var"])
    return params, batch_stats


def batch_norm(
    params: Mapping[str, chex.Array],
    batch_stats: Mapping[str, chex.Array],
    x: chex.Array,
    *,
    mutable: bool,
    axis: int | Sequence[int] = -1,
    eps: chex.Numeric = 1e-5,
    momentum: Momentum = 0.1,
    correction: int = 1,
    using: Policy | None = None,
    mask: chex.Array | None = None,
    bank: Bank | None = None,
    scale: chex.Array | None = None,
    bias: chex.Array | None = None,
    axis_name: AxisName | None = None,
    axis_index_groups: Groups | None = None,
    virtual_batch_size: int | None = None,
    dtype: jax.typing.DTypeLike | None = None,
) -> tuple[jax.Array, BatchStats]:
    """Normalize `x` per channel; return it with the updated running statistics.

    `y = (x - mean) / sqrt(var + eps) * scale + bias` (Ioffe and Szegedy 2015), with the mean and
    (biased) variance of this batch if `mutable` or if there are no running statistics, and with
    the running ones otherwise. If `mutable`,
    `running = (1 - momentum) * running + momentum * batch`, as in `torch.nn.BatchNorm2d`.

    Guides: examples/guides/conventions.md, examples/guides/numerics_and_speed.md

    Args:
        params: `{"scale": (C,), "bias": (C,)}`, only one of them, or `{}`.
        batch_stats: `{"mean": (C,), "var": (C,)}`, optionally with `"count": ()`; `{}` for none.
        x: the input, with C channels along `axis`.
        mutable: True trains, False evaluates. It has no default, so every call says which.
        axis: the channel axis or axes.
        eps: added to the variance; positive in training.
        momentum: weight of the new batch in the running statistics (PyTorch's convention; one
            minus Flax's). A function, such as an optax schedule, is called with the number of
            previous training steps. None is the cumulative average over all batches. "pooled" keeps
            the exact mean and biased variance of all values ever seen, as one set. All except
            numbers need the entries that `init` adds to `batch_stats` for them.
        correction: the batch variance enters the running one multiplied by `n / (n - correction)`:
            1 is PyTorch's unbiased variance, 0 Flax's biased one.
        using: a policy from `bnjax.policies` that sets what to normalize with; by default the batch
            if `mutable`, and the running statistics otherwise. Updates depend only on `mutable`.
        mask: bool, broadcastable to `x`: only True positions enter the statistics. Masked values,
            even NaN, affect neither the other outputs nor any gradient.
        bank: which of several sets of statistics, kept as arrays of K rows, this batch is
            normalized by and moves: a number, or one for each example, int32 (N,). Then the
            examples of a bank share their statistics, and a bank without examples keeps its own.
            Where a traced number is none of 0 to K - 1, the output is NaN, and nothing moves. An
            example that the mask leaves out may have any, such as -1.
        scale: one for each example, (N, C) or broadcastable: multiplied after the learned scale and
            bias, as in class-conditional batch norm and FiLM.
        bias: one for each example, likewise: added last.
        axis_name: name of a mapped axis (`pmap`, `shard_map`, `vmap`), or several, over whose
            devices statistics are pooled, weighted by count. Under plain `jit`, a sharded batch
            needs no name. Evaluation does not communicate.
        axis_index_groups: lists of indices of that axis, of equal sizes; statistics are pooled
            within each list.
        virtual_batch_size: in training, normalize groups of this many examples separately (ghost
            batch norm, Hoffer et al. 2017); the last group may be smaller. The running statistics
            take the average over the groups, weighted by count. Groups are never pooled over
            devices.
        dtype: dtype of `y`; None keeps that of `x` (float32 for integers).

    Returns:
        `(y, batch_stats)`. The statistics are a new dict, in at least float32. A channel whose
        batch statistics are not finite keeps its running ones, as do all channels if too few values
        count (an empty batch, an all-False mask, or at most `correction` values).

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
    checks.static("mutable", mutable)
    x = checks.floating(x)
    axes = checks.feature_axes(axis, x.ndim)
    features = tuple(x.shape[a] for a in axes)
    mask = None if mask is None else checks.mask(mask, x.shape)
    bank, banks = checks.bank(bank, batch_stats, x.shape, axes, mask)
    checks.trees(params, batch_stats, features, momentum, banks)
    stats = {name: jnp.asarray(value) for name, value in batch_stats.items()}
    weight, using = at(bank_rows.row(stats.get("count"), bank), momentum, using)
    settings = Settings(
        axes=axes,
        mutable=mutable,
        tracked=bool(stats),
        eps=eps,
        momentum=None if isinstance(weight, str) else weight,
        pooled=isinstance(weight, str),
        correction=correction,
        axis_name=None if axis_name is None else names(axis_name),
        axis_index_groups=table(axis_index_groups),
        virtual_batch_size=virtual_batch_size,
        dtype=checks.output_dtype(dtype, x),
        using=using,
        banks=banks,
    ).checked(x)
    given = checks.affine_of_examples(scale, bias, x.shape, axes)
    params = {name: jnp.asarray(value) for name, value in params.items()}
    arrays = params, stats, x, mask, bank, given
    with compat.plain_for(x):
        return on_auto_axes(_steps, (*arrays, settings), x, like=(x, stats))


def _steps(
    params: Params,
    batch_stats: BatchStats,
    x: jax.Array,
    mask: jax.Array | None,
    bank: Bank | None,
    given: Params,
    settings: Settings,
) -> tuple[jax.Array, BatchStats]:
    """Partition, measure, pool, update, choose, normalize."""
    sharing, batch = partition.share(x, mask, bank, settings), None
    stats, learned = bank_rows.held(batch_stats, params, bank, settings.banks)
    moved = stats
    if settings.measures:
        batch = shared(sharing, stats.get("mean"))
        if settings.axis_name is not None and sharing.group is None:
            batch = pool(batch, settings.axis_name, settings.axis_index_groups)
        if settings.moves:
            moved = update(stats, batch, sharing.group, settings)
    chosen, first = choose(batch, stats, moved, sharing, settings)

    def normalized(chosen: Moments, first: Affine, learned: Params, given: Params) -> jax.Array:
        parts, origin, factor, shift = applied(chosen, first, learned, given, sharing, settings)
        return partition.join(
            normalize(parts, origin, factor, shift, settings.dtype), parts, x.shape
        )

    if sharing.bank is not None:  # the rows of each example may be as large as x: not kept
        normalized = jax.checkpoint(normalized)
    return normalized(chosen, first, learned, given), bank_rows.put(batch_stats, bank, moved)
