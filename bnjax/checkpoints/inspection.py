"""Inspect the batch norms in a checkpoint without the model: inspect."""

import re
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from bnjax._words import number_of
from bnjax.checkpoints import contents
from bnjax.checkpoints.tensors import SHARED, as_numpy
from bnjax.models.variables import variables_in

# The output of a channel usually has a standard deviation of about 1; below this, it carries
# almost no information.
NEARLY_DEAD = 1e-2
_EPS = 1e-5
# Variances between this and 0 are negative because an eps was subtracted at loading.
_EPS_SUBTRACTED = -1e-3
_FROZEN = (
    "the statistics are 0 and 1, but scale and bias are trained and no batches were counted. This "
    "is right for a frozen batch norm whose statistics are folded into scale and bias (the "
    "FrozenBatchNorm2d of a Caffe2 backbone), and wrong if the statistics were lost"
)

_NAMES = {
    "weight": "scale",
    "scale": "scale",
    "bias": "bias",
    "running_mean": "mean",
    "mean": "mean",
    "running_var": "var",
    "var": "var",
    "num_batches_tracked": "count",
    "count": "count",
}
_WORDS = {"scale": "scale", "bias": "bias", "mean": "running mean", "var": "running variance"}
Range = tuple[float, float] | None


class Layer(NamedTuple):
    """One batch norm with running statistics."""

    name: str  # its path in the checkpoint, in Flax's naming without the collection
    channels: int
    scale: Range  # smallest and largest finite value; None if there are none
    mean: Range
    var: Range
    updates: int | None  # number of batches counted; None if it has no counter
    dead: int  # channels with constant output, because scale or variance is 0
    # Other channels whose output has a standard deviation, scale * sqrt(var / (var + eps)), < 0.01.
    nearly_dead: int
    not_finite: int  # NaN or infinite values in parameters and statistics
    problems: tuple[str, ...]  # descriptions of what is wrong
    notes: tuple[str, ...] = ()  # descriptions of what is unusual but may be intended


def inspect(tree: Any) -> list[Layer]:
    """Find the batch norms in a checkpoint, in PyTorch's or Flax's naming, at any depth.

    Any module with a running mean and variance is a batch norm: `running_mean` and `running_var` in
    PyTorch, `mean` and `var` in Flax, with scale and bias from `params` beside `batch_stats`.
    Without running statistics, a batch norm looks like any other normalization and is not found.

    Guide: examples/guides/checkpoints.md

    Args:
        tree: nested dicts of arrays, as from `bnjax.load`, or a `TrainState`.

    >>> layer, = inspect({"bn.running_mean": np.zeros(2), "bn.running_var": np.ones(2)})
    >>> layer.name, layer.channels, layer.problems
    ('bn', 2, ('the statistics were never updated: all means are 0 and all variances 1',))
    """
    modules: dict[str, dict[str, np.ndarray]] = defaultdict(dict)
    tracking = set()
    for module, leaf, array, is_statistic in _arrays(_opened(variables_in(tree)), ()):
        modules[module].setdefault(leaf, array)
        if is_statistic:
            tracking.add(module)
    return [
        _layer(module, {_NAMES[leaf]: array for leaf, array in arrays.items()}, {*arrays})
        for module, arrays in modules.items()
        if module in tracking or {"mean", "var"} <= {*arrays}
    ]


def relevant(name: str, shape: Sequence[int]) -> bool:
    """Whether an array with this name, such as "bn1.weight", may belong to a batch norm."""
    leaf = re.split(r"[./]", name.removesuffix("/value"))[-1]
    return leaf in _NAMES and (leaf != "weight" or len(shape) < 2)


def problems(layers: Sequence[Layer]) -> list[str]:
    """The problems of a checkpoint, each with its layer; empty if there are none."""
    if not layers:
        return [
            "no batch norm has running statistics: were they saved? Flax keeps them in the "
            "collection `batch_stats`, not in `params`"
        ]
    return [f"{layer.name or 'top'}: {problem}" for layer in layers for problem in layer.problems]


def notes(layers: Sequence[Layer]) -> list[str]:
    """The notes on a checkpoint, each once, with its layers."""
    found: dict[str, list[str]] = defaultdict(list)
    for layer in layers:
        for note in layer.notes:
            found[note].append(layer.name or "top")
    return [f"{_first_of(names)}: {note}" for note, names in found.items()]


def _first_of(names: Sequence[str]) -> str:
    """The first name, and the number of others."""
    first, *others = names
    return f"{first} and {number_of(len(others), 'other')}" if others else first


def _opened(tree: Any) -> dict[str, Any]:
    """Nested dicts of arrays; trees from files are plain containers and need no JAX."""
    if "jax" not in sys.modules:
        return contents.as_dicts(tree, _as_numpy)
    from bnjax.checkpoints.nested import as_dicts

    return as_dicts(tree, _as_numpy)


def _as_numpy(value: Any, _: str) -> Any:
    array = as_numpy(value)
    return value if array is None else array


def _arrays(tree: Any, path: tuple[str, ...]) -> Iterator[tuple[str, str, np.ndarray, bool]]:
    """The arrays that may belong to a batch norm.

    Yields:
        The module's name, the array's name, the array, and whether it must be a statistic.
    """
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            # orbax saves an nnx variable as {"value": array}.
            yield from _arrays(value, path if key == "value" else (*path, key))
    elif isinstance(tree, np.ndarray) and path and _is_number(tree.dtype):
        *above, last = "/".join(path).split("/")
        inner, _, leaf = last.rpartition(".")
        parts = [part for part in above if part not in ("params", "batch_stats")]
        if leaf in _NAMES:
            module = "/".join([*parts, inner] if inner else parts)
            flax = "batch_stats" in above and leaf in ("mean", "var")
            yield module, leaf, tree, flax or leaf in ("running_mean", "running_var")


def _is_number(dtype: np.dtype) -> bool:
    return dtype.kind in "iufc" or dtype.name in SHARED


def _layer(name: str, arrays: Mapping[str, np.ndarray], leaves: set[str]) -> Layer:
    """The row of a batch norm with at least one running statistic."""
    values = {
        leaf: array.astype(np.float64)
        for leaf, array in arrays.items()
        if leaf != "count" and not np.iscomplexobj(array)
    }
    not_finite = {leaf: int((~np.isfinite(array)).sum()) for leaf, array in values.items()}
    shapes = {leaf: array.shape for leaf, array in values.items()}
    fits = len(set(shapes.values())) == 1 and {"mean", "var"} <= {*values}
    dead, nearly_dead = _quiet(values) if fits else (0, 0)
    updates = _updates(arrays.get("count"))
    problems = [
        f"{number_of(number, 'value')} of the {_WORDS[leaf]} {_are(number)} NaN or infinite"
        for leaf, number in not_finite.items()
        if number
    ]
    problems += _mismatches(values, shapes) if not fits else []
    problems += _negative(values.get("var"))
    unmoved, frozen = _never_updated(values, leaves) if fits else ([], [])
    problems += unmoved
    if fits and dead and dead == values["mean"].size:
        problems.append("all channels are dead: their output does not vary")
    return Layer(
        name,
        max((shape[-1] for shape in shapes.values() if shape), default=1),
        _range(values.get("scale")),
        _range(values.get("mean")),
        _range(values.get("var")),
        updates,
        dead,
        nearly_dead,
        sum(not_finite.values()),
        tuple(problems),
        tuple(frozen),
    )


def _updates(count: np.ndarray | None) -> int | None:
    """The number of batches counted, even if the counter was averaged or cast to float."""
    if count is None or count.size != 1 or np.iscomplexobj(count):
        return None
    number = float(count.astype(np.float64).reshape(()))
    return round(number) if np.isfinite(number) else None


def _are(number: int) -> str:
    return "is" if number == 1 else "are"


def _mismatches(values: Mapping[str, np.ndarray], shapes: Mapping[str, Any]) -> list[str]:
    missing = [_WORDS[leaf] for leaf in ("mean", "var") if leaf not in values]
    if missing and len(set(shapes.values())) == 1:
        return [f"the {word} is missing" for word in missing]
    return [f"running mean, variance, scale and bias differ in shape: {dict(shapes)}"]


def _negative(var: np.ndarray | None) -> list[str]:
    if var is None or not (number := int((var < 0).sum())):
        return []
    lowest = float(var[var < 0].min())
    start = f"{number_of(number, 'running variance')} {_are(number)} negative"
    if lowest < _EPS_SUBTRACTED:
        return [start]
    return [
        f"{start}, down to {lowest:.2g}, as if an eps was subtracted at loading: add it back, or "
        "clip at 0"
    ]


def _never_updated(
    values: Mapping[str, np.ndarray], leaves: set[str]
) -> tuple[list[str], list[str]]:
    """Problems and notes if the statistics are still at their initial values."""
    mean, var = values["mean"], values["var"]
    if not mean.size or mean.any() or not (var == 1).all():
        return [], []
    scale, bias = values.get("scale", np.ones(1)), values.get("bias", np.zeros(1))
    is_trained = bias.any() or not ((scale == 1).all() or not scale.any())
    if is_trained and "running_mean" in leaves and "num_batches_tracked" not in leaves:
        return [], [_FROZEN]
    hint = ""
    if is_trained and "mean" in leaves and "count" not in leaves:
        hint = ". Scale and bias are trained: were `batch_stats` lost, or is the layer frozen?"
    return [f"the statistics were never updated: all means are 0 and all variances 1{hint}"], []


def _quiet(values: Mapping[str, np.ndarray]) -> tuple[int, int]:
    """The number of dead channels, and of nearly dead ones."""
    var = values["var"]
    with np.errstate(invalid="ignore", divide="ignore"):
        std = np.abs(values.get("scale", 1.0)) * np.sqrt(var / (var + _EPS))
    return int((std == 0).sum()), int(((std > 0) & (std < NEARLY_DEAD)).sum())


def _range(array: np.ndarray | None) -> Range:
    finite = array[np.isfinite(array)] if array is not None else np.zeros(0)
    return (float(finite.min()), float(finite.max())) if finite.size else None
