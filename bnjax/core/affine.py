"""`(x - origin) * scale + shift` per channel, and its derivative."""

import functools

import chex
import jax
import jax.numpy as jnp
from jax import lax

from bnjax.core import compat
from bnjax.core.moments import Axes, Moments, at_least, deviations
from bnjax.core.partition import Parts
from bnjax.core.sums import spread


def composed(dtype: jax.typing.DTypeLike, *maps: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Compose affine maps, applied in order; each has `scale`, `bias`, both or neither."""
    maps = tuple(each for each in maps if each)
    if len(maps) < 2:
        return maps[0] if maps else {}
    scale, bias = None, None
    for each in maps:
        wide = {key: at_least(dtype, value) for key, value in each.items()}
        if (factor := wide.get("scale")) is not None:
            scale = factor if scale is None else scale * factor
            bias = None if bias is None else bias * factor
        if (shift := wide.get("bias")) is not None:
            bias = shift if bias is None else bias + shift
    named = {"scale": scale, "bias": bias}
    return {key: value for key, value in named.items() if value is not None}


def normalize(
    parts: Parts,
    origin: jax.Array,
    scale: jax.Array,
    shift: jax.Array,
    dtype: jax.typing.DTypeLike,
) -> jax.Array:
    """`(x - origin) * scale + shift` as `dtype`; each broadcasts against x or its parts."""
    if parts.group is not None:  # some may be shared by all parts
        scale, shift = (jnp.broadcast_to(each, parts.features) for each in (scale, shift))
    apply = _affine.fun if compat.plain.value else _affine
    return apply(parts, origin, scale, shift, dtype)


def as_varying(
    parts: Parts, origin: jax.Array, scale: jax.Array, shift: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Mark scale and shift as varying wherever x does, together: one sum in the backward pass."""
    new = compat.varying_axes(parts.x) - compat.varying_axes(scale) - compat.varying_axes(shift)
    if new:
        scale, shift = jnp.broadcast_arrays(scale, shift)
        scale, shift = lax.pcast(jnp.stack([scale, shift]), tuple(sorted(new)), to="varying")
    return origin, scale, shift


# Under jit, it is traced, differentiated and lowered once for all layers of the same shape.
@jax.jit
def scale_and_shift(
    params: dict[str, jax.Array], moments: Moments, eps: chex.Numeric
) -> tuple[jax.Array, jax.Array]:
    """The factor for x minus the origin, and the shift to add."""
    params = {key: at_least(moments.m2.dtype, value) for key, value in params.items()}
    if moments.offset is None:
        var = moments.m2  # its count is 1
    else:  # a batch without values is normalized with mean 0 and variance 1
        var = jnp.where(moments.count > 0, moments.variance(), 1)
    # Not rsqrt: its derivative forms var^-1.5, which underflows from a deviation of 1e13 on.
    scale = params.get("scale", 1) / jnp.sqrt(var + eps)
    shift = params.get("bias", jnp.zeros_like(scale))
    return scale, shift if moments.offset is None else shift - moments.offset * scale


@functools.partial(jax.custom_jvp, nondiff_argnums=(4,))
def _affine(
    parts: Parts,
    origin: jax.Array,
    scale: jax.Array,
    shift: jax.Array,
    dtype: jax.typing.DTypeLike,
) -> jax.Array:
    """`(x - origin) * scale + shift` as `dtype`."""
    reduced = parts.reduced
    values = _guard(parts.x, parts.mask, deviations(parts.x, origin, reduced))
    y = values * jnp.expand_dims(scale, reduced) + jnp.expand_dims(shift, reduced)
    return y.astype(dtype)


@_affine.defjvp
def _affine_jvp(dtype, primals, tangents):  # pyright: ignore[reportUnusedFunction]
    parts, origin, scale, shift = primals
    d_parts, d_origin, d_scale, d_shift = tangents
    dx, d_shift = d_parts.wide, d_shift - d_origin * scale
    y = _traced_once(parts, origin, scale, shift, dtype)
    return y, _tangent(
        parts.x, parts.mask, origin, scale, dx, d_scale, d_shift, parts.reduced, dtype
    )


# For all layers of the same shape.
_traced_once = jax.jit(_affine, static_argnums=4, inline=True)


# The plain product rule, arranged for its transpose, where `spread` becomes one pass for both sums.
# With checkpoint, the backward pass keeps x itself and recomputes the deviations.
@functools.partial(jax.checkpoint, prevent_cse=False, static_argnums=(7, 8))
def _tangent(x, mask, origin, scale, dx, d_scale, d_shift, reduced: Axes, dtype):
    by_x = _guard(x, mask, dx * jnp.expand_dims(scale, reduced))
    by_scale, by_shift = spread((d_scale, d_shift), x.shape, reduced)
    by_scale = _guard(x, mask, deviations(x, origin, reduced)) * by_scale
    return (by_x + by_scale + by_shift).astype(dtype)


def _guard(x: jax.Array, mask: jax.Array | None, values: jax.Array) -> jax.Array:
    """Zero where a masked x is not finite, because a zero cotangent times NaN is NaN."""
    return values if mask is None else jnp.where(mask | jnp.isfinite(x), values, 0)
