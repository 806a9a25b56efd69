"""One small function for each mistake in a call, with the text of its error.

Each message says what was expected, what came, and the likely repair.
"""

import functools
import sys
import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bnjax.core import compat
from bnjax.core.repairs import COUNT, other_keys

_INTEGER, _NUMBER = (int, np.integer), (int, float, np.number)
_PARAMS = (("scale", "bias"), ("scale",), ("bias",), ())
_BANK_PARAMS = tuple(  # beside a scale or bias that banks share, those of each bank
    (*names, *(f"bank_{name}" for name in own))
    for names in _PARAMS
    for own in _PARAMS
    if {*own} <= {*names}
)
# What is kept beside mean and variance: the number of training steps, and of a momentum that pools
# all values ever seen their number, and the low-order digits of all three.
POOLED = ("values", "values_low", "mean_low", "var_low")
_BATCH_STATS = (
    ("mean", "var"),
    ("mean", "var", "count"),
    (),
    ("mean", "var", *POOLED),
    ("mean", "var", "count", *POOLED),
)
# Between the caller's code and a warning there are frames of these alone.
_OURS = ("bnjax", "flax", "jax", "contextlib", "functools")


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


def _scalar(name: str, value: Any) -> Any:
    """A number; an array of one, as a schedule gives it, is none the less."""
    if np.ndim(value):
        raise ValueError(
            f"`{name}` must be one number, got an array of shape {np.shape(value)}. It is the same "
            "for all channels."
        )
    return value.item() if isinstance(value, np.ndarray) else value


def momentum(value: Any, *, cumulative: bool = True) -> None:
    """A momentum is a weight, a schedule, "pooled", or None if `cumulative`; or it is traced."""
    if callable(value) or isinstance(value, str):
        if value != "pooled" and isinstance(value, str):
            raise ValueError(
                f"`momentum` must be a number, a function of the number of steps, None or "
                f"'pooled', got {value!r}."
            )
        return
    value = _scalar("momentum", value)
    if (value is None and cumulative) or isinstance(value, jax.Array):
        return
    if not isinstance(value, _NUMBER) or not 0 <= value <= 1:
        raise ValueError(
            f"`momentum` must lie between 0 and 1, got {value!r}. In PyTorch's convention it is "
            "the weight of the new batch (0.1), in Flax's the weight of the old statistics (0.9)."
        )


def limit(name: str, value: Any, least: float) -> None:
    """A limit of batch renormalization; `least` is the one that makes it batch norm."""
    kinds = str | list | tuple | None
    if isinstance(value, kinds) or (isinstance(value, _NUMBER) and not value >= least):
        raise ValueError(
            f"`{name}` must be a number, at least {least}, or a function of the number of steps, "
            f"got {value!r}. Renorm(r_max=1, d_max=0) is batch norm."
        )


def one_of(policy: str, **values: Any) -> None:
    """Exactly one of several numbers is given."""
    given = {name: value for name, value in values.items() if value is not None}
    if len(given) != 1:
        first, second = values
        raise ValueError(
            f"`{policy}` takes `{first}` or `{second}`, got {given or 'neither'}. Write "
            f"{policy}({first}=16), or {policy}({second}=0.1)."
        )


def not_negative(name: str, value: Any) -> None:
    """A number of examples."""
    if isinstance(value, str | list | tuple) or (isinstance(value, _NUMBER) and not value >= 0):
        raise ValueError(f"`{name}` must be a number of examples and not negative, got {value!r}.")


def weight(name: str, value: Any) -> None:
    """A share, of a batch or an example."""
    wrong = isinstance(value, _NUMBER) and not 0 <= value <= 1
    if wrong or isinstance(value, str | list | tuple | None):
        raise ValueError(f"`{name}` must lie between 0 and 1, got {value!r}.")


def policy(value: Any, kind: type) -> None:
    """What normalizes is said by a policy, an instance."""
    if value is not None and not isinstance(value, kind):
        repair = f"Write {value.__name__}()." if isinstance(value, type) else ""
        raise TypeError(
            f"`using` must be a policy, such as bnjax.policies.Renorm(), or None, got {value!r}. "
            f"{repair}".rstrip()
        )


def has_running(some: bool, policy: Any) -> None:
    """A policy that looks at running statistics has some."""
    if not some:
        raise ValueError(
            f"using={policy} needs running statistics, but none are kept. Keep them "
            "(track_running_stats=True), or leave `using` out."
        )


def has_count(some: bool, what: str) -> None:
    """A setting that goes by the number of steps knows it."""
    if not some:
        raise ValueError(
            f"{what} goes by the number of training steps, but `batch_stats` has no `count`. "
            "bnjax.init with the same `momentum` and `using` makes it; in old statistics, add "
            '{"count": jnp.zeros((), jnp.int32)}.'
        )


def eps(value: Any, *, training: bool, name: str = "eps") -> None:
    """Epsilon keeps the reciprocal of a zero variance finite."""
    value = _scalar(name, value)
    if isinstance(value, jax.Array):
        return
    if not isinstance(value, _NUMBER) or not value >= 0:
        raise ValueError(
            f"`{name}` must be a number and not negative, got {value!r}. The usual value is 1e-5."
        )
    if training and value == 0:
        raise ValueError(
            f"`{name}` must be positive in training, got {value}: a channel of zero variance would "
            "give NaN. The usual value is 1e-5."
        )


def correction(value: Any) -> None:
    """What is taken off the count in the variance."""
    if isinstance(value, _NUMBER) and not value >= 0:
        raise ValueError(
            f"`correction` must not be negative, got {value}. 1 gives PyTorch's unbiased running "
            "variance, 0 Flax's biased one."
        )


def num_features(value: Any) -> None:
    """A number of channels."""
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < 0:
        raise ValueError(
            f"`num_features` must be an integer and not negative, got {value!r}. It is the number "
            "of channels, such as 64."
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
    axis_name = names[0] if len(names) == 1 else names
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
    if not isinstance(size, (int, np.integer)) or isinstance(size, bool) or size < 1:
        raise ValueError(
            f"`virtual_batch_size` must be an integer and at least 1, got {size!r}. None takes the "
            "whole batch."
        )
    if groups is not None:
        raise ValueError(
            "`virtual_batch_size` and `axis_index_groups` both divide the batch. Give one of them."
        )


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


def plausible_momentum(value: Any, *, torch: bool) -> None:
    """Warn of a momentum that looks like the other convention's; 0.5 is the same in both."""
    if not isinstance(value, _NUMBER) or (value <= 0.5 if torch else value >= 0.5):
        return
    weighs, convention, other = (
        ("new batch", "PyTorch", "Flax, Keras or Haiku")
        if torch
        else ("old statistics", "Flax", "PyTorch")
    )
    warn_once(
        f"momentum={value} gives the {weighs} a weight of {value} ({convention}'s convention): the "
        "running statistics are little more than those of the last batch. If it comes from "
        f"{other}, write momentum={round(1 - value, 10):g}."
    )


def overriding_momentum(value: Any, torch: bool) -> None:
    """A momentum for a layer, of PyTorch's convention or Flax's, that comes from an override."""
    momentum(value)
    if isinstance(value, _NUMBER) and 0 < value < 1:  # nobody mistakes the ends
        plausible_momentum(value, torch=torch)


@functools.cache
def warn_once(message: str) -> None:
    """Warn at the line of the caller's own code that led here, however many frames above."""
    frame, level = sys._getframe(), 1
    while frame.f_back and frame.f_globals.get("__name__", "").split(".")[0] in _OURS:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def trees(
    params: Any, batch_stats: Any, features: tuple[int, ...], momentum: Any, banks: int | None
) -> None:
    """What `batch_norm` is given has the keys and shapes that it needs."""
    _keys("params", params, _BANK_PARAMS if banks else _PARAMS)
    pools = isinstance(batch_stats, Mapping) and POOLED[0] in batch_stats
    _keys("batch_stats", batch_stats, _BATCH_STATS[3:] if pools else _BATCH_STATS[:3])
    if momentum is None and batch_stats and "count" not in batch_stats:
        _keys("batch_stats", batch_stats, _BATCH_STATS[1:2], COUNT)
    if isinstance(momentum, str) and momentum == "pooled" and batch_stats and not pools:
        repair = 'To pool all values, start with bnjax.init(..., momentum="pooled").'
        _keys("batch_stats", batch_stats, _BATCH_STATS[3:], repair)
    rows = () if banks is None else (banks,)
    own = {key: jnp.shape(value) == (*rows, *features) for key, value in params.items()}
    shared = {key: value for key, value in params.items() if not (banks and own[key])}
    shapes("params", shared, features)
    shapes("batch_stats", batch_stats, (*rows, *features), rows)


def number_of_banks(banks: Any, *affine: Any) -> None:
    """How many sets of statistics there are, and which affine maps they have."""
    integer = isinstance(banks, _INTEGER) and not isinstance(banks, bool)
    if banks is not None and not (integer and banks >= 1):
        raise ValueError(
            f"`banks` must be the number of sets of statistics, an integer and at least 1, got "
            f"{banks!r}. None keeps one set without banks."
        )
    allowed = (True, False) if banks is None else (True, False, "own", "both")
    if wrong := [each for each in affine if each not in allowed]:
        raise ValueError(
            f"A scale and a bias are learned (True) or not (False), got {wrong[0]!r}. With "
            "`banks`, 'own' has one for each bank, and 'both' adds them."
        )


def bank_names(banks: Any, tracked: bool) -> None:
    """Banks have different names, or there are so many; and each keeps statistics."""
    if banks is None:
        return
    names = isinstance(banks, list | tuple) and all(isinstance(name, str) for name in banks)
    if not isinstance(banks, _INTEGER) and not (names and banks and len({*banks}) == len(banks)):
        raise ValueError(
            "`banks` must be the number of sets of statistics or their names, all different, as in "
            f"banks=('clean', 'adversarial'), got {banks!r}."
        )
    if not tracked:
        raise ValueError(
            "`banks` are sets of running statistics, but track_running_stats=False keeps none."
        )


def no_bank(given: Any) -> None:
    """A layer without banks is not told one."""
    if given is not None:
        raise ValueError(
            f"The call has bank={given!r}, but the layer has no banks. Make it with "
            "banks=('source', 'target'), or leave `bank` out."
        )


def bank_by_name(given: Any, banks: int | Sequence[str]) -> Any:
    """A bank as a number, or numbers for each example."""
    names = tuple(map(str, range(banks))) if isinstance(banks, int) else tuple(banks)
    if given is None:
        raise ValueError(
            f"The layer has the banks {list(names)}, and the call must say which one: pass `bank`, "
            'or write `with bnjax.bank("' + names[0] + '"):` around the call of the model.'
        )
    if isinstance(given, str):
        if given not in names:
            raise ValueError(f"There is no bank {given!r}; the banks are {list(names)}.")
        return names.index(given)
    return given


def bank(
    value: Any, batch_stats: Any, shape: tuple[int, ...], axes: tuple[int, ...], mask: Any
) -> tuple[Any, int | None]:
    """Which bank a call has, as an int or an array of int32, and how many there are.

    Examples that the mask leaves out may have any number.
    """
    mean = batch_stats.get("mean") if isinstance(batch_stats, Mapping) else None
    banks = len(mean) if mean is not None and jnp.ndim(mean) == len(axes) + 1 else None
    if value is None and banks is None:
        return None, None
    if value is None:
        raise ValueError(
            f"`batch_stats` keeps {banks} banks, so the call must say which one: pass `bank`, a "
            "number, or one for each example."
        )
    if banks is None:
        raise ValueError(
            f"`bank` chooses among several sets of statistics, got {value!r}, but `batch_stats` "
            "keeps one set, or none. Make it by bnjax.init(..., banks=2), or leave `bank` out."
        )
    array = value if isinstance(value, jax.Array) else np.asarray(value)
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise TypeError(
            f"`bank` must be an integer or an array of integers, got {array.dtype}. Convert it "
            "first, as in `bank.astype(jnp.int32)`."
        )
    others = [size for axis, size in enumerate(shape) if axis not in axes]
    size = others[0] if others else 1
    if array.shape not in ((), (size,)):
        raise ValueError(
            f"`bank` must be one number, or one for each of the {size} examples, got shape "
            f"{array.shape}."
        )
    if not (compat.is_traced(array) or compat.is_traced(mask)):
        counted = True
        if mask is not None and array.ndim:
            batch = next(axis for axis in range(len(shape)) if axis not in axes)
            counted = np.any(mask, tuple(axis for axis in range(mask.ndim) if axis != batch))
        outside = counted & ((np.asarray(array) < 0) | (np.asarray(array) >= banks))
        wrong = sorted({*np.broadcast_to(array, np.shape(outside))[outside].tolist()})
        if wrong:
            raise ValueError(f"`bank` must lie between 0 and {banks - 1}, got {wrong}.")
    if array.shape == () and not isinstance(array, jax.Array):
        return int(array), banks
    return jnp.asarray(array, jnp.int32), banks


def classes(value: Any, size: int, number: int) -> jax.Array:
    """Each example has a class."""
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
    """A scale and a bias for each example, brought to (N, C)."""
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


def _keys(
    name: str, value: Any, allowed: Sequence[tuple[str, ...]], repair: str | None = None
) -> None:
    """A flat dict of arrays has exactly the keys of one of the allowed sets."""
    repair = repair or other_keys(name, value)
    if not isinstance(value, Mapping):
        raise TypeError(f"`{name}` must be a dict of arrays, got {type(value).__name__}. {repair}")
    if any(set(value) == set(keys) for keys in allowed):
        return
    nearest = min(allowed, key=lambda k: (abs(len(value) - len(k)), len(set(value) ^ set(k))))
    wrong = {"missing": set(nearest) - set(value), "unknown": set(value) - set(nearest)}
    found = [f"{what} {sorted(keys)}" for what, keys in wrong.items() if keys]
    sets = " or ".join("{" + ", ".join(keys) + "}" for keys in allowed)
    raise ValueError(
        f"`{name}` must have the keys {sets}, got {sorted(value)}: {' and '.join(found)}. {repair}"
    )


def shapes(
    name: str, value: Mapping[str, Any], expected: tuple[int, ...], rows: tuple[int, ...] = ()
) -> None:
    """All per-channel arrays of a tree have the shape of the channels; a count has that of rows."""
    got = {key: jnp.shape(leaf) for key, leaf in value.items()}
    wrong = {key: n for key, n in got.items() if n != (rows if key == "count" else expected)}
    if wrong:
        raise ValueError(
            f"`{name}` must hold arrays of shape {expected}, one entry for each channel of the "
            f"input, got {wrong}. Was it made for another `num_features`, or is `axis` wrong?"
        )


def where(path: Sequence[str]) -> str:
    """A module path as the user would write it."""
    return f"'{'/'.join(path)}'" if any(path) else "the top of the model"


def static(name: str, value: Any) -> None:
    """What decides between two programs is known before either is compiled."""
    if compat.is_traced(value):
        raise TypeError(
            f"`{name}` must be a Python bool, got a traced value: it decides which program is "
            f"compiled. Make it static, as in jax.jit(f, static_argnames={name!r})."
        )


def mutable_statistics(mutable: bool, path: Sequence[str]) -> None:
    """Training moves the statistics, so they must be mutable."""
    if not mutable:
        raise ValueError(
            f"The batch norm at {where(path)} was asked to train (use_running_average=False), but "
            "its `batch_stats` are immutable. To train, call `y, updates = model.apply(variables, "
            "x, mutable=['batch_stats'])`; to evaluate, pass use_running_average=True."
        )


def held(
    collection: str, given: Mapping[str, Any], expected: Collection[str], path: Sequence[str]
) -> None:
    """A collection of a layer holds what the layer is about to use."""
    missing = sorted(set(expected) - set(given))
    if missing:
        repair = (
            "Pass the collection as `model.init` made it or training updated it, as in "
            "`model.apply({'params': params, 'batch_stats': batch_stats}, x)`."
        )
        raise ValueError(
            f"The batch norm at {where(path)} misses {missing} in `{collection}`: it has "
            f"{sorted(given) or 'none'}. {COUNT if missing == ['count'] else repair}"
        )


def present(names: Collection[str], held: Collection[str]) -> None:
    """An nnx layer has the statistics that its settings call for."""
    missing = sorted(set(names) - set(held))
    if missing:
        raise ValueError(
            f"The layer must have the statistics {sorted(names)}, but {missing} are gone, as after "
            "`nnx.pop(model, nnx.BatchStat)`. Put them back with `nnx.update(model, statistics)`."
        )
