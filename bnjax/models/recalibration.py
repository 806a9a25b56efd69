"""Exact population statistics for the batch norms of a model, from an iterator of batches."""

import contextlib
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, overload

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx
from flax.core import FrozenDict, meta, unfreeze
from jax.sharding import Mesh

from bnjax import globs
from bnjax.core.moments import Moments
from bnjax.layers.conventions import rows
from bnjax.models import checks
from bnjax.models.accumulation import begin, population, run_and_add
from bnjax.models.batches import Batch, Inputs, Layout, layout, on_all, shardings, tracked
from bnjax.models.frames import settings_key
from bnjax.models.nnx_copies import Copy
from bnjax.models.programs import Program, kept_with
from bnjax.models.saved import variables_of_model
from bnjax.models.statistics import Path, layers_of, map_layers
from bnjax.models.visit import Visit
from bnjax.models.visits import visiting

Batches = Iterable[Any]


@overload
def recalibrate(
    model: nn.Module,
    variables: Any,
    batches: Batches,
    *,
    paths: globs.Paths = ...,
    sequential: bool = ...,
    inputs: Inputs = ...,
    apply_kwargs: Mapping[str, Any] | None = ...,
    mesh: Mesh | None = ...,
    progress: bool = ...,
) -> dict[str, Any]: ...
@overload
def recalibrate(
    model: nnx.Module,
    variables: Any,
    batches: Batches,
    *,
    paths: globs.Paths = ...,
    sequential: bool = ...,
    inputs: Inputs = ...,
    apply_kwargs: Mapping[str, Any] | None = ...,
    mesh: Mesh | None = ...,
    progress: bool = ...,
) -> nnx.State: ...
def recalibrate(
    model: nn.Module | nnx.Module,
    variables: Any,
    batches: Batches,
    *,
    paths: globs.Paths = "**",
    sequential: bool = False,
    inputs: Inputs = "x",
    apply_kwargs: Mapping[str, Any] | None = None,
    mesh: Mesh | None = None,
    progress: bool = False,
) -> Any:
    """Recompute running statistics: the exact mean and variance of each batch norm over the data.

    Running statistics are a decaying average over the last batches, seen by parameters that have
    changed since. This pools the moments of all batches by count, which gives the mean and the
    biased variance of all values: for the batches (0, 2) and (10, 12) a variance of 26, not 1
    (PreciseBN: Wu and Johnson, "Rethinking 'Batch' in BatchNorm", 2021). Averaged weights (EMA,
    SWA) need it, and it helps after training with small batches.

    Guide: examples/guides/recalibration.md

    Args:
        model: a linen or nnx model with bnjax's or Flax's batch norms. An nnx model runs in eval
            mode and is not modified.
        variables: its variables, which are not modified. For an nnx model, an `nnx.State` of all or
            part of it, such as averaged parameters, or None for its own. A `TrainState` or the
            result of `bnjax.load` works as well.
        batches: inputs of the model, or dicts such as those used in training, with `"x"` and
            optionally `"mask"`, bool (N,), True for the examples that count. The last batch may be
            smaller.
        paths: which batch norms to recompute, as globs over module paths; all by default.
        sequential: False, the default, takes one pass over the data: each batch runs as in
            training, normalized by its own statistics, so deep layers see what they saw then. True
            takes one pass per layer, in call order, in evaluation mode: each layer sees the output
            of recalibrated layers, as it will when the model is used. `batches` must then be
            iterable more than once, such as a list.
        inputs: which entries of a batch to call the model with, as for `training.train_step`, such
            as `("obs", "action")`.
        apply_kwargs: extra arguments for the model's call, such as `{"train": False}`. Batch norms
            measure regardless of them; dropout and the like follow them.
        mesh: split each batch over the devices of the mesh.
        progress: show a progress bar.

    Returns:
        New variables, in which only the means and variances of batch norms differ. For an nnx
        model, the whole `nnx.State`, to pass to `nnx.update(model, state)`.

    Raises:
        ValueError: there is no batch or no batch norm, a batch norm that matches `paths` is not
            called, the variables do not fit the model, or a channel has no finite mean and
            variance.
    """
    checks.flax_model(model)
    checks.several_batches(batches)
    variables = variables_of_model(model, variables)
    if isinstance(model, nnx.Module):
        copy = Copy(model, variables)
        checks.some_batch_norm(bool(copy.norms), copy.strangers)
        measure = _Measurement(copy, copy.variables, paths, layout(inputs), apply_kwargs, mesh)
        stats = measure(batches, sequential, progress)
        return copy.state({**copy.variables, "batch_stats": stats})
    checks.has_statistics(variables)
    held: Any = variables
    measure = _Measurement(model, held, paths, layout(inputs), apply_kwargs, mesh)
    stats = measure(batches, sequential, progress)
    new = {**held, "batch_stats": stats}
    return FrozenDict(new) if isinstance(variables, FrozenDict) else new


class _Measurement:
    """Passes over the data in which batch norms measure their inputs."""

    def __init__(
        self,
        model: nn.Module | Copy,
        variables: Mapping[str, Any],
        paths: globs.Paths,
        batches: Layout,
        kwargs: Mapping[str, Any] | None,
        mesh: Mesh | None,
    ) -> None:
        self.model, self.layout, self.kwargs = model, batches, dict(kwargs or {})
        self.original = model
        self.patterns = globs.as_tuple(paths)
        self.stats = variables["batch_stats"]
        self.others = {k: unfreeze(tree) for k, tree in variables.items() if k != "batch_stats"}
        self.mesh, self.context = mesh, contextlib.nullcontext
        if mesh is not None:
            checks.mesh(mesh)
            auto, self.alike, self.split = shardings(mesh)
            self.others = on_all(self.others, self.alike)
            self.context = functools.partial(jax.set_mesh, auto)
        self.fits = self.named = _named(self.patterns)
        if isinstance(model, Copy):
            self.fits = model.fitting(paths).__contains__  # under any path of a shared layer
            self.model = model.holding({**variables, "batch_stats": begin(self.stats)}).abstract()

    def __call__(self, batches: Batches, sequential: bool, progress: bool) -> Any:
        """Recompute the statistics of the layers that match."""
        stats = self.stats
        if not sequential:
            return self._pass(None, stats, batches, progress, "recalibrating")
        checks.iterable_again(batches)
        order = self._order(stats, batches)
        for number, path in enumerate(order, 1):
            label = f"{'/'.join(path)} ({number} of {len(order)})"
            stats = self._pass(path, stats, batches, progress, label)
        return stats

    def _pass(
        self, path: Path | None, stats: Any, batches: Batches, progress: bool, label: str
    ) -> Any:
        """Recompute the statistics of one layer, or of all if `path` is None, in one pass."""
        program, measured = self._program(path), None
        held = seen = self._everywhere(begin(stats))
        for batch in tracked(batches, progress, label):
            placed = self._placed(batch)
            inputs = self.layout.call(placed)
            with checks.variables_fit({**self.others, "batch_stats": stats}, inputs):
                with self.context():
                    new, notes = program(seen, self.others, placed)
            self._check(notes)
            _check_banks(placed, notes["banks"])
            measured = {*(measured or ()), *notes["measured"]}
            # Other modules' statistics, such as spectral norms, are reset after each batch.
            seen = _with_layers_of(held, new)
        checks.some_batch(measured is not None)
        return _with(stats, population(seen, measured or ()))

    def _order(self, stats: Any, batches: Batches) -> list[Path]:
        """The paths of the layers, in the order of first calls."""
        for batch in batches:
            notes = self._program(None).trace(begin(stats), self.others, self._placed(batch))
            self._check(notes)
            return list(notes["measured"])
        checks.some_batch(False)
        return []

    def _program(self, path: Path | None) -> Program:
        how = self.layout, self.kwargs, self.fits, path
        make = lambda: _program(self.model, *how)  # noqa: E731 - called if new
        settled = self.patterns, path, self.layout, tuple(self.kwargs.items())
        key = ("recalibration", *settled, settings_key())
        if isinstance(self.original, Copy):
            return self.original.kept(key, make)
        return kept_with(self.original, key, make)

    def _check(self, notes: Mapping[str, Any]) -> None:
        """Check that each pattern matches a layer, and that every match is called."""
        called, unknown = {"/".join(path) for path in notes["called"]}, dict(notes["strangers"])
        unknown |= getattr(self.model, "strangers", {})
        if not isinstance(self.model, Copy):
            globs.check_each(self.patterns, called, unknown=unknown)
        fitting = {"/".join(path) for path in layers_of(self.stats) if self.named(path)}
        checks.all_called(fitting - called, unknown)

    def _placed(self, batch: Any) -> Batch:
        batch = self.layout.used(self.layout.named(batch))
        if self.mesh is None:
            return batch
        devices = len(self.mesh.local_devices)
        if jax.process_count() > 1:
            return self.layout.split(self.layout.padded(batch, devices), self.alike, self.split)
        # A model may reshape its examples, so don't pad: a mask could not hide the padding.
        even = self.layout.size(batch) % devices == 0
        return self.layout.split(batch, self.alike, self.split if even else self.alike)

    def _everywhere(self, stats: Any) -> Any:
        return stats if self.mesh is None else on_all(stats, self.alike)


def _program(
    model: nn.Module | Copy,
    batches: Layout,
    kwargs: dict[str, Any],
    fits: Callable[[Path], bool],
    path: Path | None,
) -> Program:
    """The pass of one batch: measure one layer in evaluation, or all of them in training."""

    def step(notes: dict[str, Any], stats: Any, others: Any, batch: Batch) -> Any:
        called, measured = notes.setdefault("called", {}), notes.setdefault("measured", {})
        banks = notes.setdefault("banks", set())

        def norm(visit: Visit) -> Any:
            together, here = path is None and fits(visit.path), visit.path == path
            called[visit.path] = None
            if visit.facts.banks is not None and "bank" not in visit.extra:
                banks.update(rows(visit.facts))
            visit = visit.of(batch)
            if not visit.statistics or not (together or here):
                return visit.run(running=True, here=True, plain=True)
            measured[visit.path] = None
            return run_and_add(visit, running=not together, here=True, plain=True)

        variables = {**others, "batch_stats": stats}
        args, inputs = batches.call(batch)
        with visiting(norm) as notes["strangers"]:
            moved = ["batch_stats"]
            _, updates = model.apply(variables, *args, mutable=moved, **inputs, **kwargs)
        return updates["batch_stats"]

    return Program(step)


def _check_banks(batch: Batch, numbers: Iterable[int]) -> None:
    """Check the banks of a batch, which the compiled program can't, by the layers' numbers."""
    bank, counted = batch.get("bank"), batch.get("mask", True)
    local = all(getattr(each, "is_fully_addressable", True) for each in (bank, counted))
    for banks in numbers if bank is not None and local else ():
        checks.banks_exist(bank, np.asarray(counted), banks)


def _named(patterns: tuple[str, ...]) -> Callable[[Path], bool]:
    fits = globs.any_of(patterns)
    return lambda path: fits("/".join(path))


def _with(stats: Any, seen: Mapping[Path, Moments]) -> Any:
    """Replace the means and biased variances of the measured layers."""
    bad: dict[str, int] = {}

    def replace(path: Path, old: Mapping[str, Any]) -> Mapping[str, Any]:
        if path not in seen:
            return old
        new, moments = dict(old), seen[path]
        some = moments.count > 0
        fine = jnp.isfinite(moments.mean) & jnp.isfinite(moments.m2)
        # A bank without examples keeps its statistics, but a layer needs some.
        fine = jnp.where(some, fine, jnp.any(some))
        if lost := int(jnp.sum(~fine)):
            bad["/".join(path)] = lost
        found = {"mean": moments.mean, "var": moments.variance(), "values": moments.count}
        found |= dict.fromkeys(("values_low", "mean_low", "var_low"), 0 * moments.mean)
        for name in found.keys() & old.keys():
            kept = meta.unbox(old[name])
            value = found[name]
            if not jnp.all(some):
                value = jnp.where(some, value, jax.device_put(kept, value.sharding))
            new[name] = meta.replace_boxed(old[name], value.astype(kept.dtype))
        return new

    found = map_layers(replace, stats)
    checks.finite_statistics(bad)
    return found


def _with_layers_of(tree: Any, other: Any) -> Any:
    """A collection with its batch norms taken from another."""
    layers = layers_of(other)
    return map_layers(lambda path, _: layers[path], tree)
