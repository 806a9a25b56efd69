"""What a call is given: the input, its axes, its mask."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_INTEGER = (int, np.integer)


def floating(value: Any) -> jax.Array:
    """An array with numbers after the point: integers become float32."""
    x = jnp.asarray(value)
    return x if jnp.issubdtype(x.dtype, jnp.inexact) else x.astype(jnp.float32)


def output_dtype(dtype: Any, x: jax.Array) -> jnp.dtype:
    """The dtype that the output is asked to have, that of the input by default."""
    dtype = x.dtype if dtype is None else jnp.dtype(dtype)
    if not jnp.issubdtype(dtype, jnp.inexact):
        raise TypeError(
            f"`dtype`, that of the output, must be floating point or complex, got {dtype}. None "
            "gives the output the dtype of the input."
        )
    return dtype


def feature_axes(axis: int | Sequence[int], ndim: int) -> tuple[int, ...]:
    """The feature axes as sorted non-negative numbers."""
    if ndim == 0:
        raise ValueError("`x` must have a channel axis, got a number, of shape ().")
    axes = tuple(axis) if isinstance(axis, Sequence) else (axis,)
    if not axes or any(not isinstance(a, _INTEGER) or not -ndim <= a < ndim for a in axes):
        raise ValueError(
            f"`axis` must lie between {-ndim} and {ndim - 1} for an input of {ndim} dimensions, "
            f"got {axis}. It names the channel axis: -1 for channels last, 1 for NCHW."
        )
    return tuple(sorted({int(a) % ndim for a in axes}))


def torch_input(
    x: jax.Array,
    spatial: Sequence[str],
    axis: int,
    num_features: int | None,
    layer: str,
    any_rank: str,
) -> None:
    """A 1d, 2d or 3d layer gets the rank, dtype and channels that it was made for.

    `spatial` are the names of the spatial axes in each layout, `any_rank` is a layer without these.
    """
    if not isinstance(axis, _INTEGER):
        raise ValueError(
            f"`axis` of {layer} must be one integer, got {axis}. {any_rank} takes several axes."
        )
    _rank(x, {2 + len(names): _layout(names, axis) for names in spatial}, layer, any_rank)
    real_floating(x)
    if num_features is not None:
        features(x, feature_axes(axis, x.ndim), num_features)


def _layout(spatial: str, axis: int) -> str:
    names = ["N", *spatial]
    names.insert(axis % (len(names) + 1), "C")
    return f"({', '.join(names)})"


def _rank(x: jax.Array, layouts: Mapping[int, str], layer: str, any_rank: str) -> None:
    if x.ndim in layouts:
        return
    expected = " or ".join(f"{n}D input {layout}" for n, layout in layouts.items())
    fits = {2: "BatchNorm1d", 3: "BatchNorm1d", 4: "BatchNorm2d", 5: "BatchNorm3d"}.get(x.ndim)
    repair = f"Reshape the input; {any_rank} takes any rank."
    if fits is not None and fits != layer:
        repair = f"Use {fits}, or reshape the input."
    raise ValueError(
        f"{layer} expected {expected}, got {x.ndim}D input of shape {x.shape}. {repair}"
    )


def real_floating(x: jax.Array, name: str = "x") -> None:
    """PyTorch's batch norm takes real floating point input alone."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(
            f"`{name}` must be real floating point, got {x.dtype}. "
            f"Convert it first, as in `{name}.astype(jnp.float32)`."
        )


def features(x: jax.Array, axes: tuple[int, ...], num_features: int) -> None:
    """The channel axis of the input has as many channels as the layer was made for."""
    (axis,) = axes
    if x.shape[axis] == num_features:
        return
    repair = "Make the layer for the channels it gets."
    if num_features in x.shape[1:]:
        fits = x.shape.index(num_features, 1)
        repair = f"Axis {fits} has that size: did you mean `axis={fits}`?"
    raise ValueError(
        f"`num_features` is {num_features}, but axis {axis} of the input of shape {x.shape} has "
        f"{x.shape[axis]} channels. {repair}"
    )


def several_values(
    x: Any, axes: Sequence[int], devices: int, correction: Any, virtual_batch_size: int | None
) -> None:
    """One value has no variance, so it can't be normalized by it (PyTorch's rule)."""
    sizes = [x.shape[a] for a in range(x.ndim) if a not in axes]
    last = ""
    if virtual_batch_size is not None:
        if not sizes:
            raise ValueError(
                f"`virtual_batch_size` divides a batch axis, but all axes of the input of shape "
                f"{x.shape} are feature axes. Name the channel axis alone in `axis`."
            )
        devices = 1  # groups are never pooled
        if isinstance(sizes[0], int) and sizes[0] > virtual_batch_size:
            sizes[0] = sizes[0] % virtual_batch_size or virtual_batch_size
            last = f", the last virtual batch of which has {sizes[0]}"
    if correction and devices == 1 and all(size == 1 for size in sizes):
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input shape {x.shape}{last}"
            ". Use a larger batch, drop the last partial batch, or normalize with the running "
            "statistics (mutable=False, or .eval() in nnx)."
        )


def mask(value: Any, shape: tuple[int, ...]) -> jax.Array:
    """A mask, brought to the rank of the input."""
    array = jnp.asarray(value)
    if array.dtype != jnp.bool_:
        raise TypeError(
            f"`mask` must be boolean, got {array.dtype}. Convert it first, as in `mask != 0`."
        )
    trailing = shape[len(shape) - array.ndim :] if array.ndim <= len(shape) else None
    if trailing is None or any(m not in (1, n) for m, n in zip(array.shape, trailing, strict=True)):
        repair = "Give it the rank of the input, with size 1 where it does not vary."
        if array.ndim < len(shape) and array.shape == shape[: array.ndim]:
            index = ", ".join([":"] * array.ndim + ["None"] * (len(shape) - array.ndim))
            repair = f"It fits the leading axes: write `mask[{index}]`."
        raise ValueError(
            f"`mask` must broadcast to the input of shape {shape}, got shape {array.shape}. "
            f"{repair}"
        )
    return array.reshape((1,) * (len(shape) - array.ndim) + array.shape)
