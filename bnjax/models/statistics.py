"""The statistics of a model's batch norms as a tree: find, map, validate and merge them."""

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.core import FrozenDict

from bnjax.core.checks import where

Path = tuple[str, ...]


def map_layers(function: Callable[[Path, Mapping[str, Any]], Any], tree: Any) -> Any:
    """Apply a function of path and statistics to each batch norm in a collection.

    Everything else stays as it is, and dicts keep their type.
    """

    def visit(path: Path, node: Any) -> Any:
        if not isinstance(node, Mapping):
            return node
        if is_layer(node):
            new = function(path, node)
        else:
            new = {name: visit((*path, name), child) for name, child in node.items()}
        return FrozenDict(new) if isinstance(node, FrozenDict) and isinstance(new, dict) else new

    return visit((), tree)


def is_layer(node: Mapping[str, Any]) -> bool:
    """Whether a node of a collection holds the statistics of a batch norm.

    Modules that are named `mean` and `var` do not count.
    """
    return {"mean", "var"} <= {*node} and not isinstance(node["mean"], Mapping)


def layers_of(tree: Any) -> dict[Path, Mapping[str, Any]]:
    """The statistics of each batch norm in a collection, by path."""
    found: dict[Path, Mapping[str, Any]] = {}
    map_layers(found.__setitem__, tree)
    return found


def impossible(mean: np.ndarray, var: np.ndarray) -> np.ndarray:
    """A mask of the channels with impossible statistics: not finite, or a negative variance."""
    return ~(np.isfinite(mean) & np.isfinite(var) & (var >= 0))


def merge_batch_stats(batch_stats: Any, axis: int = 0) -> Any:
    """One set of running statistics from several, such as those of devices that never talked.

    The mean of the means, and by the law of total variance the mean of the variances plus the
    variance of the means; each weighs alike. (The mean of the variances alone is too small.)

    Args:
        batch_stats: a collection whose arrays have one more axis, as `pmap` without an axis name
            returns it.
        axis: that axis.

    Returns:
        The collection without that axis.

    Guides: examples/guides/devices.md, examples/guides/scale.md

    Raises:
        ValueError: the statistics have no such axis.

    >>> stats = {"bn": {"mean": jnp.array([[0.0], [10.0]]), "var": jnp.array([[1.0], [1.0]])}}
    >>> float(merge_batch_stats(stats)["bn"]["var"][0])
    26.0
    """

    def merged(path: Path, stats: Mapping[str, Any]) -> dict[str, Any]:
        if jnp.ndim(stats["mean"]) < 2:
            raise ValueError(
                f"`batch_stats` must hold several sets, stacked along axis {axis}, but the mean at "
                f"{where(path)} has shape {jnp.shape(stats['mean'])}. One set needs no merging."
            )
        mean = jnp.mean(stats["mean"], axis)
        var = jnp.mean(stats["var"], axis) + jnp.var(stats["mean"], axis)
        others = {name: jnp.take(value, 0, axis) for name, value in stats.items()}
        return {**others, "mean": mean, "var": var}

    return map_layers(merged, batch_stats)
