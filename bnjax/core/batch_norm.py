"""Batch normalization as pure functions: plain dicts in, plain dicts out."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from bnjax.core import checks
from bnjax.core import partition as virtual_batches
from bnjax.core.devices import AxisName, Groups, pool
from bnjax.core.moments import (
    Axes,
    Moments,
    deviations,
    measure,
    other_axes,
    working_dtype,
)
from bnjax.core.sharding import on_auto_axes, varying_axes
from bnjax.core.sums import spread

Params = dict[str, jax.Array]
BatchStats = dict[str, jax.Array]

_PARAMS = (("scale", "bias"), ("scale",), ("bias",), ())
_BATCH_STATS = (("mean", "var"), ("mean", "var", "count"), ())
_INIT = "bnjax.init makes it."


def init(
    num_features: int,
    *,
    affine: bool = True,
    track_running_stats: bool = True,
    momentum: float | None = 0.1,
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> tuple[Params, BatchStats]:
    """Parameters and running statistics of a new batch norm.

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
        kept = working_dtype(dtype)
        batch_stats = {"mean": jnp.zeros(num_features, kept), "var": jnp.ones(num_features, kept)}
        if momentum is None:
            batch_stats["count"] = jnp.zeros((), jnp.int32)
    return params, batch_stats


def batch_norm(
    params: Mapping[str, jax.Array],
    batch_stats: Mapping[str, jax.Array],
    x: jax.Array,
    *,
    mutable: bool,
    axis: int | Sequence[int] = -1,
    eps: float = 1e-5,
    momentum: float | None = 0.1,
    correction: int = 1,
    mask: jax.Array | None = None,
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
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        x = x.astype(working_dtype(x.dtype))
    axes = checks.feature_axes(axis, x.ndim)
    _check_trees(params, batch_stats, tuple(x.shape[a] for a in axes), momentum)
    if mask is not None:
        mask = checks.mask(mask, x.shape)
    by_batch = mutable or not batch_stats
    checks.momentum(momentum)
    checks.eps(eps, training=by_batch)
    checks.correction(correction)
    checks.virtual_batch_size(virtual_batch_size, axis_index_groups)
    if by_batch:
        devices = checks.devices(axis_name, axis_index_groups)
        checks.several_values(x, axes, devices, correction, virtual_batch_size)
    run = functools.partial(
        _normalized,
        axes=axes,
        by_batch=by_batch,
        moves=mutable and bool(batch_stats),
        correction=correction,
        axis_name=axis_name,
        axis_index_groups=axis_index_groups,
        virtual_batch_size=virtual_batch_size,
        dtype=dtype or x.dtype,
    )
    stats = dict(batch_stats)
    return on_auto_axes(run, (dict(params), stats, x, mask, eps, momentum), x, like=(x, stats))


def _normalized(
    params: Params,
    batch_stats: BatchStats,
    x: jax.Array,
    mask: jax.Array | None,
    eps: Any,
    momentum: Any,
    *,
    axes: Axes,
    by_batch: bool,
    moves: bool,
    correction: Any,
    axis_name: AxisName | None,
    axis_index_groups: Groups | None,
    virtual_batch_size: int | None,
    dtype: jax.typing.DTypeLike,
) -> tuple[jax.Array, BatchStats]:
    """`batch_norm` of checked arguments: by its own statistics if `by_batch`."""
    group, shape = None, x.shape
    if by_batch and virtual_batch_size is not None:
        x, mask, group, axes = virtual_batches.split(x, mask, axes, virtual_batch_size)
    wide = x.astype(working_dtype(x.dtype))
    if by_batch:
        moments = measure(x, axes, mask, wide, apart=group is not None)
        origin, offset = moments.origin, moments.offset
        if axis_name is not None and group is None:
            moments = pool(moments, axis_name, axis_index_groups, batch_stats.get("mean"))
            offset = (moments.origin - origin) + moments.offset
        if moves:
            names = axis_name if isinstance(axis_name, str | None) else tuple(axis_name)
            shares = weights(momentum)
            batch_stats = _moved(batch_stats, moments, shares, correction, group, names)
    else:
        origin, var = (_at_least(x.dtype, batch_stats[key]) for key in ("mean", "var"))
        offset = None
        moments = Moments(jnp.ones((), var.dtype), origin, jnp.zeros_like(origin), var)
    over = None if group is None else axes.index(group)
    scale, shift = _scale_and_shift(params, moments, offset, eps, over)
    scale, shift = _as_varying(scale, shift, x)
    y = _affine(x, wide, mask, origin, scale, shift, other_axes(x.ndim, axes), dtype)
    return (y if group is None else virtual_batches.join(y, group, shape)), batch_stats


# What is compiled by itself is traced, differentiated and lowered once for all layers of a shape.
@functools.partial(jax.jit, static_argnums=4)
def _scale_and_shift(
    params: Params, moments: Moments, offset: jax.Array | None, eps: Any, over: int | None
) -> tuple[jax.Array, jax.Array]:
    """What x minus the origin is multiplied by, and what is added.

    The offset is that of the mean from x's origin, None if that is the mean itself; `over` is the
    axis of groups.
    """
    params = {key: _at_least(moments.m2.dtype, value) for key, value in params.items()}
    if over is not None:
        params = {key: jnp.expand_dims(value, over) for key, value in params.items()}
    # A batch without values is normalized as if it had mean 0 and variance 1.
    var = jnp.where(moments.count > 0, moments.variance(), 1)
    # Not rsqrt: its derivative forms var^-1.5, which underflows from a deviation of 1e13 on.
    scale = params.get("scale", 1) / jnp.sqrt(var + eps)
    shift = params.get("bias", jnp.zeros_like(scale))
    return scale, shift if offset is None else shift - offset * scale


@functools.partial(jax.jit, static_argnums=(4, 5))
def _moved(
    batch_stats: BatchStats,
    moments: Moments,
    shares: tuple[Any, Any] | None,
    correction: Any,
    group: int | None,
    axis_name: AxisName | None,
) -> BatchStats:
    """The running statistics after the batch, weighed by `shares`: see `weights`."""
    return move(batch_stats, *_summary(moments, correction, group, axis_name), shares)


def weights(momentum: Any) -> tuple[Any, Any] | None:
    """Those of the old statistics and of the new; None for the cumulative average."""
    return None if momentum is None else (1 - momentum, momentum)


def _check_trees(
    params: Mapping[str, jax.Array],
    batch_stats: Mapping[str, jax.Array],
    features: Axes,
    momentum: float | None,
) -> None:
    checks.tree("params", params, _PARAMS, _INIT)
    checks.tree("batch_stats", batch_stats, _BATCH_STATS, _INIT)
    checks.shapes("params", params, features)
    checks.shapes("batch_stats", batch_stats, features)
    if momentum is None and batch_stats:
        repair = "The cumulative average needs the count: bnjax.init(..., momentum=None)."
        checks.tree("batch_stats", batch_stats, _BATCH_STATS[1:2], repair)


def _summary(
    moments: Moments, correction: int, group: int | None, axis_name: AxisName | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Mean and variance for the running statistics, and in which channels there are any.

    Groups of a virtual batch size, on all devices, are averaged by their counts.
    """
    counts = moments.count > correction
    mean, var = moments.mean, moments.variance(correction)
    if group is None:
        return mean, var, counts
    weight = jnp.broadcast_to(jnp.where(counts, moments.count, 0), mean.shape)
    sums = jnp.stack([weight.astype(mean.dtype), weight * mean, weight * var]).sum(group + 1)
    if axis_name is not None:
        sums = lax.psum(sums, axis_name)
    total = jnp.real(sums[0])
    some = jnp.maximum(total, 1)
    return sums[1] / some, jnp.real(sums[2]) / some, total > 0


def move(
    batch_stats: Mapping[str, jax.Array],
    mean: jax.Array,
    var: jax.Array,
    counts: jax.Array,
    shares: tuple[Any, Any] | None,
) -> BatchStats:
    """The running statistics after one more batch, in each channel where that is a number."""
    counts = counts & jnp.isfinite(mean) & jnp.isfinite(var)
    updated, channels = {}, ()
    if "count" in batch_stats:
        # The statistics of several layers may be stacked, as by nn.scan: one count for each.
        channels = tuple(range(jnp.ndim(batch_stats["count"]), counts.ndim))
        updated["count"] = batch_stats["count"] + jnp.any(counts, channels).astype("int32")
    for key, new in (("mean", mean), ("var", var)):
        old = _at_least(new.dtype if jnp.iscomplexobj(new) else jnp.float32, batch_stats[key])
        if shares is None:
            share = 1 / jnp.maximum(updated["count"], 1).astype(jnp.real(old).dtype)
            share = jnp.expand_dims(share, channels)
            of_old, of_new = 1 - share, share
        else:
            of_old, of_new = shares
        updated[key] = jnp.where(counts, of_old * old + of_new * new.astype(old.dtype), old)
    return {key: updated[key] for key in batch_stats}


def _as_varying(scale: jax.Array, shift: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Values that are alike on all devices, used where x differs: one sum in a backward pass."""
    new = varying_axes(x) - varying_axes(scale) - varying_axes(shift)
    if not new:
        return scale, shift
    both = lax.pcast(jnp.stack([scale, shift]), tuple(sorted(new)), to="varying")
    return both[0], both[1]


@functools.partial(jax.custom_jvp, nondiff_argnums=(6, 7))
def _affine(
    x: jax.Array,
    wide: jax.Array,
    mask: jax.Array | None,
    origin: jax.Array,
    scale: jax.Array,
    shift: jax.Array,
    reduced: Axes,
    dtype: jax.typing.DTypeLike,
) -> jax.Array:
    """`(x - origin) * scale + shift` as `dtype`; the derivative to x is taken as that to `wide`."""
    values = _guard(x, mask, deviations(x, origin, reduced))
    y = values * jnp.expand_dims(scale, reduced) + jnp.expand_dims(shift, reduced)
    return y.astype(dtype)


@_affine.defjvp
def _affine_jvp(reduced, dtype, primals, tangents):  # pyright: ignore[reportUnusedFunction]
    x, wide, mask, origin, scale, shift = primals
    _, dx, _, d_origin, d_scale, d_shift = tangents

    y = _affine(x, wide, mask, origin, scale, shift, reduced, dtype)
    return y, _tangent(x, mask, origin, scale, dx, d_origin, d_scale, d_shift, reduced, dtype)


# The plain product rule, arranged for its transpose, where `spread` becomes one reading for both
# sums. With checkpoint, a backward pass keeps x itself and recomputes the deviations.
@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=(8, 9))
def _tangent(x, mask, origin, scale, dx, d_origin, d_scale, d_shift, reduced, dtype):
    by_x = _guard(x, mask, dx * jnp.expand_dims(scale, reduced))
    by_scale, by_shift = spread((d_scale, d_shift - d_origin * scale), x.shape, reduced)
    by_scale = _guard(x, mask, deviations(x, origin, reduced)) * by_scale
    return (by_x + by_scale + by_shift).astype(dtype)


def _guard(x: jax.Array, mask: jax.Array | None, values: jax.Array) -> jax.Array:
    """Zero where a masked x is no number: it must not meet a zero cotangent, 0 * NaN is NaN."""
    return values if mask is None else jnp.where(mask | jnp.isfinite(x), values, 0)


def _at_least(dtype: jax.typing.DTypeLike, value: jax.Array) -> jax.Array:
    """`value` in its own dtype, but no narrower than float32 or `dtype`."""
    value = jnp.asarray(value)
    with jax.numpy_dtype_promotion("standard"):
        return value.astype(jnp.promote_types(value.dtype, working_dtype(dtype)))
