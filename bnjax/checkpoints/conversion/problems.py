"""Everything that keeps a conversion from going, one line for each."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from bnjax.checkpoints.conversion import hints
from bnjax.checkpoints.conversion.blocks import ATTENTION
from bnjax.checkpoints.conversion.layouts import Layout
from bnjax.checkpoints.conversion.names import Name, Rename
from bnjax.checkpoints.conversion.trees import Leaf
from bnjax.checkpoints.conversion.words import near

# Pairs of names that are compared to find the nearest, on each side.
_COMPARED = 6_000
_KINDS = (np.bool_, np.integer, np.floating, np.complexfloating)
# A running variance that is this little below 0 is no damage.
_SLIGHTLY = -1e-3


def refuse(names: Sequence[str], values: Sequence[str]) -> None:
    """Raise one error with all problems."""
    lines = "".join(f"\n  {line}" for line in (*names, *values))
    if names:
        raise ValueError(
            f"PyTorch's state dict and the `variables` do not fit, so nothing was converted. "
            f"Match names with `rename`, or leave them out with `ignore`.{lines}"
        )
    if values:
        raise ValueError(
            "There are running statistics that no batch norm can have, so nothing was converted."
            f"{lines}"
        )


def of_names(
    found: Any,
    torch: Mapping[str, np.ndarray],
    leaves: Mapping[Name, Leaf],
    ruled: Any,
    rename: Rename | None,
    attempt: Callable[..., Any],
) -> list[str]:
    """What has no counterpart, or several, with the repair where one is known."""
    lines = [
        f"ambiguous: {', '.join(keys)} for {', '.join(leaves[name].path for name in names)}"
        for keys, names in found.ambiguous
    ]
    computed, told, told_flax = hints.parametrized(found)
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
    lost = {k: name for k, name in found.torch_only.items() if k not in groups and k not in told}
    alone = [n for n in found.flax_only if n not in blocks and n not in told_flax]
    paired = {str(name) for name in found.pairs.values()}
    others = alone or [name for name in leaves if str(name) in paired]
    same = equal_ones(torch, lost, found.pairs)
    shape = lambda name: ruled.layout(name, leaves[name].value.shape).torch_shape  # noqa: E731
    lines += _only_in(
        "PyTorch",
        [
            _Lost(v, f"{k} {torch[k].shape}{_looked_for(k, v)}", torch[k].shape)
            for k, v in lost.items()
        ],
        [_Lost(name.in_torch, leaves[name].path, shape(name)) for name in others],
        [_note(key, same) for key in lost],
    )
    wanted = lost or {key: key for key in found.pairs if key in torch}
    lines += _only_in(
        "Flax",
        [
            _Lost(n.in_torch, f"{leaves[n].path} {tuple(leaves[n].value.shape)}", shape(n))
            for n in alone
        ],
        [_Lost(name, key, torch[key].shape) for key, name in wanted.items()],
        [""] * len(alone),
    )
    return lines


class _Lost(NamedTuple):
    """An array without a counterpart."""

    name: str  # as PyTorch writes it
    shown: str
    shape: tuple[int, ...]  # in PyTorch


def _looked_for(key: str, name: str) -> str:
    return "" if key == name else f", looked for as {name}"


def _note(key: str, same: Mapping[str, str]) -> str:
    if "weight_hr" in key:
        return ". It is the projection of an LSTM (proj_size), which Flax's cells do not have"
    if key in same:
        return f". It equals {same[key]}: leave it out with `ignore`, or `rename` both to one"
    return ""


def equal_ones(
    torch: Mapping[str, np.ndarray], keys: Iterable[str], paired: Iterable[str]
) -> dict[str, str]:
    """Those of the arrays that equal one that has a counterpart, of the same name in its layer.

    An array of one value alone, as new biases are, says nothing.
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
    """Layers with stacked arrays, and what they would go to."""
    for each in found.groups:
        yield f"only in PyTorch: {each}"
    for each in found.blocks:
        what = ATTENTION if each.kind == ATTENTION else f"{each.kind} cell"
        place = "/".join(each.path) or "at the top"
        yield f"only in Flax: {what} {place} {each.sizes or ''}".rstrip()


def _only_in(
    side: str, names: Sequence[_Lost], there: Sequence[_Lost], notes: Sequence[str]
) -> Iterator[str]:
    """Names without a counterpart, and those of the other side that they may be meant to be.

    Those of the same shape are looked at alone, if there are some.
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


def misfits(key: str, array: np.ndarray, leaf: Leaf, name: Name, placed: Layout) -> Iterator[str]:
    """An array of another shape, of another kind, or with numbers that do not go in."""
    shape, expected = tuple(leaf.value.shape), placed.torch_shape
    if array.shape != expected:
        yield (
            f"wrong shape: {key} {array.shape} for {leaf.path} {shape}, which is {expected} in "
            f"PyTorch{_reason(array.shape, expected, name)}"
        )
    dtype = leaf.value.dtype
    kind, other = (
        next((k for k in _KINDS if jnp.issubdtype(d, k)), None) for d in (array.dtype, dtype)
    )
    if is_count(name) and kind is np.floating and other is np.integer:
        # An average of counters, or one in half precision.
        if not np.isfinite(array).all():
            yield f"impossible count: {key} is {array!s}; leave it out with `ignore`"
            return
        array = counted(array)
    elif kind is not other or kind is None:
        yield f"wrong dtype: {key} {array.dtype} for {leaf.path} {dtype}"
        return
    if other is np.integer and array.size:
        limits = jnp.iinfo(dtype)
        for value in (int(array.min()), int(array.max())):
            if not limits.min <= value <= limits.max:
                yield f"too large a number for {leaf.path} {dtype}: {key} has {value}"


def is_count(name: Name) -> bool:
    """Whether it counts the batches of a batch norm."""
    return name.statistic and name.leaf == "count"


def counted(array: np.ndarray) -> np.ndarray:
    """A count that may have been averaged, as a whole number."""
    if jnp.issubdtype(array.dtype, np.floating):
        return np.rint(array.astype(np.float64)).astype(np.int64)
    return array


def _reason(shape: tuple[int, ...], expected: tuple[int, ...], name: Name) -> str:
    if name.leaf == "negative_slope" and expected == (1,):
        return ". Flax's PReLU has one slope for all channels"
    if len(shape) < 3 or len(shape) != len(expected):
        return ""
    swapped = (expected[1], expected[0], *expected[2:])
    if shape == swapped:
        return ". That is the shape of a transposed convolution: is `transposed` right?"
    if shape[2:] == expected[2:] and shape[0] == expected[0] and not expected[1] % shape[1]:
        return ". Flax has no transposed convolution with groups" if shape[1] < expected[1] else ""
    return ""


def impossible(key: str, name: Name, array: np.ndarray) -> Iterator[str]:
    """What running statistics can't be."""
    what = {"mean": "mean", "var": "variance"}.get(name.leaf)
    if what is None or not name.statistic:
        return
    counts, repair = {"non-finite": (~np.isfinite(array)).sum()}, ""
    if what == "variance":
        with np.errstate(invalid="ignore"):  # NaN in bfloat16
            negative = array < 0
        counts["negative"] = negative.sum()
        if negative.any() and array[negative].min() >= _SLIGHTLY:
            repair = (
                f", none below {float(array[negative].min()):.1g}. Set those to 0, if they are of "
                "rounding, or add the eps again that was taken off all of them"
            )
    if found := " and ".join(f"{count} {kind}" for kind, count in counts.items() if count):
        yield f"impossible {what}: {key} has {found} of {array.size} values{repair}"
