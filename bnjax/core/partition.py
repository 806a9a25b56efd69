"""Who shares statistics: the whole batch, or virtual batches (ghost batch norm)."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from bnjax.core.moments import Axes, other_axes, working_dtype


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["x", "wide", "mask"],
    meta_fields=["axes", "group"],
)
@dataclasses.dataclass(frozen=True)
class Parts:
    """Values, those of one part beside those of another, each part with statistics of its own.

    Two copies of the values travel together. What is read is `x`, in its own dtype, so that no
    float32 copy of half precision is ever written, or kept for a backward pass. What derivatives
    are taken to is `wide`, the same in the working precision: the gradient by the statistics and
    that by the output are added in it, and rounded to the dtype of `x` once.

    Attributes:
        x: the values.
        wide: the values in float32 at least.
        mask: bool, of x's rank, the positions that count; None for all.
        axes: the axes along which statistics differ, sorted; all others are reduced.
        group: which of them counts virtual batches, in x and in the moments alike; None for none.
    """

    x: jax.Array
    wide: Any
    mask: jax.Array | None
    axes: Axes
    group: int | None = None

    @property
    def reduced(self) -> Axes:
        """The axes along which statistics are shared."""
        return other_axes(self.x.ndim, self.axes)

    @property
    def features(self) -> Axes:
        """The shape of the statistics."""
        return tuple(self.x.shape[axis] for axis in self.axes)


def whole(x: jax.Array, mask: jax.Array | None, axes: Axes, group: int | None = None) -> Parts:
    """All values of a channel share its statistics."""
    return Parts(x, x.astype(working_dtype(x.dtype)), mask, axes, group)


def virtual(x: jax.Array, mask: jax.Array | None, axes: Axes, size: int) -> Parts:
    """So many examples at a time share statistics (Hoffer et al. 2017).

    The batch axis becomes two, (groups, size), of which the first is one more feature axis. A
    ragged last group is filled up and masked.
    """
    batch = other_axes(x.ndim, axes)[0]
    n = x.shape[batch]
    known = isinstance(n, int)  # not if the shape is symbolic
    size = min(size, max(n, 1)) if known else size
    groups = (n + size - 1) // size
    ragged = not known or n % size

    def divide(array: jax.Array) -> jax.Array:
        if ragged:
            fill = [(0, groups * size - n if a == batch else 0, 0) for a in range(x.ndim)]
            array = lax.pad(array, jnp.zeros((), array.dtype), fill)
        return array.reshape(*array.shape[:batch], groups, size, *array.shape[batch + 1 :])

    if mask is not None or ragged:
        mask = jnp.ones([1] * x.ndim, bool) if mask is None else mask
        mask = jnp.broadcast_to(mask, (*mask.shape[:batch], n, *mask.shape[batch + 1 :]))
    axes = tuple(sorted([batch, *(a + (a > batch) for a in axes)]))
    return whole(divide(x), None if mask is None else divide(mask), axes, batch)


def join(y: jax.Array, parts: Parts, shape: Axes) -> jax.Array:
    """The output of all parts as one array of the shape that was divided."""
    if parts.group is None:
        return y
    axis = parts.group
    merged = y.reshape(*y.shape[:axis], y.shape[axis] * y.shape[axis + 1], *y.shape[axis + 2 :])
    return merged if merged.shape == shape else lax.slice_in_dim(merged, 0, shape[axis], axis=axis)
