"""Which examples share statistics: the whole batch, virtual batches (ghost batch norm) or banks."""

import dataclasses
import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax import lax

from bnjax.core import banks
from bnjax.core.moments import Axes, other_axes, working_dtype
from bnjax.core.settings import Settings


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["x", "wide", "mask"],
    meta_fields=["axes", "group"],
)
@dataclasses.dataclass(frozen=True)
class Parts:
    """Values divided into parts, each of which has its own statistics.

    Two copies of the values travel together. Reads use `x`, in its own dtype, so that no float32
    copy of half precision is written or kept for the backward pass. Derivatives are taken with
    respect to `wide`, the same values in the working precision: gradients through the statistics
    and through the output are added there, and rounded to the dtype of `x` once.

    Attributes:
        x: the values.
        wide: the values in at least float32.
        mask: bool, with x's rank, True where values count; None for all.
        axes: the axes along which statistics differ, sorted; all others are reduced.
        group: the one of `axes` that enumerates virtual batches, in x and in moments; None if none.
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

    def examples(self) -> chex.Numeric:
        """The number of examples with values that count, broadcastable to the statistics."""
        if not self.reduced:
            return 1
        axis = self.reduced[0]
        if self.mask is None:
            return self.x.shape[axis]
        some = jnp.any(self.mask, self.reduced[1:], keepdims=True)
        unseen = self.x.shape[axis] if self.mask.shape[axis] == 1 else 1
        some = jnp.sum(some, axis, keepdims=True, dtype=jnp.float32) * unseen
        return jnp.squeeze(some, self.reduced)


def whole(x: jax.Array, mask: jax.Array | None, axes: Axes) -> Parts:
    """A single part: all values of a channel share statistics."""
    return Parts(x, x.astype(working_dtype(x.dtype)), mask, axes)


def apart(parts: Parts) -> Parts:
    """Each example has its own statistics; the values keep their shape."""
    batch = parts.reduced[0]
    return dataclasses.replace(parts, axes=tuple(sorted([batch, *parts.axes])), group=batch)


def virtual(parts: Parts, size: int) -> Parts:
    """Virtual batches: groups of `size` examples share statistics (Hoffer et al. 2017).

    The batch axis becomes two, (groups, size), the first of which is an additional feature axis.
    A smaller last group is padded and masked.
    """
    shape, ndim, batch, mask = parts.x.shape, parts.x.ndim, parts.reduced[0], parts.mask
    n = shape[batch]
    known = isinstance(n, int)  # False for symbolic shapes
    size = min(size, max(n, 1)) if known else size
    groups = (n + size - 1) // size
    ragged = size > 1 and (not known or n % size)

    def divide(array: jax.Array) -> jax.Array:
        if ragged:
            fill = [(0, groups * size - n if a == batch else 0, 0) for a in range(ndim)]
            array = lax.pad(array, jnp.zeros((), array.dtype), fill)
        return array.reshape(*array.shape[:batch], groups, size, *array.shape[batch + 1 :])

    if mask is not None or ragged:
        mask = jnp.ones([1] * ndim, bool) if mask is None else mask
        mask = divide(jnp.broadcast_to(mask, (*mask.shape[:batch], n, *mask.shape[batch + 1 :])))
    axes = tuple(sorted([batch, *(a + (a > batch) for a in parts.axes)]))
    return Parts(divide(parts.x), divide(parts.wide), mask, axes, batch)


def join(y: jax.Array, parts: Parts, shape: Axes) -> jax.Array:
    """Join the output of all parts to an array with the original shape."""
    axis = parts.group
    if axis is None or y.shape == shape:
        return y
    merged = y.reshape(*y.shape[:axis], y.shape[axis] * y.shape[axis + 1], *y.shape[axis + 2 :])
    return merged if merged.shape == shape else lax.slice_in_dim(merged, 0, shape[axis], axis=axis)


@dataclasses.dataclass(frozen=True)
class Sharing:
    """Which examples share statistics in a call, and how to broadcast shared values to each.

    Attributes:
        whole: the undivided values.
        size: the number of consecutive examples that share statistics; None for all.
        bank: instead of `size`, the bank of each example, (N,).
        banks: the number of banks.
    """

    whole: Parts
    size: int | None = None
    bank: jax.Array | None = None
    banks: int = 0

    @functools.cached_property
    def parts(self) -> Parts:
        """The values, divided as for measuring."""
        if self.bank is not None:
            return self.each
        return self.whole if self.size is None else virtual(self.whole, self.size)

    @functools.cached_property
    def each(self) -> Parts:
        """The values, with each example as a part."""
        return apart(self.whole)

    def _by_channel(self, mask: jax.Array) -> jax.Array:
        """1 for each example with a value that counts, in each channel; the batch axis first."""
        positions = tuple(axis for axis in self.whole.reduced if axis != self.batch)
        some = jnp.any(mask, positions).astype(jnp.float32)
        return jnp.moveaxis(some, self.batch, 0)

    def of_counted(self, bank: jax.Array) -> jax.Array:
        """The banks of the examples, in range also for masked ones, which may have any number."""
        mask = self.whole.mask
        if mask is None:
            return bank
        counted = jnp.any(mask, tuple(a for a in range(mask.ndim) if a != self.batch))
        return jnp.where(counted, bank, jnp.clip(bank, 0, self.banks - 1))

    @property
    def batch(self) -> int:
        """The axis of the examples."""
        return self.whole.reduced[0]

    @property
    def group(self) -> int | None:
        """The axis of virtual batches in the moments; None for banks, which come first."""
        return None if self.bank is not None else self.parts.group

    def near(self, running: jax.Array | None) -> jax.Array | None:
        """The running mean, if it is a good guess of the means of the parts."""
        return running if self.group is None and self.bank is None else None

    def beside(self, values: jax.Array) -> jax.Array:
        """Reshape running statistics or parameters to broadcast against shared moments."""
        if self.bank is not None and jnp.ndim(values) == len(self.whole.axes):
            return jnp.expand_dims(values, 0)  # one for all banks
        return values if self.group is None else jnp.expand_dims(values, self.group)

    def to_each(self, *values: jax.Array) -> list[jax.Array]:
        """Broadcast shared values to each example; with size 1 if all examples share them."""
        if self.bank is None:
            return [self._repeated(each) for each in values]
        rows = [each for each in values if jnp.ndim(each) and each.shape[0] > 1]
        found = iter(banks.to_examples(rows, self.bank) if rows else ())
        each = [next(found) if jnp.ndim(v) and v.shape[0] > 1 else v for v in values]
        return [jnp.moveaxis(v, 0, self.batch) if jnp.ndim(v) else v for v in each]

    def _repeated(self, values: jax.Array) -> jax.Array:
        if not jnp.ndim(values):
            return values
        if self.group is None:
            return jnp.expand_dims(values, self.batch)
        if values.shape[self.batch] > 1:
            values = jnp.repeat(values, self.parts.x.shape[self.batch + 1], self.batch)
            return lax.slice_in_dim(values, 0, self.whole.x.shape[self.batch], axis=self.batch)
        return values

    def examples(self) -> chex.Numeric:
        """The number of examples that share, broadcastable to their statistics."""
        if self.bank is None:
            return self.parts.examples()
        shape, mask = (len(self.whole.axes) + 1) * (1,), self.whole.mask
        counted = jnp.ones(shape) if mask is None else self._by_channel(mask)
        counted = jnp.broadcast_to(counted, (*self.bank.shape, *counted.shape[1:]))
        return banks.totals([counted], self.bank, self.banks)[0]


def share(x: jax.Array, mask: jax.Array | None, bank: Any, settings: Settings) -> Sharing:
    """Determine which examples share statistics in a call."""
    parts = whole(x, mask, settings.axes)
    if banks.by_example(bank):
        sharing = Sharing(parts, bank=bank, banks=settings.banks or 0)
        return dataclasses.replace(sharing, bank=sharing.of_counted(bank))
    return Sharing(parts, size=settings.virtual_batch_size if settings.measures else None)
