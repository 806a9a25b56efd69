"""A batch as groups that normalize by themselves (ghost batch norm, Hoffer et al. 2017)."""

import jax
import jax.numpy as jnp
from jax import lax

from bnjax.core.moments import Axes, other_axes


def split(
    x: jax.Array, mask: jax.Array | None, axes: Axes, size: int
) -> tuple[jax.Array, jax.Array | None, int, Axes]:
    """The batch axis as (groups, size): x and mask, the axis of the groups, the feature axes.

    The axis of the groups is one more feature axis. A ragged last group is filled up and masked.
    """
    batch = other_axes(x.ndim, axes)[0]
    n = x.shape[batch]
    if isinstance(n, int):  # not if the shape is symbolic
        size = min(size, max(n, 1))
    if mask is not None or n % size:
        mask = jnp.ones([1] * x.ndim, bool) if mask is None else mask
        mask = jnp.broadcast_to(mask, (*mask.shape[:batch], n, *mask.shape[batch + 1 :]))
        if n % size:
            fill = [(0, -n % size if a == batch else 0) for a in range(x.ndim)]
            x, mask = jnp.pad(x, fill), jnp.pad(mask, fill)

    def divide(array: jax.Array) -> jax.Array:
        parts = (array.shape[batch] // size, size)
        return array.reshape(*array.shape[:batch], *parts, *array.shape[batch + 1 :])

    axes = tuple(sorted([batch, *(a + (a > batch) for a in axes)]))
    return divide(x), None if mask is None else divide(mask), batch, axes


def join(y: jax.Array, group: int, shape: Axes) -> jax.Array:
    """The inverse of `split`, for an array of this shape."""
    rows = y.shape[group] * y.shape[group + 1]
    merged = y.reshape(*y.shape[:group], rows, *y.shape[group + 2 :])
    return merged if rows == shape[group] else lax.slice_in_dim(merged, 0, shape[group], axis=group)
