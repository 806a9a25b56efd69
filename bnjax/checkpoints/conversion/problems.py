"""Describe everything that prevents a conversion, in one line each."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from bnjax.checkpoints.conversion import hints
from bnjax.checkpoints.conversion.blocks import ATTENTION
from bnjax.checkpoints.conversion.layouts import Layout
from bnjax.checkpoints.conversion.names import Name, Rename
from bnjax.checkpoints.conversion.repeated import is_one_of
from bnjax.checkpoints.conversion.trees import Leaf
from bnjax.checkpoints.conversion.words import near

# The most pairs of names to compare for the nearest ones, on each side.
_COMPARED = 6_000
_KINDS = (np.bool_, np.integer, np.floating, np.complexfloating)
# Variances between this and 0 come from rounding or a subtracted eps.
_SLIGHTLY_NEGATIVE = -1e-3


def refuse(names: Sequence[str], values: Sequence[str]) -> None:
    """Raise one error that lists all problems with names and values."""
    lines = "".join(f"\n  {line}" for line in (*names, *values))
    if names:
        raise ValueError(
            "The PyTorch state dict and `variables` do not match, so nothing was converted. Map "
            f"names with `rename`, or skip them with `ignore`.{lines}"
        )
    if values:
        raise ValueError(f"Some running statistics are invalid, so nothing was converted.{lines}")


def of_names(
    found: Any,
    torch: Mapping[str, np.ndarray],
    leaves: Mapping[Name, Leaf],
    ruled: Any,
    rename: Rename | None,
    attempt: Callable[..., Any],
) -> list[str]:
    """A line for each name without a counterpart, or with several, and the repair if known."""
    lines = [
        f"ambiguous: {', '.join(keys)} for {', '.join(leaves[name].path for name in names)}"
        for keys, names in found.ambiguous
    ]
    computed, parts, weights = hints.parametrized(found)
    lines += computed
    lines += hints.renames(found, torch, leaves, ruled, rename, attempt)
    lines += _layers(found)
    groups = {key for each in found.groups for key in each.keys.values()}
    blocks = {
        name
        for each in found.blocks
        for name in leaves
        if name.module[:-1] == each.path and name.module[-1] in each.children.values()
    }
    lost = {k: name for k, name in found.torch_only.items() if k not in groups | parts}
    alone = [name for name in found.flax_only if name not in blocks | weights]
    paired = {str(name) for name in found.pairs.values()}
    others = alone or [name for name in leaves if str(name) in paired]
    same = equal_ones(torch, lost, found.pairs)
    shape = lambda name: ruled.layout(name, leaves[name].value.shape).torch_shape  # noqa: E731
    lines += _only_in(
        "PyTorch",
        [
            _Array(v, f"{k} {torch[k].shape}{_renamed(k, v)}", torch[k].shape)
            for k, v in lost.items()
        ],
        [_Array(name.in_torch, leaves[name].path, shape(name)) for name in others],
        [_note(key, same) for key in lost],
    )
    wanted = lost or {key: key for key in found.pairs if key in torch}
    lines += _only_in(
        "Flax",
        [
            _Array(n.in_torch, f"{leaves[n].path} {tuple(leaves[n].value.shape)}", shape(n))
            for n in alone
        ],
        [_Array(name, key, torch[key].shape) for key, name in wanted.items()],
        [""] * len(alone),
    )
    return lines


class _Array(NamedTuple):
    """An array without a counterpart, or a candidate for one."""

    name: str  # in PyTorch's spelling
    shown: str
    shape: tuple[int, ...]  # in PyTorch


def _renamed(key: str, name: str) -> str:
    return "" if key == name else f", renamed to {name}"


def _note(key: str, same: Mapping[str, str]) -> str:
    if "weight_hr" in key:
        return ". It is an LSTM projection (proj_size), which Flax's cells do not support"
    if key in same:
        return f". It equals {same[key]}: skip it with `ignore`, or `rename` both to one name"
    return ""


def equal_ones(
    torch: Mapping[str, np.ndarray], keys: Iterable[str], paired: Iterable[str]
) -> dict[str, str]:
    """The arrays that equal a paired one with the same name in its layer, and that one's name.

    Constant arrays, such as new biases, do not count: they are equal by chance.
    """
    alike: dict[Any, list[str]] = defaultdict(list)
    for key in paired:
        if key in torch:
            alike[key.rpartition(".")[2], torch[key].shape, torch[key].dtype].append(key)
    found = {}
    for key in keys:
        array = torch[key]
        if array.size > 1 and (array != array.flat[0]).any():
            others = alike[key.rpartition(".")[2], array.shape, array.dtype]
            same = next((other for other in others if (torch[other] == array).all()), None)
            found |= {} if same is None else {key: same}
    return found


def _layers(found: Any) -> Iterator[str]:
    """A line for each layer with stacked arrays, and each cell or attention in Flax."""
    for each in found.groups:
        yield f"only in PyTorch: {each}"
    for each in found.blocks:
        what = ATTENTION if each.kind == ATTENTION else f"{each.kind} cell"
        place = "/".join(each.path) or "at the top"
        yield f"only in Flax: {what} {place} {each.sizes or ''}".rstrip()


def _only_in(
    side: str, names: Sequence[_Array], there: Sequence[_Array], notes: Sequence[str]
) -> Iterator[str]:
    """A line for each array without a counterpart, with the nearest names on the other side.

    Only names of the same shape are considered, if there are any.
    """
    by_shape: dict[Any, dict[str, str]] = defaultdict(dict)
    for each in there:
        by_shape[each.shape][each.name] = each.shown
    everything = {each.name: each.shown for each in there}
    for number, (each, note) in enumerate(zip(names, notes, strict=True)):
        nearest = ""
        among = by_shape.get(each.shape, everything)
        if number * len(among) < _COMPARED and not note:
            nearest = ", ".join(among[other] for other in near(each.name, among))
        yield f"only in {side}: {each.shown}{note}{nearest and '; nearest: '}{nearest}"


def mismatches(
    key: str, array: np.ndarray, leaf: Leaf, name: Name, placed: Layout
) -> Iterator[str]:
    """A line for each way an array differs: in shape, in kind of dtype, or by values too large."""
    shape, expected = tuple(leaf.value.shape), placed.torch_shape
    if array.shape != expected:
        yield (
            f"wrong shape: {key} {array.shape} for {leaf.path} {shape}, which is {expected} in "
            f"PyTorch{_reason(array.shape, expected, name, shape)}"
        )
    dtype = leaf.value.dtype
    kind, other = (
        next((k for k in _KINDS if jnp.issubdtype(d, k)), None) for d in (array.dtype, dtype)
    )
    if is_count(name) and kind is np.floating and other is np.integer:
        # An averaged counter, or one in half precision.
        if not np.isfinite(array).all():
            yield f"invalid count: {key} is {array!s}; skip it with `ignore`"
            return
        array = counted(array)
    elif kind is not other or kind is None:
        yield f"wrong dtype: {key} {array.dtype} for {leaf.path} {dtype}"
        return
    if other is np.integer and array.size:
        limits = jnp.iinfo(dtype)
        for value in sorted({int(array.min()), int(array.max())}):
            if not limits.min <= value <= limits.max:
                yield f"out of range: {key} has {value}, but {leaf.path} is {dtype}"


def is_count(name: Name) -> bool:
    """Whether this is the number of batches that a batch norm has counted."""
    return name.statistic and name.leaf == "count"


def counted(array: np.ndarray) -> np.ndarray:
    """A count as a whole number, even if it was averaged."""
    if jnp.issubdtype(array.dtype, np.floating):
        return np.rint(array.astype(np.float64)).astype(np.int64)
    return array


def _reason(
    shape: tuple[int, ...], expected: tuple[int, ...], name: Name, flax: tuple[int, ...]
) -> str:
    if name.leaf == "negative_slope" and expected == (1,):
        return ". Flax's PReLU has one slope for all channels"
    if is_one_of(name, flax, shape):
        if name.leaf == "kernel":
            return f". Flax stacks {flax[0]} such layers (nn.scan, nnx.vmap): convert one at a time"
        return (
            f". Flax has {flax[0]}: layers stacked by nn.scan or nnx.vmap, or banks, which "
            "bnjax.to_banks makes of one"
        )
    if len(shape) < 3 or len(shape) != len(expected):
        return ""
    swapped = (expected[1], expected[0], *expected[2:])
    if shape == swapped:
        return ". That is the shape of a transposed convolution: is `transposed` right?"
    is_grouped = 0 < shape[1] < expected[1] and not expected[1] % shape[1]
    if is_grouped and shape[2:] == expected[2:] and shape[0] == expected[0]:
        return ". Flax's ConvTranspose does not support groups"
    return ""


def invalid(key: str, name: Name, array: np.ndarray) -> Iterator[str]:
    """A line for running statistics that are not finite, or a variance that is negative."""
    what = {"mean": "mean", "var": "variance"}.get(name.leaf)
    if what is None or not name.statistic:
        return
    counts, repair = {"non-finite": (~np.isfinite(array)).sum()}, ""
    if what == "variance":
        with np.errstate(invalid="ignore"):  # NaN in bfloat16
            negative = array < 0
        counts["negative"] = negative.sum()
        if negative.any() and array[negative].min() >= _SLIGHTLY_NEGATIVE:
            repair = (
                f", none below {float(array[negative].min()):.1g}. Set them to 0 if they come from "
                "rounding, or add the eps back if one was subtracted from all variances"
            )
    if found := " and ".join(f"{count} {kind}" for kind, count in counts.items() if count):
        yield f"invalid {what}: {key} has {found} of {array.size} values{repair}"
