"""Moments of a set of values, and the exact merge of two sets.

All pooling of statistics (a batch, a mask, devices, micro-batches, a data set) uses `Moments`. The
mean is kept as a sum of two numbers, `origin + offset`: the origin is a typical value of the data,
so `x - origin` is exact and as small as the deviations, and the small `offset` carries digits that
do not fit into the mean itself.
"""

from collections.abc import Callable, Sequence
from typing import Any, dataclass_transform

import chex
import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

Axes = tuple[int, ...]

_STATISTICS = "bnjax.statistics"  # what `remat_policy` keeps


@dataclass_transform(frozen_default=True)  # type checkers do not know `chex.dataclass`
def _frozen(cls: type) -> Any:
    return chex.dataclass(cls, frozen=True, mappable_dataclass=False)


@_frozen
class Moments:
    """Count, mean and sum of squared deviations of a set of values, per channel.

    Attributes:
        count: how many values were seen; real, shape () or (C,).
        origin: a reference point near the values, shape (C,).
        offset: mean minus origin, shape (C,); None if running statistics are used unchanged.
        m2: sum of |value - mean|^2, real, shape (C,).
    """

    count: jax.Array
    origin: jax.Array
    offset: jax.Array
    m2: jax.Array

    @property
    def mean(self) -> jax.Array:
        """The mean, rounded to the working precision."""
        return self.origin + self.offset

    def variance(self, correction: chex.Numeric = 0) -> jax.Array:
        """`m2 / (count - correction)`: 0 gives the biased variance, 1 the unbiased one.

        Where count <= correction the variance is undefined, and the result is m2, which is 0.
        """
        return self.m2 / jnp.maximum(self.count - correction, 1)


def merge(a: Moments, b: Moments) -> Moments:
    """Moments of the union of two disjoint sets (Chan, Golub and LeVeque 1983).

    `m2 = a.m2 + b.m2 + delta^2 * a.count * b.count / count`, where delta is the difference of the
    means, taken separately for offsets and origins so that nothing cancels. Either set may be
    empty.
    """
    origin = jnp.where(a.count > 0, a.origin, b.origin)
    from_origin_a = (a.origin - origin) + a.offset
    from_origin_b = (b.origin - origin) + b.offset
    count = a.count + b.count
    weight = b.count / jnp.maximum(count, 1)
    delta = jnp.where((a.count > 0) & (b.count > 0), from_origin_b - from_origin_a, 0)
    offset = jnp.where(a.count > 0, from_origin_a + delta * weight, from_origin_b)
    return Moments(count, origin, offset, a.m2 + b.m2 + abs2(delta) * a.count * weight)


def remat_policy(*applied: Any, **to: Any) -> Callable[..., bool]:
    """A policy for `jax.checkpoint` and `nn.remat`: save what is expensive, recompute the rest.

    Guide: examples/guides/numerics_and_speed.md

    It saves the outputs of convolutions and matrix products, and the statistics of batch norms, so
    the backward pass repeats no reductions and no communication. Normalization, activations and
    sums are recomputed. About half of the usual memory is kept between the passes.

    Raises:
        TypeError: the function itself is passed as the policy, without `()`.

    >>> from flax import linen as nn
    >>> Block = nn.remat(nn.Sequential, policy=remat_policy())
    """
    if applied or to:
        raise TypeError(
            "`policy` must be what bnjax.remat_policy() returns, got the function itself. Call it, "
            "as in nn.remat(Block, policy=bnjax.remat_policy())."
        )
    return jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_saveable,
        jax.checkpoint_policies.save_only_these_names(_STATISTICS),
    )


def kept(statistic: jax.Array) -> jax.Array:
    """Name a value so that `remat_policy` saves it."""
    return checkpoint_name(statistic, _STATISTICS)


def deviations(x: jax.Array, origin: jax.Array, reduced: Axes) -> jax.Array:
    """`x - origin` in the working precision, with one origin per channel."""
    return x.astype(working_dtype(x.dtype)) - jnp.expand_dims(origin, reduced)


def where(mask: jax.Array | None, values: jax.Array) -> jax.Array:
    """The values, with zeros where the mask is False."""
    return values if mask is None else jnp.where(mask, values, 0)


def abs2(x: jax.Array) -> jax.Array:
    """`|x|^2`, real."""
    return (
        lax.square(jnp.real(x)) + lax.square(jnp.imag(x)) if jnp.iscomplexobj(x) else lax.square(x)
    )


def working_dtype(dtype: jax.typing.DTypeLike) -> jnp.dtype:
    """The dtype in which to compute statistics of `dtype`: at least float32."""
    exact = jnp.issubdtype(dtype, jnp.inexact) and jnp.finfo(dtype).bits >= 32
    return jnp.dtype(dtype if exact else jnp.float32)


def at_least(dtype: jax.typing.DTypeLike, value: chex.Array) -> jax.Array:
    """`value`, promoted to at least float32 and `dtype`."""
    value = jnp.asarray(value)
    with jax.numpy_dtype_promotion("standard"):
        wide = jnp.promote_types(working_dtype(value.dtype), working_dtype(dtype))
    return value.astype(wide)


def other_axes(ndim: int, axes: Sequence[int]) -> Axes:
    """The axes that are not in `axes`."""
    return tuple(i for i in range(ndim) if i not in axes)
