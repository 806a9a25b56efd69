"""Batches on their way to the devices: padded, and split over a mesh."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

Batch = Mapping[str, Any]


def size_of(batch: Batch) -> int:
    """The number of examples: the leading axis of `batch["x"]`."""
    return jax.tree.leaves(batch["x"])[0].shape[0]


def pad_batch(batch: Batch, multiple: int) -> Batch:
    """The batch, filled up to a multiple of a size, with a `mask` of the examples that count.

    >>> pad_batch({"x": np.array([1.0, 2.0, 3.0])}, 2)["mask"].tolist()
    [True, True, True, False]
    """
    size = size_of(batch)
    extra = -size % multiple
    masked = {**batch, "mask": np.asarray(batch.get("mask", np.ones(size, bool)))}
    # Repeat the last example: unlike zeros it is surely something that the model can take.
    index = np.minimum(np.arange(size + extra), size - 1)
    padded = jax.tree.map(lambda leaf: np.asarray(leaf)[index], masked)
    padded["mask"][size:] = False
    return padded


def shardings(mesh: Mesh) -> tuple[Mesh, NamedSharding, NamedSharding]:
    """A mesh of these devices; alike on all of them, and split over them along the leading axis.

    The axes are of type Auto whatever those of the user's mesh: the compiler distributes the model.
    """
    auto = Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * mesh.devices.ndim)
    return auto, NamedSharding(auto, P()), NamedSharding(auto, P(auto.axis_names))


def split_over(sharding: NamedSharding, batch: Any) -> Any:
    """A tree of arrays, split over the devices; each process passes its own part."""
    return jax.tree.map(
        lambda leaf: jax.make_array_from_process_local_data(sharding, np.asarray(leaf)), batch
    )


def on_all(tree: Any, sharding: NamedSharding) -> Any:
    """A tree on all devices, wherever it lies: on one of them, as at first, or on another mesh."""

    def place(leaf: Any) -> Any:
        there = isinstance(leaf, jax.Array) and leaf.sharding == sharding
        return leaf if there else jax.device_put(leaf, sharding)

    return jax.tree.map(place, tree)
