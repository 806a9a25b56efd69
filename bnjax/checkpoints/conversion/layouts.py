"""The layout of an array in PyTorch and in Flax, and the conversion between them."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Layout(NamedTuple):
    """The layout of a Flax array, described by the operations that convert it to PyTorch's.

    Flax has dense kernels (in, out) and conv kernels (*kernel, in / groups, out); PyTorch has
    (out, in) and (out, in / groups, *kernel). The kernel of a Flax `ConvTranspose` is
    (*kernel, in, out), spatially flipped relative to PyTorch's (in, out, *kernel). With
    `transpose_kernel=True` it is (*kernel, out, in) and not flipped, which is the layout of a conv.
    A `DenseGeneral` has several axes for one of PyTorch's, and the scalar of a `PReLU` becomes
    (1,).
    """

    shape: tuple[int, ...]  # in Flax
    merged: tuple[int, ...]  # in Flax, with the axes of a `DenseGeneral` merged
    axes: tuple[int, ...]  # a permutation of those of `merged`
    flipped: tuple[int, ...] = ()
    # For a layer after a flatten: (C, *spatial), in the order in which PyTorch flattens.
    unflattened: tuple[int, ...] = ()

    def to_torch(self, array: np.ndarray) -> np.ndarray:
        """The array in PyTorch's layout."""
        array = array.reshape(self.merged)
        if self.unflattened:
            channels, *spatial = self.unflattened
            array = array.reshape(*spatial, channels, *self.merged[1:])
            array = np.moveaxis(array, len(spatial), 0).reshape(self.merged)
        return np.flip(array, self.flipped).transpose(self.axes)

    def to_flax(self, array: np.ndarray) -> np.ndarray:
        """The array in Flax's layout."""
        array = np.flip(array.transpose(np.argsort(self.axes)), self.flipped)
        if self.unflattened:
            array = array.reshape(*self.unflattened, *self.merged[1:])
            array = np.moveaxis(array, 0, len(self.unflattened) - 1)
        return array.reshape(self.shape)

    @property
    def torch_shape(self) -> tuple[int, ...]:
        """The shape of the array in PyTorch."""
        return tuple(self.merged[axis] for axis in self.axes)


def layout(
    leaf: str,
    shape: Sequence[int],
    *,
    inputs: int | None = None,
    transposed: bool = False,
    unflattened: Sequence[int] = (),
) -> Layout:
    """The layout of a Flax array with this name and shape.

    Args:
        leaf: its name in its layer.
        shape: its shape.
        inputs: how many of its axes are inputs of a `DenseGeneral`; None for other layers.
        transposed: whether it is the flipped kernel of a `ConvTranspose`.
        unflattened: (C, *spatial), if its first axis was flattened.
    """
    shape, ndim = tuple(shape), len(shape)
    if inputs is not None:
        sizes = (math.prod(shape[:inputs]), math.prod(shape[inputs:]))
        joined, axes = (sizes, (1, 0)) if leaf == "kernel" else (sizes[1:], (0,))
        return Layout(shape, joined, axes)
    if leaf == "negative_slope" and not shape:
        return Layout(shape, (1,), (0,))
    if leaf != "kernel" or ndim < 2:
        return Layout(shape, shape, tuple(range(ndim)), unflattened=tuple(unflattened))
    if ndim == 2:
        return Layout(shape, shape, (1, 0), unflattened=tuple(unflattened))
    spatial = tuple(range(ndim - 2))
    if transposed:
        return Layout(shape, shape, (ndim - 2, ndim - 1, *spatial), flipped=spatial)
    return Layout(shape, shape, (ndim - 1, ndim - 2, *spatial))


def inputs_of(shape: Sequence[int], torch_shape: Sequence[int]) -> int | None:
    """How many axes of a `DenseGeneral` kernel are inputs, from its (out, in) in PyTorch."""
    splits = range(1, len(shape))
    matching = (s for s in splits if math.prod(shape[:s]) == torch_shape[1])
    return next((s for s in matching if math.prod(shape[s:]) == torch_shape[0]), None)
