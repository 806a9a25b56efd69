"""Batches: which examples count, losses over them, and how they go to the devices of a mesh."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from bnjax.core.moments import working_dtype

Batch = Mapping[str, Any]
Metrics = dict[str, jax.Array]
LossFn = Callable[[Any, Any], Any]


def named(batch: Any) -> dict[str, Any]:
    """A batch as a dict; an array alone is its `x`."""
    if not isinstance(batch, Mapping):
        if not hasattr(batch, "shape"):
            raise TypeError(
                "A batch must be an array or a dict with the model's input as `x`, got "
                f'{type(batch).__name__}. Write {{"x": images, "y": labels}}.'
            )
        return {"x": batch}
    if "x" not in batch:
        raise ValueError(
            f"A batch must hold the model's input as `x`, got {sorted(batch)}. Rename it, as "
            'in {"x": images, "y": labels}.'
        )
    if "mask" in batch:
        size, mask = size_of(batch), batch["mask"]
        shape, dtype = getattr(mask, "shape", None), getattr(mask, "dtype", None)
        if shape != (size,) or dtype != np.bool_:
            raise ValueError(
                f"The `mask` of a batch of {size} examples must be an array of bool, of shape "
                f"({size},), got {dtype or type(mask).__name__} of shape {shape}."
            )
    return dict(batch)


def size_of(batch: Batch) -> int:
    """The number of examples: the leading axis of `batch["x"]`."""
    return jax.tree.leaves(batch["x"])[0].shape[0]


def counted(batch: Batch) -> jax.Array:
    """The number of examples that count."""
    if "mask" not in batch:
        return jnp.asarray(size_of(batch), jnp.float32)
    return jnp.sum(batch["mask"], dtype=jnp.float32)


def totals_of(loss_fn: LossFn, outputs: Any, batch: Batch) -> Metrics:
    """The sums of loss and metrics over the examples that count."""

    def values(outputs: Any, batch: Batch) -> Metrics:
        result = loss_fn(outputs, batch)
        loss, metrics = result if isinstance(result, tuple) else (result, {})
        return {**metrics, "loss": loss}

    def one(outputs: Any, batch: Batch) -> Metrics:
        return values(*jax.tree.map(lambda leaf: leaf[None], (outputs, batch)))

    found = values(outputs, batch)
    mask = batch.get("mask", True)
    if "mask" in batch and any(jnp.ndim(value) == 0 for value in found.values()):
        # A mean has seen the masked examples too. That of one example alone has seen no other.
        each = jax.vmap(one)(outputs, dict(batch))
        found = {name: each[name] if jnp.ndim(v) == 0 else v for name, v in found.items()}

    def total(name: str, value: jax.Array) -> jax.Array:
        value = jnp.asarray(value)
        if value.shape not in ((), (size_of(batch),)):
            raise ValueError(
                f"`loss_fn` must give `{name}` as a mean of shape () or with one entry for each "
                f"example, ({size_of(batch)},), got shape {value.shape}. Take the mean over the "
                "other axes."
            )
        value = value.astype(working_dtype(value.dtype))
        return value * counted(batch) if value.ndim == 0 else jnp.sum(jnp.where(mask, value, 0))

    return {name: total(name, value) for name, value in found.items()}


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
