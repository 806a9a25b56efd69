"""Checks of the arguments of a call: the input, and arrays for its positions or examples."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bnjax.core import compat
from bnjax.core.checks.numbers import INTEGER


def floating(value: Any) -> jax.Array:
    """An inexact array: integers become float32."""
    x = jnp.asarray(value)
    return x if jnp.issubdtype(x.dtype, jnp.inexact) else x.astype(jnp.float32)


def output_dtype(dtype: Any, x: jax.Array) -> jnp.dtype:
    """The dtype of the output; by default that of the input."""
    dtype = x.dtype if dtype is None else jnp.dtype(dtype)
    if not jnp.issubdtype(dtype, jnp.inexact):
        raise TypeError(
            f"`dtype`, that of the output, must be floating point or complex, got {dtype}. None "
            "gives the output the dtype of the input."
        )
    return dtype


def feature_axes(axis: int | Sequence[int], ndim: int) -> tuple[int, ...]:
    """The feature axes, as sorted non-negative numbers."""
    if ndim == 0:
        raise ValueError("`x` must have a channel axis, got a number, of shape ().")
    axes = tuple(axis) if isinstance(axis, Sequence) else (axis,)
    if not axes or any(not isinstance(a, INTEGER) or not -ndim <= a < ndim for a in axes):
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
    """Check the rank, dtype and channels of the input to a 1d, 2d or 3d layer.

    `spatial` names the spatial axes of each layout, `any_rank` a layer that takes any.
    """
    if not isinstance(axis, INTEGER):
        raise ValueError(
            f"`axis` of {layer} must be one integer, got {axis}. {any_rank} takes several axes."
        )
    layouts = {2 + len(names): _layout(names, axis) for names in spatial}
    if x.ndim not in layouts:
        expected = " or ".join(f"{n}D input {layout}" for n, layout in layouts.items())
        fits = {2: "BatchNorm1d", 3: "BatchNorm1d", 4: "BatchNorm2d", 5: "BatchNorm3d"}.get(x.ndim)
        repair = f"Reshape the input; {any_rank} takes any rank."
        if fits is not None and fits != layer:
            repair = f"Use {fits}, or reshape the input."
        raise ValueError(
            f"{layer} expected {expected}, got {x.ndim}D input of shape {x.shape}. {repair}"
        )
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(
            f"`x` must be real floating point, got {x.dtype}. Convert it first, as in "
            "`x.astype(jnp.float32)`."
        )
    if num_features is not None:
        _channels(x, feature_axes(axis, x.ndim)[0], num_features)


def _layout(spatial: str, axis: int) -> str:
    names = ["N", *spatial]
    names.insert(axis % (len(names) + 1), "C")
    return f"({', '.join(names)})"


def _channels(x: jax.Array, axis: int, num_features: int) -> None:
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
    """Check that each channel has more than one value, as PyTorch does in training."""
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
    """A mask, reshaped to the rank of the input."""
    array = jnp.asarray(value)
    if array.dtype != jnp.bool_:
        raise TypeError(
            f"`mask` must be boolean, got {array.dtype}. Convert it first, as in `mask != 0`."
        )
    missing = len(shape) - array.ndim
    sizes = zip(array.shape, shape[missing:], strict=False)
    if missing < 0 or any(m not in (1, n) for m, n in sizes):
        repair = "Give it the rank of the input, with size 1 where it does not vary."
        if missing > 0 and array.shape == shape[: array.ndim]:
            index = ", ".join([":"] * array.ndim + ["None"] * missing)
            repair = f"It fits the leading axes: write `mask[{index}]`."
        raise ValueError(
            f"`mask` must broadcast to the input of shape {shape}, got shape {array.shape}. "
            f"{repair}"
        )
    return array.reshape((1,) * missing + array.shape)


def classes(value: Any, size: int, number: int) -> jax.Array:
    """Check that each example has a valid class."""
    array = value if isinstance(value, jax.Array) else np.asarray(value)
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise TypeError(
            f"`classes` must be integers, got {array.dtype}. For a scale and bias of your own for "
            "each example, call a batch norm as in norm(x, scale=g, bias=b)."
        )
    if array.shape != (size,):
        raise ValueError(
            f"`classes` must hold one class for each of the {size} examples, of shape ({size},), "
            f"got shape {array.shape}."
        )
    if not compat.is_traced(array):
        wrong = sorted({int(n) for n in np.ravel(array) if not 0 <= n < number})
        if wrong:
            raise ValueError(f"`classes` must lie between 0 and {number - 1}, got {wrong}.")
    return jnp.asarray(array)


def affine_of_examples(
    scale: Any, bias: Any, shape: tuple[int, ...], axes: tuple[int, ...]
) -> dict[str, jax.Array]:
    """A scale and a bias for each example, reshaped to (N, C)."""
    found = {}
    for name, value in (("scale", scale), ("bias", bias)):
        if value is None:
            continue
        others = [a for a in range(len(shape)) if a not in axes]
        array, features = jnp.asarray(value), tuple(shape[a] for a in axes)
        if not jnp.issubdtype(array.dtype, jnp.inexact):
            array = array.astype(jnp.float32)
        expected = (*(shape[a] for a in others[:1]), *features)
        if array.ndim == len(shape) and all(array.shape[a] == 1 for a in others[1:]):
            array = jnp.moveaxis(jnp.squeeze(array, others[1:]), others[0] if others else 0, 0)
        array = array.reshape((1,) * (len(expected) - array.ndim) + array.shape)
        sizes = zip(array.shape, expected, strict=False)
        if array.ndim != len(expected) or any(n not in (1, m) for n, m in sizes) or not others:
            raise ValueError(
                f"`{name}` at the call must have an entry for each example and channel, of shape "
                f"{expected}, or broadcast to it, got shape {jnp.shape(value)}."
            )
        found[name] = array
    return found
