"""Exact population statistics for the batch norms of a model, from an iterator of batches."""

import contextlib
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, overload

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx
from flax.core import FrozenDict, meta, unfreeze
from jax.sharding import Mesh

from bnjax import globs
from bnjax.core.moments import Moments
from bnjax.models import checks
from bnjax.models.accumulation import begin, population, run_and_add
from bnjax.models.batches import Batch, Inputs, Layout, layout, on_all, shardings, tracked
from bnjax.models.frames import settings_key
from bnjax.models.nnx_copies import Copy
from bnjax.models.programs import Program, kept_with
from bnjax.models.saved import variables_of_model
from bnjax.models.statistics import Path, layers_of, map_layers
from bnjax.models.visits import Visit, visiting

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
    """The variables with running statistics that are those of the data, exactly.

    Running statistics are a decaying average over the last batches, seen by parameters that have
    changed since. Here each batch norm's mean and (biased) variance are taken over all batches by
    pooled moments, weighted by count: for batches at mean 0 and 10 the variance is 26, not 1
    (PreciseBN: Wu and Johnson, "Rethinking 'Batch' in BatchNorm", 2021). It is needed after weights
    were averaged (EMA, SWA), and helps where the batches of the training were small.

    Args:
        model: a linen or nnx model with batch norms, bnjax's or Flax's own. An nnx model runs as
            after `.eval()`; it is not touched either.
        variables: its variables. They are not touched, whatever happens. Of an nnx model an
            `nnx.State`, all of it or, such as averaged parameters, a part; None for its own. What
            a training has saved will do, in whole: a `TrainState`, or what `bnjax.load` gives.
        batches: inputs of the model; or dicts with `"x"` and perhaps `"mask"`, bool (N,), the
            examples that count, such as those of a training. A ragged last batch is fine.
        paths: which batch norms, as globs over module paths; all of them by default.
        sequential: False, the default, needs one pass over the data: each batch runs as in
            training, normalized by its own statistics, so deep layers see what they saw there. True
            takes one pass for each layer, in the order of their calls, in evaluation: each layer
            sees what the recalibrated layers before it made, as it will when the model is used.
            `batches` must then be iterable more than once, such as a list.
        inputs: which entries of a batch to call the model with, as for `training.train_step`, such
            as `("obs", "action")`.
        apply_kwargs: passed to the model's call, such as `{"train": False}`. Batch norms measure
            whatever they say; dropout and the like go by them.
        mesh: split each batch over the devices of the mesh.
        progress: show a progress bar.

    Returns:
        New variables: batch norms have new means and variances, all other values are the same.
        Of an nnx model the whole `nnx.State`, for `nnx.update(model, state)`.

    Raises:
        ValueError: no batch, no batch norm, one that fits the paths and is not called, variables of
            another model, or a channel without a finite mean and variance.
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
    """Passes over the data in which batch norms measure what they see."""

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
            self.fits = model.fitting(paths).__contains__  # by any path of a shared layer
            self.model = model.holding({**variables, "batch_stats": begin(self.stats)}).abstract()

    def __call__(self, batches: Batches, sequential: bool, progress: bool) -> Any:
        """The statistics, with those of the data in each layer that fits."""
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
        """The statistics after one pass that measures the layer at this path, or all."""
        program, measured = self._program(path), None
        held = seen = self._everywhere(begin(stats))
        for batch in tracked(batches, progress, label):
            placed = self._placed(batch)
            inputs = self.layout.call(placed)
            with checks.variables_fit({**self.others, "batch_stats": stats}, inputs):
                with self.context():
                    new, notes = program(seen, self.others, placed)
            self._check(notes)
            measured = {*(measured or ()), *notes["measured"]}
            # What others keep beside the layers, such as spectral norms, is as it was each time.
            seen = _with_layers_of(held, new)
        checks.some_batch(measured is not None)
        return _with(stats, population(seen, measured or ()))

    def _order(self, stats: Any, batches: Batches) -> list[Path]:
        """The paths of the layers, in the order of their first calls."""
        for batch in batches:
            notes = self._program(None).trace(begin(stats), self.others, self._placed(batch))
            self._check(notes)
            return list(notes["measured"])
        checks.some_batch(False)
        return []

    def _program(self, path: Path | None) -> Program:
        how = self.layout, self.kwargs, self.fits, path
        make = lambda: _program(self.model, *how)  # noqa: E731 - if new
        settled = self.patterns, path, self.layout, tuple(self.kwargs.items())
        key = ("recalibration", *settled, settings_key())
        if isinstance(self.original, Copy):
            return self.original.kept(key, make)
        return kept_with(self.original, key, make)

    def _check(self, notes: Mapping[str, Any]) -> None:
        """Each pattern fits a layer that is called, and each layer that fits is."""
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
        # A model may reshape its examples, so none are filled up that a mask would have to hide.
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
    """A pass of one batch: one layer is measured in evaluation, or all together in training."""

    def step(notes: dict[str, Any], stats: Any, others: Any, batch: Batch) -> Any:
        called, measured = notes.setdefault("called", {}), notes.setdefault("measured", {})

        def norm(visit: Visit) -> Any:
            together, here = path is None and fits(visit.path), visit.path == path
            called[visit.path] = None
            visit = visit.where(batch.get("mask"))
            if not visit.statistics or not (together or here):
                return visit.run(running=True, here=True)
            measured[visit.path] = None
            return run_and_add(visit, running=not together, here=True)

        variables = {**others, "batch_stats": stats}
        args, inputs = batches.call(batch)
        with visiting(norm) as notes["strangers"]:
            moved = ["batch_stats"]
            _, updates = model.apply(variables, *args, mutable=moved, **inputs, **kwargs)
        return updates["batch_stats"]

    return Program(step)


def _named(patterns: tuple[str, ...]) -> Callable[[Path], bool]:
    fits = globs.any_of(patterns)
    return lambda path: fits("/".join(path))


def _with(stats: Any, seen: Mapping[Path, Moments]) -> Any:
    """The statistics with mean and biased variance of what was seen."""
    bad: dict[str, int] = {}

    def replace(path: Path, old: Mapping[str, Any]) -> Mapping[str, Any]:
        if path not in seen:
            return old
        new, moments = dict(old), seen[path]
        fine = (moments.count > 0) & jnp.isfinite(moments.mean) & jnp.isfinite(moments.m2)
        if lost := int(jnp.sum(~fine)):
            bad["/".join(path)] = lost
        for name, value in (("mean", moments.mean), ("var", moments.variance())):
            value = value.astype(meta.unbox(old[name]).dtype)
            new[name] = meta.replace_boxed(old[name], value)
        return new

    found = map_layers(replace, stats)
    checks.finite_statistics(bad)
    return found


def _with_layers_of(tree: Any, other: Any) -> Any:
    """A collection with the batch norms of another one."""
    layers = layers_of(other)
    return map_layers(lambda path, _: layers[path], tree)
