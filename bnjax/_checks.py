"""One small function for each mistake a user can make, with the text of its error.

Each message says what was expected, what came, and the likely repair.
"""

import contextlib
import functools
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import errors
from flax import linen as nn

_NUMBER = (int, float, np.number)
_MISFITS = (
    errors.ApplyScopeInvalidVariablesStructureError,
    errors.ApplyScopeInvalidVariablesTypeError,
    errors.ScopeCollectionNotFound,
    errors.ScopeParamNotFoundError,
    errors.ScopeParamShapeError,
    errors.ScopeVariableNotFoundError,
)


def feature_axes(axis: int | Sequence[int], ndim: int) -> tuple[int, ...]:
    """The feature axes as sorted non-negative numbers."""
    axes = (axis,) if isinstance(axis, (int, np.integer)) else tuple(axis)
    if not axes or any(not -ndim <= a < ndim for a in axes):
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


def momentum(value: Any, name: str = "momentum") -> None:
    """A momentum is a weight. Traced values are taken as they are."""
    if isinstance(value, _NUMBER) and not 0 <= value <= 1:
        raise ValueError(
            f"`{name}` must lie between 0 and 1, got {value}. In PyTorch's convention it is the "
            "weight of the new batch (0.1), in Flax's the weight of the old statistics (0.9)."
        )


def eps(value: Any, *, training: bool, name: str = "eps") -> None:
    """Epsilon keeps the reciprocal of a zero variance finite."""
    if not isinstance(value, _NUMBER):
        return
    if value < 0:
        raise ValueError(f"`{name}` must not be negative, got {value}. The usual value is 1e-5.")
    if training and value == 0:
        raise ValueError(
            f"`{name}` must be positive in training, got {value}: a channel of zero variance would "
            "give NaN. The usual value is 1e-5."
        )


def devices(axis_name: str | Sequence[str] | None, groups: Sequence[Sequence[int]] | None) -> int:
    """How many devices pool their statistics: those of the axis, or of each of its groups."""
    if axis_name is None:
        if groups is not None:
            raise ValueError(
                "`axis_index_groups` divides the axis `axis_name`, but that is None. Name the axis."
            )
        return 1
    names = (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)
    try:
        size = jax.lax.axis_size(names)
    except NameError as error:
        raise ValueError(
            f"`axis_name` is {axis_name!r}, but no such axis is mapped here ({error}). Name the "
            "axis of the pmap, shard_map or vmap around this call, or pass None under plain jit."
        ) from error
    if groups is None:
        return size
    sizes = {len(group) for group in groups}
    if sorted(i for group in groups for i in group) != list(range(size)) or len(sizes) != 1:
        raise ValueError(
            f"`axis_index_groups` must hold each index of the axis {axis_name!r} once, 0 to "
            f"{size - 1}, in groups of equal size, got {[list(group) for group in groups]}."
        )
    return sizes.pop()


def virtual_batch_size(size: int | None, groups: Sequence[Sequence[int]] | None) -> None:
    """A virtual batch has at least one example, and is a division of its own."""
    if size is None:
        return
    if size < 1:
        raise ValueError(
            f"`virtual_batch_size` must be at least 1, got {size}. None takes the whole batch."
        )
    if groups is not None:
        raise ValueError(
            "`virtual_batch_size` and `axis_index_groups` both divide the batch. Give one of them."
        )


def several_values(x: jax.Array, axes: Sequence[int], devices: int, correction: Any) -> None:
    """One value has no variance, so it can't be normalized by it (PyTorch's rule)."""
    if correction and devices == 1 and all(x.shape[a] == 1 for a in range(x.ndim) if a not in axes):
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input shape {x.shape}. "
            "Use a larger batch, drop the last partial batch, or normalize with the running "
            "statistics (mutable=False)."
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


def tree(name: str, value: Any, allowed: Sequence[tuple[str, ...]], repair: str) -> None:
    """A flat dict of arrays has exactly the keys of one of the allowed sets."""
    if not isinstance(value, Mapping):
        raise TypeError(f"`{name}` must be a dict of arrays, got {type(value).__name__}. {repair}")
    if any(set(value) == set(keys) for keys in allowed):
        return
    nearest = min(allowed, key=lambda k: (abs(len(value) - len(k)), len(set(value) ^ set(k))))
    missing, unknown = sorted(set(nearest) - set(value)), sorted(set(value) - set(nearest))
    found = [
        f"{what} {keys}" for what, keys in (("missing", missing), ("unknown", unknown)) if keys
    ]
    sets = " or ".join("{" + ", ".join(keys) + "}" for keys in allowed)
    raise ValueError(
        f"`{name}` must have the keys {sets}, got {sorted(value)}: {' and '.join(found)}. {repair}"
    )


def shapes(name: str, value: Mapping[str, Any], expected: tuple[int, ...]) -> None:
    """All per-channel arrays of a tree have the shape of the channels."""
    wrong = {
        key: jnp.shape(leaf)
        for key, leaf in value.items()
        if jnp.shape(leaf) != (() if key == "count" else expected)
    }
    if wrong:
        raise ValueError(
            f"`{name}` must hold arrays of shape {expected}, one entry for each channel of the "
            f"input, got {wrong}. Was it made for another `num_features`, or is `axis` wrong?"
        )


def where(path: Sequence[str]) -> str:
    """A module path as the user would write it."""
    return f"'{'/'.join(path)}'" if any(path) else "the top of the model"


def given_once(at_init: bool | None, at_call: bool | None) -> None:
    """A mode is given to the constructor or to the call."""
    if at_init is not None and at_call is not None:
        raise ValueError(
            "`use_running_average` was given to the constructor and to the call. Give it to one."
        )


def given(use_running_average: bool | None) -> None:
    """Flax's convention has no default mode."""
    if use_running_average is None:
        raise ValueError(
            "`use_running_average` was given neither to the constructor nor to the call. Pass "
            "use_running_average=False to train, True to evaluate; bnjax.BatchNorm2d needs neither."
        )


def mutable_statistics(mutable: bool, path: Sequence[str]) -> None:
    """Training moves the statistics, so they must be mutable."""
    if not mutable:
        raise ValueError(
            f"The batch norm at {where(path)} was asked to train (use_running_average=False), but "
            "its `batch_stats` are immutable. To train, call `y, updates = model.apply(variables, "
            "x, mutable=['batch_stats'])`; to evaluate, pass use_running_average=True."
        )


def statistics(held: Mapping[str, Any], expected: Sequence[str], path: Sequence[str]) -> None:
    """The collection `batch_stats` of a layer holds the statistics it is about to use."""
    missing = sorted(set(expected) - set(held))
    if not missing:
        return
    others = sorted(set(held) - set(expected))
    has = f"it has {others}" if others else "it has none"
    raise ValueError(
        f"The batch norm at {where(path)} misses {missing} in `batch_stats`: {has}. Pass the "
        "collection as `model.init` made it or training updated it, as in "
        "`model.apply({'params': params, 'batch_stats': batch_stats}, x)`."
    )


def divides(size: int, devices: int, microbatches: int) -> None:
    """A training batch is cut into equal parts."""
    if size % (devices * microbatches):
        raise ValueError(
            f"A training batch must divide by the {devices} devices of the mesh (of this process) "
            f"times {microbatches} micro-batches, got {size} examples. Drop the last partial batch."
        )


def known_fields(fields: Mapping[str, Any], known: set[str]) -> None:
    """An override names fields that batch norm layers have."""
    unknown = sorted(set(fields) - known)
    if unknown or not fields:
        raise TypeError(
            f"An override takes fields of batch norm layers, {sorted(known)}, got {unknown}."
        )


def layer_has_fields(layer: Any, fields: Mapping[str, Any], path: str) -> None:
    """The layer that is overridden has the field: the conventions differ in some names."""
    missing = sorted(name for name in fields if not hasattr(layer, name))
    if missing:
        raise TypeError(
            f"The {type(layer).__name__} at {where([path])} has no field {missing}. "
            "PyTorch's convention has `eps` and `affine` where Flax's has `epsilon`, `use_scale` "
            "and `use_bias`."
        )


def pattern_fits(pattern: str, fits: bool, paths: Iterable[str], what: str = "batch norm") -> None:
    """A pattern that fits nothing is a mistake, and a silent one."""
    if fits:
        return
    there = sorted(paths)
    are = f"there are {there}" if there else "none was called or given"
    raise ValueError(
        f"The pattern {pattern!r} fits the path of no {what}: {are}. `*` is a part of one name, "
        "`**` any number of names, as in 'encoder/**'."
    )


def has_statistics(variables: Any) -> None:
    """A tool for running statistics needs some."""
    if not isinstance(variables, Mapping) or not variables.get("batch_stats"):
        got = sorted(variables) if isinstance(variables, Mapping) else type(variables).__name__
        raise ValueError(
            "`variables` must be a dict with the collection `batch_stats`, as a model with batch "
            f"norms has it, got {got}."
        )


def some_batch(some: bool) -> None:
    """An iterator of batches is not empty."""
    if not some:
        raise ValueError(
            "`batches` must hold at least one batch, got none. An iterator that was used before is "
            "empty: pass a list, or make it anew."
        )


def iterable_again(batches: Any) -> None:
    """What is read more than once is no iterator."""
    if isinstance(batches, Iterator):
        raise ValueError(
            f"`batches` must be iterable once for each layer, got a {type(batches).__name__}, "
            "which is empty after its first use. Pass a list, or use sequential=False."
        )


def finite_statistics(bad: Mapping[str, int]) -> None:
    """Data give each channel a finite mean and variance."""
    if bad:
        layers = ", ".join(f"{path} ({count} channels)" for path, count in sorted(bad.items()))
        raise ValueError(
            f"These layers saw no finite mean and variance: {layers}. Is there NaN or inf in the "
            "batches or the parameters, or a mask without True?"
        )


def linen_model(model: Any) -> None:
    """A tool that reads a model's program knows linen models."""
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"`model` must be an instance of a flax.linen.Module, got {type(model).__name__}."
        )


@contextlib.contextmanager
def variables_fit(variables: Any) -> Iterator[None]:
    """Variables are those of the model."""
    if not isinstance(variables, Mapping):
        has_statistics(variables)
    try:
        yield
    except _MISFITS as error:
        has_statistics(variables)
        raise ValueError(f"`variables` do not fit the model: {error}") from error


def some_batch_norm(some: bool) -> None:
    """A tool for batch norms needs one."""
    if not some:
        raise ValueError("`model` must call a batch norm, bnjax's or Flax's own, but calls none.")


def evaluating(running: bool, path: Sequence[str]) -> None:
    """A folded batch norm is one that doesn't change."""
    if not running:
        raise ValueError(
            f"`model` must be in evaluation, but the batch norm at {where(path)} is in training "
            "mode. Pass what turns that off, as in `apply_kwargs={'train': False}`."
        )


def something_folded(reasons: Sequence[tuple[str, str, str | None]]) -> None:
    """Some batch norm follows a conv or dense layer."""
    if all(reason for *_, reason in reasons):
        lines = [f"\n  {layer or '-'}, {norm or '-'}: {reason}." for layer, norm, reason in reasons]
        raise ValueError(f"`model` must have a batch norm that can be folded.{''.join(lines)}")


def folded_variables(paths: Sequence[str]) -> None:
    """A folded model takes the folded variables."""
    if paths:
        raise ValueError(
            f"`variables` must be those of the folded model, but hold the batch norms {paths}, "
            "which are folded. Pass `folded.variables`."
        )


def same_outputs(difference: float, scale: float, tolerance: float) -> None:
    """Folding changes no output, up to rounding."""
    if not difference <= tolerance * scale:
        raise ValueError(
            f"The outputs on `example_x` must stay the same, to {tolerance:.1e} of their scale "
            f"{scale:.3g}, but folding changed them by {difference:.3g}. Is there NaN or inf in "
            "them, or does a layer change its kernel before using it?"
        )


def per_example(name: str, shape: tuple[int, ...], size: int) -> None:
    """A loss or metric is a mean, or has one entry for each example."""
    if shape not in ((), (size,)):
        raise ValueError(
            f"`loss_fn` must give `{name}` as a mean of shape () or with one entry for each "
            f"example, ({size},), got shape {shape}. Take the mean over the other axes."
        )


def torch_momentum_is_plausible(value: Any, frames: int) -> None:
    """Warn of a momentum that looks like Flax's, `frames` above this check."""
    if isinstance(value, _NUMBER) and value >= 0.5:
        _warn_once(
            f"momentum={value} gives the new batch a weight of {value} (PyTorch's convention): the "
            "running statistics are little more than those of the last batch. If it comes from "
            f"Flax, Keras or Haiku, write momentum={round(1 - value, 10):g}.",
            frames,
        )


def flax_momentum_is_plausible(value: Any, frames: int) -> None:
    """Warn of a momentum that looks like PyTorch's, `frames` above this check."""
    if isinstance(value, _NUMBER) and value <= 0.5:
        _warn_once(
            f"momentum={value} gives the old statistics a weight of {value} (Flax's convention): "
            "the running statistics are little more than those of the last batch. If it comes "
            f"from PyTorch, write momentum={round(1 - value, 10):g}.",
            frames,
        )


@functools.cache
def _warn_once(message: str, frames: int) -> None:
    warnings.warn(message, stacklevel=frames + 2)
