"""How one array of a layer lies in PyTorch and in Flax."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Layout(NamedTuple):
    """A layout of a Flax array, as what it takes to reach PyTorch's.

    Flax: dense kernels (in, out), convs (*kernel, in / groups, out). PyTorch: (out, in), and
    (out, in / groups, *kernel). The kernel of a Flax `ConvTranspose` is (*kernel, in, out) and
    spatially flipped against PyTorch's (in, out, *kernel), unless it has `transpose_kernel=True`:
    then it is (*kernel, out, in), not flipped, and so lies as that of a conv does.
    """

    axes: tuple[int, ...]
    flipped: tuple[int, ...] = ()
    # Of a dense layer after a flatten: (C, *spatial), the order in which PyTorch flattens.
    unflattened: tuple[int, ...] = ()

    def to_torch(self, array: np.ndarray) -> np.ndarray:
        """The array as PyTorch has it."""
        if self.unflattened:
            channels, *spatial = self.unflattened
            array = np.moveaxis(array.reshape(*spatial, channels, -1), -2, 0)
            array = array.reshape(np.prod(self.unflattened), -1)
        return np.flip(array, self.flipped).transpose(self.axes)

    def to_flax(self, array: np.ndarray) -> np.ndarray:
        """The array as Flax has it."""
        array = np.flip(array.transpose(np.argsort(self.axes)), self.flipped)
        if self.unflattened:
            array = np.moveaxis(array.reshape(*self.unflattened, -1), 0, -2)
            array = array.reshape(np.prod(self.unflattened), -1)
        return array

    def torch_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape that an array of this shape in Flax has in PyTorch."""
        return tuple(shape[axis] for axis in self.axes)


def layout(
    leaf: str, ndim: int, *, transposed: bool = False, unflattened: Sequence[int] | None = None
) -> Layout:
    """The layout of the Flax array of this name and rank."""
    if leaf != "kernel" or ndim < 2:
        return Layout(tuple(range(ndim)))
    if ndim == 2:
        return Layout((1, 0), unflattened=tuple(unflattened or ()))
    spatial = tuple(range(ndim - 2))
    if transposed:
        return Layout((ndim - 2, ndim - 1, *spatial), flipped=spatial)
    return Layout((ndim - 1, ndim - 2, *spatial))
