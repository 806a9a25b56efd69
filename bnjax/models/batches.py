"""Batches: what of them a model is called with, which examples count, how they go to devices."""

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
    """Sums over examples of loss and metrics, by name; `count` is the number of the examples.

    So is `totals["count"]`, if no metric has that name.
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
    """How a model is called with a batch, and what in a batch has an entry for each example.

    Attributes:
        inputs: the names of entries that are the arguments, or pairs of keyword and name, or a
            function of the batch that returns a tuple of arguments, a dict of keywords, or one
            argument.
        per_example: the names of entries with an entry for each example; None for all whose leading
            axis has the length of the first input's.
    """

    inputs: Any = ("x",)
    per_example: tuple[str, ...] | None = None

    def named(self, batch: Any) -> dict[str, Any]:
        """A batch as a dict; an array alone is its `x`."""
        batch = checks.batch_as_dict(batch)
        if not callable(self.inputs):
            checks.batch_holds(batch, self._names)
        if self.per_example is not None:
            checks.per_example(batch, self.per_example, self.size(batch))
        if "mask" in batch:
            checks.mask_of_examples(batch["mask"], self.size(batch))
        return batch

    def call(self, batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments and keywords with which the model is called."""
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
        """What of a batch the model needs, and the mask."""
        needed = {*self._names, "mask"} if self._names else batch.keys()
        return {name: value for name, value in batch.items() if name in needed}

    def size(self, batch: Batch) -> int:
        """The number of examples: the leading axis of the first input."""
        found = jax.eval_shape(self.call, batch) if callable(self.inputs) else self.call(batch)
        shapes = [leaf.shape for leaf in jax.tree.leaves(found) if hasattr(leaf, "shape")]
        lengths = [shape[0] for shape in shapes if shape]
        # A mask tells examples from a table that is an input, too.
        masked = np.shape(batch.get("mask", 0))[:1]
        named = [name for name in self._names if name in {*(self.per_example or ())} & batch.keys()]
        if named:
            lengths = [np.shape(leaf)[0] for leaf in jax.tree.leaves(batch[named[0]])]
        return masked[0] if {*masked} & {*lengths} else checks.leading_axis(lengths, shapes)

    def each(self, batch: Batch) -> dict[str, Any]:
        """For every array of a batch, whether it has an entry for each example."""
        size, named = self.size(batch), self.per_example
        by_length = batch.keys() if named is None else {*self._names, "mask"}

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
        """The sum of the loss, and those of all that is reported, over the examples that count."""
        size, mask = self.size(batch), batch.get("mask", True)

        def values(outputs: Any, batch: Batch) -> tuple[Any, dict[str, Any]]:
            return checks.loss_and_metrics(loss_fn(outputs, batch))

        found = values(outputs, batch)
        if "mask" in batch and any(jnp.ndim(value) == 0 for value in jax.tree.leaves(found)):
            # A mean has seen the masked examples too. That of one example alone has seen no other.
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
        """The batch, filled up to a multiple of a size; its `mask` says which examples count."""
        size = self.size(batch)
        extra = -size % multiple
        masked = {**batch, "mask": np.asarray(batch.get("mask", np.ones(size, bool)))}
        # Repeat the last example: unlike zeros it is surely something that the model can take.
        index = np.minimum(np.arange(size + extra), size - 1)
        padded = jax.tree.map(
            lambda leaf, each: np.asarray(leaf)[index] if each else leaf, masked, self.each(masked)
        )
        padded["mask"][size:] = False
        return padded

    def parts(self, batch: Batch, number: int) -> tuple[list[jax.Array], Callable[[Any], Any]]:
        """What has an entry for each example, cut in parts and stacked; and a batch of one part.

        Each part takes every so many-th example, and so the same number from each device.
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
        """A batch over the devices of a mesh; each process passes its own examples."""

        def place(leaf: Any, each: bool) -> jax.Array:
            sharding = split if each else alike
            if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
                return jax.device_put(leaf, sharding)  # one array of all processes
            return jax.make_array_from_process_local_data(sharding, np.asarray(leaf))

        return jax.tree.map(place, dict(batch), self.each(batch))


DEFAULT = Layout()


def pad_batch(batch: Batch, multiple: int) -> dict[str, Any]:
    """The batch, filled up to a multiple of a size, with a `mask` of the examples that count.

    Guide: examples/guides/recipes.md

    >>> pad_batch({"x": np.array([1.0, 2.0, 3.0])}, 2)["mask"].tolist()
    [True, True, True, False]
    """
    return DEFAULT.padded(batch, multiple)


def layout(inputs: Inputs = "x", per_example: Sequence[str] | None = None) -> Layout:
    """The layout of a user's batches."""
    checks.inputs(inputs)
    how: Any = (inputs,) if isinstance(inputs, str) else inputs
    if not callable(inputs):
        how = tuple(how.items() if isinstance(how, Mapping) else how)
    if isinstance(per_example, str):
        per_example = (per_example,)
    return Layout(how, None if per_example is None else tuple(per_example))


def shardings(mesh: Mesh) -> tuple[Mesh, NamedSharding, NamedSharding]:
    """A mesh of these devices; alike on all of them, and split over them along the leading axis.

    The axes are of type Auto whatever those of the user's mesh: the compiler distributes the model.
    """
    auto = Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * mesh.devices.ndim)
    return auto, NamedSharding(auto, P()), NamedSharding(auto, P(auto.axis_names))


def on_all(tree: Any, sharding: NamedSharding) -> Any:
    """A tree on all devices, wherever it lies: on one of them, as at first, or on another mesh."""

    def place(leaf: Any) -> Any:
        there = isinstance(leaf, jax.Array) and leaf.sharding == sharding
        return leaf if there else jax.device_put(leaf, sharding)

    return jax.tree.map(place, tree)


def tracked(batches: Iterable[Any], progress: bool, label: str) -> Iterable[Any]:
    """The batches, with a progress bar if one is asked for."""
    if not progress:
        return batches
    from rich.progress import track

    return track(batches, label, total=len(batches) if isinstance(batches, Sized) else None)
