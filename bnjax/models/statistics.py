"""Find, map, check and merge the running statistics in a collection."""

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.core import FrozenDict
from jax.core import Tracer

from bnjax.core.checks import where

Path = tuple[str, ...]


def map_layers(function: Callable[[Path, Mapping[str, Any]], Any], tree: Any) -> Any:
    """Apply `function(path, statistics)` to each batch norm in a collection.

    Everything else is unchanged, and dicts keep their type.
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

    Submodules named `mean` and `var` do not count.
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


def merge_batch_stats(batch_stats: Any, axis: int = 0, *, weights: Any = None) -> Any:
    """Merge several sets of running statistics, such as those of devices that never communicated.

    With weights w that sum to 1, the merged mean is `sum(w * mean)` and, by the law of total
    variance, the merged variance is `sum(w * var) + sum(w * (mean - merged mean)**2)`. If each set
    holds the statistics of its own examples and is weighted by their number, these are the mean and
    variance of all examples. (The average of the variances alone is too small.)

    Args:
        batch_stats: a collection whose arrays have an extra axis, as returned by `pmap` without an
            axis name, or by `jax.tree.map(lambda *sets: jnp.stack(sets), *clients)`.
        axis: the extra axis.
        weights: the weight of each set, of shape (sets,), such as the number of examples of each
            client in federated learning; they need not sum to 1. A set with weight 0 has no effect,
            even if it is NaN. By default, all sets have the same weight.

    Returns:
        The collection without the extra axis.

    Guides: examples/guides/devices.md, examples/guides/scale.md

    Raises:
        ValueError: there are no statistics, they lack the axis, or `weights` has the wrong shape,
            is negative or not finite, or is all 0.

    >>> stats = {"bn": {"mean": jnp.array([[0.0], [10.0]]), "var": jnp.array([[1.0], [1.0]])}}
    >>> float(merge_batch_stats(stats)["bn"]["var"][0])
    26.0
    >>> float(merge_batch_stats(stats, weights=[300, 100])["bn"]["mean"][0])
    2.5
    """
    if not layers_of(batch_stats):
        raise ValueError(
            "`batch_stats` must hold the `mean` and `var` of batch norms, but has none. Pass the "
            "stacked `variables['batch_stats']`."
        )

    def merged(path: Path, stats: Mapping[str, Any]) -> dict[str, Any]:
        sets = _sets(path, stats, axis)
        share = _shares(weights, sets)
        mean, var = (jnp.moveaxis(jnp.asarray(stats[name]), axis, 0) for name in ("mean", "var"))
        share = share.reshape(sets, *(1,) * (mean.ndim - 1)).astype(jnp.result_type(mean, var))
        mean, var = (jnp.where(share > 0, each, 0) for each in (mean, var))
        center = jnp.sum(share * mean, 0)
        spread = jnp.sum(share * (mean - center) ** 2, 0)
        others = {name: jnp.take(value, 0, axis) for name, value in stats.items()}
        return {**others, "mean": center, "var": jnp.sum(share * var, 0) + spread}

    return map_layers(merged, batch_stats)


def _sets(path: Path, stats: Mapping[str, Any], axis: int) -> int:
    """The number of sets that are stacked in a batch norm's statistics."""
    shape, other = (jnp.shape(stats[name]) for name in ("mean", "var"))
    if len(shape) < 2 or not -len(shape) <= axis < len(shape) or not shape[axis]:
        raise ValueError(
            f"`batch_stats` must be stacked along axis {axis}, but the mean at {where(path)} has "
            f"shape {shape}. A single set needs no merging."
        )
    if shape != other:
        raise ValueError(
            f"`batch_stats` must have means and variances of the same shape, but at {where(path)} "
            f"they have {shape} and {other}. Stack both in the same way."
        )
    return shape[axis]


def _shares(weights: Any, sets: int) -> Any:
    """The weights of the sets, normalized to sum to 1."""
    if weights is None:
        return jnp.full(sets, 1 / sets)
    given = jnp.asarray(weights)
    if given.shape != (sets,):
        raise ValueError(
            f"`weights` must have shape ({sets},), one for each stacked set, got shape "
            f"{given.shape}. Pass one number per set, such as its number of examples."
        )
    if not isinstance(given, Tracer):
        values = np.asarray(given, np.float64)
        if not np.isfinite(values).all() or (values < 0).any() or not values.any():
            raise ValueError(
                f"`weights` must be finite, not negative and not all 0, got {values.tolist()}. "
                "Pass one number per set, such as its number of examples."
            )
        return jnp.asarray(values / values.sum())
    given = given.astype(jnp.promote_types(given.dtype, jnp.float32))
    return given / given.sum()
