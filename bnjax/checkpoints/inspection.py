"""The batch norms in a checkpoint, by their numbers alone: inspect."""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from bnjax.checkpoints.nested import as_dicts
from bnjax.checkpoints.tensors import as_numpy
from bnjax.models.saved import variables_in

# Below this standard deviation, where others have about 1, a channel says next to nothing.
NEARLY_DEAD = 1e-2
_EPS = 1e-5

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
    scale: Range  # smallest and largest finite value; None if there is none
    mean: Range
    var: Range
    updates: int | None  # how many batches it counted; None if it does not
    dead: int  # channels whose output does not vary, by a scale or a variance of 0
    # Others whose output has a standard deviation, scale * sqrt(var / (var + eps)), below 0.01.
    nearly_dead: int
    not_finite: int  # values that are NaN or infinite, in parameters and statistics
    problems: tuple[str, ...]  # what is wrong with it, in words


def inspect(tree: Any) -> list[Layer]:
    """The batch norms in a checkpoint, in PyTorch's or Flax's naming, at any depth.

    A batch norm is what has a running mean and a running variance: `running_mean` and `running_var`
    in PyTorch, `mean` and `var` in Flax, with the scale and bias from `params` beside
    `batch_stats`. Without running statistics it can't be told from other normalizations.

    Guide: examples/guides/checkpoints.md

    Args:
        tree: nested dicts of arrays, as from `bnjax.load`, or a `TrainState`.

    >>> layer, = inspect({"bn.running_mean": np.zeros(2), "bn.running_var": np.ones(2)})
    >>> layer.name, layer.channels, layer.problems
    ('bn', 2, ('the statistics were never updated: all means are 0 and all variances 1',))
    """
    modules: dict[str, dict[str, np.ndarray]] = defaultdict(dict)
    for module, leaf, array in _arrays(as_dicts(variables_in(tree), _as_numpy), ()):
        modules[module].setdefault(leaf, array)
    return [
        _layer(module, {_NAMES[leaf]: array for leaf, array in arrays.items()})
        for module, arrays in modules.items()
        if {"running_mean", "running_var"} & {*arrays} or {"mean", "var"} <= {*arrays}
    ]


def relevant(name: str, shape: Sequence[int]) -> bool:
    """Whether an array of this name, as "bn1.weight" or "bn1/scale", may be of a batch norm."""
    leaf = re.split(r"[./]", name.removesuffix("/value"))[-1]
    return leaf in _NAMES and (leaf != "weight" or len(shape) < 2)


def problems(layers: Sequence[Layer]) -> list[str]:
    """What is wrong with a checkpoint, each with the layer; empty if nothing is."""
    if not layers:
        return [
            "no batch norm has running statistics here: were they saved, in Flax beside `params` "
            "the collection `batch_stats`?"
        ]
    return [f"{layer.name or 'top'}: {problem}" for layer in layers for problem in layer.problems]


def _as_numpy(value: Any, _: str) -> Any:
    array = as_numpy(value)
    return value if array is None else array


def _arrays(tree: Any, path: tuple[str, ...]) -> Iterator[tuple[str, str, np.ndarray]]:
    """The arrays that may be of a batch norm: the name of its module, its own, and the array."""
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            # Of an nnx variable, orbax saves {"value": array}.
            yield from _arrays(value, path if key == "value" else (*path, key))
    elif isinstance(tree, np.ndarray) and path and jnp.issubdtype(tree.dtype, jnp.number):
        inner, _, leaf = path[-1].rpartition(".")
        parts = [part for part in path[:-1] if part not in ("params", "batch_stats")]
        if leaf in _NAMES:
            yield "/".join([*parts, inner] if inner else parts), leaf, tree


def _layer(name: str, arrays: Mapping[str, np.ndarray]) -> Layer:
    """The row of a batch norm that has one of the running statistics at least."""
    count = arrays.get("count")
    updates = int(count) if count is not None and count.size == 1 else None
    values = {
        leaf: array.astype(np.float64)
        for leaf, array in arrays.items()
        if leaf != "count" and not np.iscomplexobj(array)
    }
    not_finite = {leaf: int((~np.isfinite(array)).sum()) for leaf, array in values.items()}
    shapes = {leaf: array.shape for leaf, array in values.items()}
    fits = len(set(shapes.values())) == 1 and {"mean", "var"} <= {*values}
    mean, var = values.get("mean", np.zeros(0)), values.get("var", np.zeros(0))
    dead, nearly_dead = _quiet(values) if fits else (0, 0)
    found = [
        f"{number} values of the {_WORDS[leaf]} are NaN or infinite"
        for leaf, number in not_finite.items()
        if number
    ]
    if not fits:
        found.append(f"running mean, variance, scale and bias do not fit together: {shapes}")
    if negative := int((var < 0).sum()):
        found.append(f"{negative} running variances are negative")
    if fits and mean.size and not mean.any() and (var == 1).all():
        found.append("the statistics were never updated: all means are 0 and all variances 1")
    if fits and dead and dead == mean.size:
        found.append("all channels are dead: their output does not vary")
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
        tuple(found),
    )


def _quiet(values: Mapping[str, np.ndarray]) -> tuple[int, int]:
    """How many channels are dead, and how many nearly."""
    var = values["var"]
    with np.errstate(invalid="ignore", divide="ignore"):
        std = np.abs(values.get("scale", 1.0)) * np.sqrt(var / (var + _EPS))
    return int((std == 0).sum()), int(((std > 0) & (std < NEARLY_DEAD)).sum())


def _range(array: np.ndarray | None) -> Range:
    finite = array[np.isfinite(array)] if array is not None else np.zeros(0)
    return (float(finite.min()), float(finite.max())) if finite.size else None
