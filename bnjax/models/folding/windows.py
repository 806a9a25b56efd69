"""Where a conv reads its input: strides, dilations, padding and groups."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax import lax

Pads = tuple[tuple[int, int], ...]
_BY_VALUES = ("CIRCULAR", "REFLECT")


@dataclasses.dataclass(frozen=True)
class Window:
    """The window of a conv; that of a dense layer has no spatial axes.

    Attributes:
        size: the size of the kernel along each spatial axis.
        strides: the stride along each.
        dilation: the dilation of the kernel along each.
        input_dilation: the dilation of the input along each.
        padding: as for `lax`, or "CAUSAL", "CIRCULAR" or "REFLECT".
        groups: the number of feature groups.
    """

    size: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    input_dilation: tuple[int, ...] = ()
    padding: str | Pads = ()
    groups: int = 1

    @property
    def extent(self) -> tuple[int, ...]:
        """The size of the dilated kernel."""
        return tuple((k - 1) * d + 1 for k, d in zip(self.size, self.dilation, strict=True))

    @property
    def by_values(self) -> bool:
        """Whether it pads with values of the input."""
        return self.padding in _BY_VALUES

    @property
    def may_pad(self) -> bool:
        """Whether inputs of any size are padded."""
        if isinstance(self.padding, str):
            return self.padding != "VALID" and max(self.extent, default=1) > 1
        return any(any(pair) for pair in self.padding)

    def pads(self, shape: Sequence[int]) -> Pads:
        """The padding before and after each spatial axis, for an input of this shape."""
        if self.padding in _BY_VALUES:
            return tuple(((k - 1) // 2, k // 2) for k in self.extent)
        if self.padding == "CAUSAL":
            return tuple((k - 1, 0) for k in self.extent)
        if isinstance(self.padding, str):
            each = zip(self._spatial(shape), self.extent, self.strides, strict=True)
            sizes = [extent if stride == 1 else size for size, extent, stride in each]
            found = lax.padtype_to_pads(sizes, self.extent, self.strides, self.padding)
            return tuple((int(low), int(high)) for low, high in found)
        return self.padding

    def output(self, shape: Sequence[int], features: int) -> tuple[int, ...]:
        """The shape of the output for an input of this shape."""
        each = zip(
            *(self._spatial(shape), self.input_dilation, self.pads(shape)),
            *(self.extent, self.strides),
            strict=True,
        )
        spatial = (
            (max((n - 1) * dilation + 1, 0) + sum(pair) - extent) // stride + 1
            for n, dilation, pair, extent, stride in each
        )
        return (*shape[: len(shape) - len(self.size) - 1], *spatial, features)

    def _spatial(self, shape: Sequence[int]) -> tuple[int, ...]:
        return tuple(shape[len(shape) - len(self.size) - 1 : -1])


def window_of(layer: Any) -> Window:
    """The window of a linen or nnx conv."""
    size = layer.kernel_size
    size = (size,) if isinstance(size, int) else tuple(size)

    def each(value: Any) -> tuple[int, ...]:
        return (
            (value or 1,) * len(size) if value is None or isinstance(value, int) else tuple(value)
        )

    padding = layer.padding
    if isinstance(padding, int):
        padding = (padding,) * len(size)
    if not isinstance(padding, str):
        padding = tuple((p, p) if isinstance(p, int) else (int(p[0]), int(p[1])) for p in padding)
    dilations = each(layer.kernel_dilation), each(layer.input_dilation)
    return Window(size, each(layer.strides), *dilations, padding, layer.feature_group_count)


Taps = tuple[tuple[int, ...], ...]


def taps(host: Window, other: Window, shape: Sequence[int]) -> Taps | str:
    """For each tap of a kernel, the tap of another that reads the same input value, or -1.

    Args:
        host: the window of the first kernel.
        other: the window of the other.
        shape: the shape of their input.

    Returns:
        The taps along each spatial axis, or why the other kernel can't be merged into the first.
    """
    if host.strides != other.strides:
        return "its strides differ"
    if host.input_dilation != other.input_dilation:
        return "its input dilation differs"
    if other.groups % host.groups:
        return "its number of groups is not a multiple of the other's"
    pads = host.pads(shape), other.pads(shape)
    if host.padding != other.padding and any(itertools.chain(*pads[1])):
        if host.by_values or other.by_values:
            return "it pads with other values"
    found = []
    for axis, size in enumerate(host.size):
        here = np.arange(size) * host.dilation[axis] - pads[0][axis][0]
        there = np.arange(other.size[axis]) * other.dilation[axis] - pads[1][axis][0]
        if not np.isin(there, here).all():
            return "its kernel reaches beyond the other's"
        at = {position: number for number, position in enumerate(there)}
        found.append(tuple(at.get(position, -1) for position in here))
    return tuple(found)
