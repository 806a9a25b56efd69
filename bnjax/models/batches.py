"""How to call a model with a batch, which of its examples count, and how to shard it."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from bnjax.core.moments import working_dtype
from bnjax.models import checks

Batch = Mapping[str, Any]
Metrics = dict[str, jax.Array]
LossFn = Callable[[Any, Any], Any]
Inputs = str | Sequence[str] | Mapping[str, str] | Callable[[Any], Any]


class Totals(dict[str, jax.Array]):
    """Sums of loss and metrics over the examples, by name; `count` is the number of examples.

    `totals["count"]` returns it as well, unless a metric has that name.
    """

    def __init__(self, sums: Mapping[str, Any], count: Any) -> None:
        super().__init__(sums)
        self.count = count

    def __missing__(self, name: str) -> Any:  # noqa: D105 - the class says it
        if name == "count":
            return self.count
        raise KeyError(name)


jax.tree_util.register_pytree_node(
    Totals, lambda each: ((dict(each), each.count), None), lambda _, parts: Totals(*parts)
)


@dataclasses.dataclass(frozen=True)
class Layout:
    """How to call a model with a batch, and which entries have one value per example.

    Attributes:
        inputs: names of the entries to pass as arguments, pairs of keyword and name, or a function
            of the batch that returns a tuple of arguments, a dict of keywords, or a single
            argument.
        per_example: names of the entries with one value per example; None for all whose leading
            axis is as long as the first input's.
    """

    inputs: Any = ("x",)
    per_example: tuple[str, ...] | None = None

    def named(self, batch: Any) -> dict[str, Any]:
        """The batch as a dict, after checks; a bare array becomes its `x`."""
        batch = checks.batch_as_dict(batch)
        checks.arrays_of_batch(batch)
        if not callable(self.inputs):
            checks.batch_holds(batch, self._names)
        if self.per_example is not None:
            checks.per_example(batch, self.per_example, self.size(batch))
        if "mask" in batch:
            checks.mask_of_examples(batch["mask"], self.size(batch))
        if "bank" in batch:
            checks.bank_of_examples(batch["bank"])
        return batch

    def call(self, batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The positional and keyword arguments to call the model with."""
        if not callable(self.inputs):
            pairs = [name for name in self.inputs if not isinstance(name, str)]
            args = tuple(batch[name] for name in self.inputs if isinstance(name, str))
            return args, {keyword: batch[name] for keyword, name in pairs}
        found = self.inputs(batch)
        if isinstance(found, Mapping):
            return (), dict(found)
        return found if isinstance(found, tuple) else (found,), {}

    @property
    def _names(self) -> tuple[str, ...]:
        if callable(self.inputs):
            return ()
        return tuple(name if isinstance(name, str) else name[1] for name in self.inputs)

    def used(self, batch: Batch) -> dict[str, Any]:
        """The entries of a batch that the model needs, with the mask and the banks."""
        needed = {*self._names, "mask", "bank"} if self._names else batch.keys()
        return {name: value for name, value in batch.items() if name in needed}

    def size(self, batch: Batch) -> int:
        """The number of examples: the leading axis of the first input."""
        found = jax.eval_shape(self.call, batch) if callable(self.inputs) else self.call(batch)
        shapes = [leaf.shape for leaf in jax.tree.leaves(found) if hasattr(leaf, "shape")]
        lengths = [shape[0] for shape in shapes if shape]
        # The first input may be a table without a batch axis, so a mask's length takes precedence.
        masked = np.shape(batch.get("mask", 0))[:1]
        named = [name for name in self._names if name in {*(self.per_example or ())} & batch.keys()]
        if named:
            lengths = [np.shape(leaf)[0] for leaf in jax.tree.leaves(batch[named[0]])]
        return masked[0] if {*masked} & {*lengths} else checks.leading_axis(lengths, shapes)

    def each(self, batch: Batch) -> dict[str, Any]:
        """Whether each array of a batch has one value per example."""
        size, named = self.size(batch), self.per_example
        by_length = batch.keys() if named is None else {*self._names, "mask", "bank"}

        def is_each(name: str, leaf: Any) -> bool:
            return name in (named or ()) or (name in by_length and np.shape(leaf)[:1] == (size,))

        return {
            name: jax.tree.map(functools.partial(is_each, name), entry)
            for name, entry in batch.items()
        }

    def counted(self, batch: Batch) -> jax.Array:
        """The number of examples that count."""
        if "mask" not in batch:
            return jnp.asarray(self.size(batch), jnp.float32)
        return jnp.sum(batch["mask"], dtype=jnp.float32)

    def totals(self, loss_fn: LossFn, outputs: Any, batch: Batch) -> tuple[jax.Array, Totals]:
        """Sum loss and metrics over the examples that count; return the loss separately, too."""
        size, mask = self.size(batch), batch.get("mask", True)

        def values(outputs: Any, batch: Batch) -> tuple[Any, dict[str, Any]]:
            return checks.loss_and_metrics(loss_fn(outputs, batch))

        found = values(outputs, batch)
        if "mask" in batch and any(jnp.ndim(value) == 0 for value in jax.tree.leaves(found)):
            # The mean over the batch would include masked examples, so evaluate each one alone.
            each = (
                jax.tree.map(lambda leaf: np.shape(leaf)[:1] == (size,), outputs),
                self.each(batch),
            )
            axes = jax.tree.map(lambda mapped: 0 if mapped else None, each)

            def one(outputs: Any, batch: Batch) -> Any:
                alone = jax.tree.map(
                    lambda leaf, mapped: leaf[None] if mapped else leaf, (outputs, batch), each
                )
                return values(*alone)

            alone = jax.vmap(one, axes)(outputs, dict(batch))
            found = jax.tree.map(lambda v, e: e if jnp.ndim(v) == 0 else v, found, alone)

        def total(name: str, value: Any) -> jax.Array:
            value = checks.mean_or_each(name, jnp.asarray(value), size)
            value = value.astype(working_dtype(value.dtype))
            return value * count if value.ndim == 0 else jnp.sum(jnp.where(mask, value, 0))

        count = self.counted(batch)
        loss, metrics = found
        loss = total("loss", loss)
        sums = {name: total(name, value) for name, value in metrics.items()}
        return loss, Totals({"loss": loss, **sums}, count)

    def padded(self, batch: Batch, multiple: int) -> dict[str, Any]:
        """Pad a batch to a multiple of a size; its `mask` marks the examples that count."""
        size = self.size(batch)
        extra = -size % multiple
        masked = {**batch, "mask": np.asarray(batch.get("mask", np.ones(size, bool)))}
        # Pad with the last example: unlike zeros, it is known to be valid input.
        index = np.minimum(np.arange(size + extra), size - 1)
        padded = jax.tree.map(
            lambda leaf, each: np.asarray(leaf)[index] if each else leaf, masked, self.each(masked)
        )
        padded["mask"][size:] = False
        return padded

    def parts(self, batch: Batch, number: int) -> tuple[list[jax.Array], Callable[[Any], Any]]:
        """Split and stack the per-example entries; also return a function from part to batch.

        Each part takes every `number`-th example, so that each device contributes equally.
        """
        leaves, tree = jax.tree.flatten(dict(batch))
        each = jax.tree.leaves(self.each(batch))
        cut = [
            jnp.swapaxes(jnp.reshape(leaf, (-1, number, *leaf.shape[1:])), 0, 1)
            for leaf, of_example in zip(leaves, each, strict=True)
            if of_example
        ]

        def whole(part: Sequence[jax.Array]) -> Any:
            own = iter(part)
            pairs = zip(leaves, each, strict=True)
            return tree.unflatten(next(own) if of_example else leaf for leaf, of_example in pairs)

        return cut, whole

    def split(self, batch: Batch, alike: NamedSharding, split: NamedSharding) -> Any:
        """Shard a batch over the devices of a mesh; each process passes its own examples."""

        def place(leaf: Any, each: bool) -> jax.Array:
            sharding = split if each else alike
            if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
                return jax.device_put(leaf, sharding)  # a global array
            return jax.make_array_from_process_local_data(sharding, np.asarray(leaf))

        return jax.tree.map(place, dict(batch), self.each(batch))


DEFAULT = Layout()


def pad_batch(batch: Batch, multiple: int) -> dict[str, Any]:
    """Pad a batch to a multiple of a size; its `mask` marks the examples that count.

    Guide: examples/guides/recipes.md

    >>> pad_batch({"x": np.array([1.0, 2.0, 3.0])}, 2)["mask"].tolist()
    [True, True, True, False]
    """
    return DEFAULT.padded(batch, multiple)


def layout(inputs: Inputs = "x", per_example: Sequence[str] | None = None) -> Layout:
    """The `Layout` that `inputs` and `per_example` describe."""
    checks.inputs(inputs)
    how: Any = (inputs,) if isinstance(inputs, str) else inputs
    if not callable(inputs):
        how = tuple(how.items() if isinstance(how, Mapping) else how)
    if isinstance(per_example, str):
        per_example = (per_example,)
    return Layout(how, None if per_example is None else tuple(per_example))


def shardings(mesh: Mesh) -> tuple[Mesh, NamedSharding, NamedSharding]:
    """A mesh of the same devices, and two shardings on it: replicated, and split by leading axis.

    Its axes have type Auto, whatever the type of the user's axes, so the compiler partitions the
    model.
    """
    auto = Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * mesh.devices.ndim)
    return auto, NamedSharding(auto, P()), NamedSharding(auto, P(auto.axis_names))


def on_all(tree: Any, sharding: NamedSharding) -> Any:
    """Replicate a tree on all devices, wherever it is now."""

    def place(leaf: Any) -> Any:
        there = isinstance(leaf, jax.Array) and leaf.sharding == sharding
        return leaf if there else jax.device_put(leaf, sharding)

    return jax.tree.map(place, tree)


def tracked(batches: Iterable[Any], progress: bool, label: str) -> Iterable[Any]:
    """The batches, with a progress bar if `progress`."""
    if not progress:
        return batches
    from rich.progress import track

    return track(batches, label, total=len(batches) if isinstance(batches, Sized) else None)
