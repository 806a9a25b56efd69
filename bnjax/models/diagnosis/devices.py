"""Read variables of several devices, stacked or as replicas that differ, as those of one."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx
from flax.core import meta

from bnjax.models.nnx_copies import Copy
from bnjax.models.statistics import Path, layers_of, merge_batch_stats

# The model, its variables, and how far devices differ, by path.
Reading = tuple[nn.Module | Copy, Any, dict[str, float]]


def readings(model: Any, variables: Any) -> Iterator[Callable[[], Reading]]:
    """Ways to read variables: as they are; with stacked statistics; with everything stacked.

    Statistics of several devices are merged into one set; everything else is the first device's.
    """
    if isinstance(model, nnx.Module):
        yield from _of_nnx(model, variables)
        return
    yield lambda: (model, variables, _replicas(variables))
    if not isinstance(variables, Mapping) or not _stacked(variables.get("batch_stats")):
        return
    stats = meta.unbox(variables["batch_stats"])
    others = {name: tree for name, tree in variables.items() if name != "batch_stats"}
    for first in (lambda tree: tree, _first):
        yield lambda first=first: (
            model,
            {**first(others), "batch_stats": merge_batch_stats(stats)},
            _differences(stats),
        )


def _of_nnx(model: nnx.Module, state: Any) -> Iterator[Callable[[], Reading]]:
    def read(model: nnx.Module, state: Any) -> Reading:
        copy = Copy(model, state)
        return copy, copy.variables, _replicas(copy.variables)

    yield lambda: read(model, state)
    flat = dict(nnx.to_flat_state(nnx.state(model)))
    flat |= {} if state is None else dict(nnx.to_flat_state(state))
    arrays = {key: leaf.get_raw_value() for key, leaf in flat.items()}
    stats: dict[str, Any] = {}
    for key, leaf in flat.items():
        if isinstance(leaf, nnx.BatchStat):
            stats.setdefault("/".join(map(str, key[:-1])), {})[key[-1]] = arrays[key]
    if not _stacked(stats):
        return
    for first in (lambda tree: tree, _first):

        def unstacked(first: Callable = first) -> Reading:
            merged, values = merge_batch_stats(stats), dict(first(arrays))
            for key, leaf in flat.items():
                if isinstance(leaf, nnx.BatchStat):
                    values[key] = merged["/".join(map(str, key[:-1]))][key[-1]]
            single = nnx.clone(model)
            leaves = [(key, leaf.replace(values[key])) for key, leaf in flat.items()]
            nnx.update(single, nnx.from_flat_state(leaves))
            return *read(single, None)[:2], _differences(stats)

        yield unstacked


def _stacked(stats: Any) -> bool:
    """Whether all means and variances have a leading axis of the same size."""
    sizes = {
        jnp.shape(layer[name])[0] if jnp.ndim(layer[name]) > 1 else 0
        for layer in layers_of(meta.unbox(stats or {})).values()
        for name in ("mean", "var")
    }
    return len(sizes) == 1 and 0 not in sizes


def _first(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf[0] if jnp.ndim(leaf) else leaf, tree)


def _replicas(variables: Any) -> dict[str, float]:
    """How far the copies of arrays differ that JAX believes to be replicated."""
    stats = variables.get("batch_stats", {}) if isinstance(variables, Mapping) else {}
    copies = {}
    for path, layer in layers_of(stats).items():
        both = [meta.unbox(layer[name]) for name in ("mean", "var")]
        if all(isinstance(x, jax.Array) and x.is_fully_replicated for x in both):
            copies[path] = [
                np.stack([np.asarray(shard.data) for shard in x.addressable_shards]) for x in both
            ]
    return _unequal(copies)


def _differences(stats: Any) -> dict[str, float]:
    """How far the sets of stacked statistics differ, by path."""
    return _unequal({path: [x["mean"], x["var"]] for path, x in layers_of(stats).items()})


def _unequal(rows: Mapping[Path, Sequence[Any]]) -> dict[str, float]:
    apart = {"/".join(path): _apart(*map(np.asarray, both)) for path, both in rows.items()}
    return {path: distance for path, distance in apart.items() if distance}


def _apart(mean: np.ndarray, var: np.ndarray) -> float:
    """The largest distance of a row's mean or deviation from the average, in deviations."""
    wide = np.complex128 if np.iscomplexobj(mean) else np.float64
    mean, std = mean.astype(wide), np.sqrt(np.abs(var.astype(np.float64)))
    unit = np.maximum(std.mean(0), np.finfo(np.float32).tiny)
    apart = [np.abs(rows - rows.mean(0)) / unit for rows in (mean, std)]
    # The mean of identical rows may differ from them by rounding.
    alike = all(
        np.array_equal(rows, rows[:1].repeat(len(rows), 0), equal_nan=True) for rows in (mean, std)
    )
    return 0.0 if alike else float(np.nanmax(apart, initial=0))
