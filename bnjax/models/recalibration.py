"""Exact population statistics for the batch norms of a model, from an iterator of batches."""

import contextlib
import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sized
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx
from jax.sharding import Mesh

from bnjax import globs
from bnjax.models import checks
from bnjax.models.accumulation import Path, accumulating, added, begin, replace, unmeasured
from bnjax.models.batches import Batch, counting, named, on_all, pad_batch, shardings, split_over
from bnjax.models.conventions import NNX, Call, describe
from bnjax.models.nnx_copies import Bridge, intercepting, path_of, variables_of, without_devices
from bnjax.models.overrides import override

Batches = Iterable[Any]


def recalibrate(
    model: nn.Module | nnx.Module,
    variables: Mapping[str, Any] | nnx.State | None,
    batches: Batches,
    *,
    paths: globs.Paths = "**",
    sequential: bool = False,
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
            `nnx.State`, all of it or, such as averaged parameters, a part; None for its own.
        batches: inputs of the model; or dicts with `"x"` and perhaps `"mask"`, bool (N,), the
            examples that count. A ragged last batch is fine.
        paths: which batch norms, as globs over module paths; all of them by default.
        sequential: False, the default, needs one pass over the data: each batch runs as in
            training, normalized by its own statistics, so deep layers see what they saw there. True
            takes one pass for each layer, in the order of their calls, in evaluation: each layer
            sees what the recalibrated layers before it made, as it will when the model is used.
            `batches` must then be iterable more than once, such as a list.
        apply_kwargs: passed to the model's call, such as `{"train": False}`. Batch norms measure
            whatever they say; dropout and the like go by them.
        mesh: split each batch over the devices of the mesh.
        progress: show a progress bar.

    Returns:
        New variables: `batch_stats` has new means and variances, all other values are the same.
        Of an nnx model the whole `nnx.State`, for `nnx.update(model, state)`.

    Raises:
        ValueError: no batch, no batch norm, variables of another model, or a channel without a
            finite mean and variance.
    """
    checks.flax_model(model)
    checks.several_batches(batches)
    settings = (dict(apply_kwargs or {}), mesh, paths, sequential, progress)
    if isinstance(model, nnx.Module):
        bridge = Bridge(model, variables)
        checks.some_batch_norm("batch_stats" in bridge.variables)
        return bridge.state(_recalibrated(bridge, bridge.variables, batches, *settings))
    checks.has_statistics(variables)
    return _recalibrated(model, variables, batches, *settings)


def _recalibrated(
    model: nn.Module | Bridge,
    variables: Any,
    batches: Batches,
    kwargs: dict[str, Any],
    mesh: Mesh | None,
    paths: globs.Paths,
    sequential: bool,
    progress: bool,
) -> dict[str, Any]:
    """The variables with new statistics, of either library."""
    measurement = _Measurement(model, variables, kwargs, mesh, paths)
    stats = variables["batch_stats"]
    if not sequential:
        stats = measurement(stats, batches, None, progress, "recalibrating")
        return {**variables, "batch_stats": stats}
    checks.iterable_again(batches)
    order = measurement.order(stats, batches)
    checks.some_batch(bool(order))
    for number, path in enumerate(order, 1):
        label = f"{'/'.join(path)} ({number} of {len(order)})"
        stats = measurement(stats, batches, path, progress, label)
    return {**variables, "batch_stats": stats}


class _Measurement:
    """Passes over the data in which batch norms measure what they see."""

    def __init__(
        self,
        model: nn.Module | Bridge,
        variables: Mapping[str, Any],
        kwargs: dict[str, Any],
        mesh: Mesh | None,
        paths: globs.Paths,
    ) -> None:
        if isinstance(model, Bridge):
            self.measuring = functools.partial(_measuring_nnx, model.paths(paths))
            model = model.holding({**variables, "batch_stats": begin(variables["batch_stats"])})
        else:
            self.measuring = functools.partial(_measuring_linen, paths)
        self.model, self.kwargs, self.mesh = model, kwargs, mesh
        self.others = {name: tree for name, tree in variables.items() if name != "batch_stats"}
        self.context = contextlib.nullcontext
        if mesh is not None:
            auto, self.alike, self.split = shardings(mesh)
            self.others = on_all(self.others, self.alike)
            self.context = functools.partial(jax.set_mesh, auto)
        self.steps: dict[Path | None, tuple[Callable, dict[Path, Any]]] = {}

    def __call__(
        self, stats: Any, batches: Batches, path: Path | None, progress: bool, label: str
    ) -> Any:
        """The statistics after one pass that measures the layer at this path, or all."""
        step, conventions = self._step(path)
        accumulated, some = begin(stats), False
        if self.mesh is not None:
            accumulated = on_all(accumulated, self.alike)
        for batch in _tracked(batches, progress, label):
            some = True
            held, batch = {**self.others, "batch_stats": stats}, self._placed(batch)
            with checks.variables_fit(held, batch["x"]), self.context():
                accumulated = step(accumulated, self.others, batch)
        checks.some_batch(some)
        checks.finite_statistics(unmeasured(accumulated, conventions))
        return replace(accumulated, conventions)

    def order(self, stats: Any, batches: Batches) -> list[Path]:
        """The paths of the layers, in the order of their first calls."""
        step, conventions = self._step(None)
        for batch in batches:
            jax.eval_shape(step, begin(stats), self.others, self._placed(batch))
            break
        return list(conventions)

    def _placed(self, batch: Any) -> Batch:
        batch = named(batch)
        batch = {name: batch[name] for name in ("x", "mask") if name in batch}
        if self.mesh is None:
            return batch
        padded = pad_batch(batch, len(self.mesh.local_devices))
        return split_over(self.split, padded)

    def _step(self, path: Path | None) -> tuple[Callable, dict[Path, Any]]:
        if path in self.steps:
            return self.steps[path]
        conventions: dict[Path, Any] = {}

        def step(stats: Any, others: Any, batch: Batch) -> Any:
            with self.measuring(path, batch.get("mask")) as seen:
                _, updates = self.model.apply(
                    {**others, "batch_stats": stats},
                    batch["x"],
                    mutable=["batch_stats"],
                    **self.kwargs,
                )
            conventions.update(seen)
            return updates["batch_stats"]

        self.steps[path] = jax.jit(step), conventions
        return self.steps[path]


@contextlib.contextmanager
def _measuring_linen(
    paths: globs.Paths, path: Path | None, examples: Any
) -> Iterator[Mapping[Path, Any]]:
    """A context in which one layer is measured in evaluation, or all together in training."""

    def measured(at: Path, call: Call) -> bool:
        return at == path if path is not None else not call.running

    together = override(paths, use_running_average=False)
    mode = together if path is None else contextlib.nullcontext()
    alone = {"axis_name": None, "axis_index_groups": None}  # the devices of the training
    evaluated = override("**", use_running_average=True, **alone)
    with evaluated, mode, accumulating(measured, examples) as seen:
        yield seen


@contextlib.contextmanager
def _measuring_nnx(
    paths: Collection[Path], path: Path | None, examples: Any
) -> Iterator[Mapping[Path, Any]]:
    """The same for the layers of a bridge."""
    seen: dict[Path, Any] = {}

    def intercept(call: Callable, args: tuple, kwargs: dict[str, Any], context: Any) -> Any:
        layer = context.module
        if not isinstance(layer, NNX):
            return call(*args, **kwargs)
        at, x = path_of(layer), jnp.asarray(args[0] if args else kwargs["x"])
        mask = counting(kwargs.get("mask"), examples, x.ndim)
        before = variables_of(layer).get("batch_stats")
        together = path is None and at in paths
        with without_devices(layer):
            y = call(x, use_running_average=not together, mask=mask)
            if before and (together or at == path):
                seen[at] = None
                does = describe(layer, mask=None if mask is None else jnp.asarray(mask, bool))
                for name, value in added(before, x, does).items():
                    getattr(layer, name)[...] = value
        return y

    with intercepting(intercept):
        yield seen


def _tracked(batches: Batches, progress: bool, label: str) -> Batches:
    if not progress:
        return batches
    from rich.progress import track

    return track(batches, label, total=len(batches) if isinstance(batches, Sized) else None)
