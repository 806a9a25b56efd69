"""Batch normalization as pure functions: plain dicts in, plain dicts out."""

import functools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from bnjax import _checks
from bnjax.moments import Axes, Moments, deviations, measure, other_axes, working_dtype

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
        ValueError: `num_features` is negative.

    >>> params, batch_stats = init(3)
    >>> batch_stats["var"].tolist()
    [1.0, 1.0, 1.0]
    """
    if num_features < 0:
        raise ValueError(f"`num_features` must not be negative, got {num_features}.")
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
    axes = _checks.feature_axes(axis, x.ndim)
    features = tuple(x.shape[a] for a in axes)
    _check_trees(params, batch_stats, features, momentum)
    if mask is not None:
        mask = _checks.mask(mask, x.shape)
    by_batch = mutable or not batch_stats
    _checks.momentum(momentum)
    _checks.eps(eps, training=by_batch)
    reduced = other_axes(x.ndim, axes)
    updated = dict(batch_stats)
    if by_batch:
        _checks.several_values(x, reduced, correction)
        moments = measure(x, axes, mask)
        origin, offset = moments.origin, moments.offset
        # A batch without values is normalized as if it had mean 0 and variance 1.
        var = jnp.where(moments.count > 0, moments.variance(), 1)
        if mutable and batch_stats:
            updated = _move(batch_stats, moments, momentum, correction)
    else:
        origin, var = (_at_least(x.dtype, batch_stats[key]) for key in ("mean", "var"))
        offset = jnp.zeros_like(origin)
    scale = lax.rsqrt(var + eps) * params.get("scale", 1)
    shift = params.get("bias", 0) - offset * scale
    return _affine(x, mask, origin, scale, shift, reduced, dtype or x.dtype), updated


def _check_trees(
    params: Mapping[str, jax.Array],
    batch_stats: Mapping[str, jax.Array],
    features: Axes,
    momentum: float | None,
) -> None:
    _checks.tree("params", params, _PARAMS, _INIT)
    _checks.tree("batch_stats", batch_stats, _BATCH_STATS, _INIT)
    _checks.shapes("params", params, features)
    _checks.shapes("batch_stats", batch_stats, features)
    if momentum is None and batch_stats:
        repair = "The cumulative average needs the count: bnjax.init(..., momentum=None)."
        _checks.tree("batch_stats", batch_stats, _BATCH_STATS[1:2], repair)


def _move(
    batch_stats: Mapping[str, jax.Array],
    moments: Moments,
    momentum: float | None,
    correction: int,
) -> BatchStats:
    """The running statistics after one more batch, in each channel where that is a number."""
    batch = {"mean": moments.mean, "var": moments.variance(correction)}
    counts = jnp.isfinite(batch["mean"]) & jnp.isfinite(batch["var"])
    counts &= moments.count > correction
    updated = {}
    if "count" in batch_stats:
        updated["count"] = batch_stats["count"] + jnp.any(counts)
    for key, new in batch.items():
        old = _at_least(jnp.float32, batch_stats[key])
        weight = (
            momentum
            if momentum is not None
            else 1 / jnp.maximum(updated["count"], 1).astype(old.dtype)
        )
        moved = (1 - weight) * old + weight * new.astype(old.dtype)
        updated[key] = jnp.where(counts, moved, old)
    return {key: updated[key] for key in batch_stats}


@functools.partial(jax.custom_jvp, nondiff_argnums=(5, 6))
def _affine(
    x: jax.Array,
    mask: jax.Array | None,
    origin: jax.Array,
    scale: jax.Array,
    shift: jax.Array,
    reduced: Axes,
    dtype: jax.typing.DTypeLike,
) -> jax.Array:
    """`(x - origin) * scale + shift` as `dtype`."""
    values = _guard(x, mask, deviations(x, origin, reduced))
    y = values * jnp.expand_dims(scale, reduced) + jnp.expand_dims(shift, reduced)
    return y.astype(dtype)


@_affine.defjvp
def _affine_jvp(reduced, dtype, primals, tangents):  # pyright: ignore[reportUnusedFunction]
    x, mask, origin, scale, shift = primals
    dx, _, d_origin, d_scale, d_shift = tangents

    # The plain product rule, arranged for its transpose. With checkpoint, a backward pass keeps x
    # itself and recomputes the deviations. The barriers give each pass over x and over the
    # cotangent a reading of its own: without them XLA writes one shared float32 copy for all.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def tangent(x, origin, scale, dx, d_scale, d_shift):
        x, origin = lax.optimization_barrier((x, origin))
        by_x = _guard(x, mask, dx * jnp.expand_dims(scale, reduced))
        by_scale = _guard(x, mask, deviations(x, origin, reduced)) * jnp.expand_dims(
            d_scale, reduced
        )
        by_shift = jnp.broadcast_to(jnp.expand_dims(d_shift, reduced), x.shape)
        apart = lax.optimization_barrier((by_scale.astype(dtype), by_shift.astype(dtype)))
        return by_x.astype(dtype) + (apart[0] + apart[1])

    y = _affine(x, mask, origin, scale, shift, reduced, dtype)
    return y, tangent(x, origin, scale, dx, d_scale, d_shift - d_origin * scale)


def _guard(x: jax.Array, mask: jax.Array | None, values: jax.Array) -> jax.Array:
    """Zero where a masked x is no number: it must not meet a zero cotangent, 0 * NaN is NaN."""
    return values if mask is None else jnp.where(mask | jnp.isfinite(x), values, 0)


def _at_least(dtype: jax.typing.DTypeLike, value: jax.Array) -> jax.Array:
    """`value` in its own dtype, but no narrower than float32 or `dtype`."""
    value = jnp.asarray(value)
    return value.astype(jnp.promote_types(value.dtype, working_dtype(dtype)))
