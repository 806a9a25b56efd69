"""A model in evaluation and in training on one batch, and what its batch norms see in training.

It is one compiled step for each shape of a batch. The layers' own updates bring the statistics of
the batch out: with a momentum of 1 the new running statistics *are* those of the batch, so no
activation is read once more, and none leaves the step.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx
from flax.core.scope import in_filter, union_filters

from bnjax.core.moments import working_dtype
from bnjax.models import checks, overrides
from bnjax.models.accumulation import map_layers
from bnjax.models.batches import Batch, LossFn, counted, counting, size_of, totals_of
from bnjax.models.conventions import LAYERS, describe
from bnjax.models.freezing import is_frozen
from bnjax.models.nnx_copies import (
    Bridge,
    Path,
    intercepting,
    path_of,
    variables_of,
    without_devices,
)
from bnjax.models.subtypes import own_type


class Kind(NamedTuple):
    """What a batch norm is, as its calls tell it; momentum and correction are PyTorch's.

    Attributes:
        layer: the name of its class.
        flax: whether its momentum is written in Flax's convention.
        tracked: whether it keeps running statistics.
        frozen: whether it uses them in training, too.
        running: whether it uses them in evaluation.
        momentum: weight of a new batch in the running statistics; None for the average of all.
        correction: 1 where it keeps the unbiased variance.
        eps: what it adds to the variance.
        dtype: of its input.
    """

    layer: str
    flax: bool
    tracked: bool
    frozen: bool
    running: bool
    momentum: float | None
    correction: int
    eps: float
    dtype: Any


class Seen(NamedTuple):
    """What a layer saw in one pass, each (C,): the average over its calls.

    Attributes:
        calls: how often it was called and measured.
        mean: the mean; NaN where that of a call was not finite.
        var: the variance, with the layer's correction.
        between: the sum of squared deviations of the calls' means.
        values: values per channel, in the last call.
    """

    calls: Any
    mean: Any
    var: Any
    between: Any
    values: Any


_ROOM = tuple(f"seen_{name}" for name in Seen._fields)


class Passes:
    """The passes of a model, and the kinds of the batch norms that they met.

    Args:
        model: a linen model, or the bridge of an nnx model.
        modes: of an nnx model the mode of each layer, by path.
        loss_fn: as for `training.train_step`.
        kwargs: those of the model's call in evaluation.
    """

    def __init__(
        self,
        model: nn.Module | Bridge,
        modes: Mapping[str, bool | None],
        loss_fn: LossFn | None,
        kwargs: Mapping[str, Any],
    ) -> None:
        self.model, self.modes, self.loss_fn, self.kwargs = model, modes, loss_fn, dict(kwargs)
        bridge = ["batch_stats"] if isinstance(model, Bridge) else False  # its layers have modes
        mutable = self.kwargs.pop("mutable", bridge)
        self.moves = in_filter(mutable, "batch_stats")
        self.mutable = bridge or union_filters(mutable, "batch_stats")
        self.outside = overrides.active()
        self.kinds: dict[Path, Kind] = {}
        self.step = jax.jit(self._step)

    def _step(self, variables: Any, batch: Batch) -> dict[str, Any]:
        """Outputs in evaluation, what the layers saw in training, and how the two compare."""
        before = variables.get("batch_stats", {})
        evaluated, after = self._apply(self.model, variables, batch, self._evaluating)
        moved = jax.tree.map(lambda a, b: jnp.any((a != b) & ((a == a) | (b == b))), after, before)
        room = {**variables, "batch_stats": map_layers(_with_room, before)}
        model = self.model.holding(room) if isinstance(self.model, Bridge) else self.model
        trained, after = self._apply(model, room, batch, self._training)
        layers: dict[Path, Seen] = {}

        def collect(path: Path, stats: Mapping[str, Any]) -> None:
            if path in self.kinds:
                layers[path] = Seen(*(stats[name] for name in _ROOM))

        map_layers(collect, after)
        examples = batch.get("mask")
        return {
            "outputs": evaluated,
            "layers": layers,
            "moved": moved if self.moves else {},
            "gap": compare(evaluated, trained, size_of(batch), examples),
            "losses": {
                "train": _means(self.loss_fn, trained, batch),
                "eval": _means(self.loss_fn, evaluated, batch),
            },
        }

    def _apply(self, model: Any, variables: Any, batch: Batch, called: Callable) -> tuple[Any, Any]:
        def intercept(call: Callable, args: tuple, kwargs: dict[str, Any], context: Any) -> Any:
            layer = context.module
            if context.method_name != "__call__" or not isinstance(layer, LAYERS):
                return call(*args, **kwargs)
            if "x" in kwargs:
                args, kwargs = (kwargs["x"],), {k: v for k, v in kwargs.items() if k != "x"}
            with _here(layer, args, kwargs) as ((x, *others), options):
                given = others[0] if others else options.get("use_running_average")
                mask = counting(options.get("mask"), batch.get("mask"), jnp.ndim(x))
                options = {} if mask is None else {"mask": mask}

                def run(running: bool) -> Any:
                    if isinstance(layer, nnx.Module):
                        return call(x, use_running_average=running, **options)
                    with overrides.setting(layer, use_running_average=running):
                        return call(x, **options)

                return called(self._kind(layer, given, x), layer, run, jnp.shape(x), mask)

        with intercepting(intercept):
            y, updates = model.apply(variables, batch["x"], mutable=self.mutable, **self.kwargs)
        return y, updates.get("batch_stats", {})

    def _kind(self, layer: Any, given: bool | None, x: Any) -> Kind:
        path, does = path_of(layer), describe(layer)
        torch = hasattr(layer, "track_running_stats")
        if isinstance(layer, nn.Module):
            frozen = (torch and layer.use_running_average is True) or _frozen(path, self.outside)
            running = layer.use_running_average if given is None else given
            running = not self.moves if torch and running is None else running
        else:
            frozen = is_frozen(layer)
            running = frozen or (self.modes["/".join(path)] if given is None else given)
        checks.given(running)
        self.kinds[path] = Kind(
            layer=(type(layer) if isinstance(layer, nn.Module) else own_type(layer)).__name__,
            flax=not torch,
            tracked=getattr(layer, "track_running_stats", True),
            frozen=frozen,
            running=bool(running),
            momentum=does.momentum,
            correction=does.correction,
            eps=layer.eps if torch else layer.epsilon,
            dtype=jnp.asarray(x).dtype,
        )
        return self.kinds[path]

    def _evaluating(self, kind: Kind, layer: Any, run: Callable, shape: Any, mask: Any) -> Any:
        if kind.tracked:
            held = variables_of(layer).get("batch_stats", {})
            axes = checks.feature_axes(layer.axis, len(shape))
            checks.shapes("batch_stats", held, tuple(shape[a] for a in axes))
        return run(kind.running)

    def _training(self, kind: Kind, layer: Any, run: Callable, shape: Any, mask: Any) -> Any:
        before = dict(variables_of(layer).get("batch_stats", {}))
        if not kind.tracked or kind.frozen or _ROOM[0] not in before:
            return run(kind.tracked)
        values = _values(layer, shape, mask)
        room = Seen(*(before[name] for name in _ROOM))
        room = room._replace(values=jnp.zeros_like(room.values) + values)
        if not isinstance(values, jax.Array) and values <= kind.correction:
            _put(layer, dict(zip(_ROOM, room, strict=True)))
            return run(True)  # it can't train on this, as PyTorch's can't
        # A channel of which the batch has no finite statistics keeps the negative variance.
        kept = {"mean": jnp.zeros_like(before["mean"]), "var": -jnp.ones_like(before["var"])}
        _put(layer, kept)
        with overrides.setting(layer, momentum=0.0 if kind.flax else 1.0):
            y = run(False)
        new = variables_of(layer)["batch_stats"]
        mean = jnp.where(new["var"] >= 0, new["mean"], jnp.nan)
        calls, delta = room.calls + 1, mean - room.mean
        average = room.mean + delta / calls
        room = room._replace(
            calls=calls,
            mean=average,
            var=room.var + (new["var"] - room.var) / calls,
            between=room.between + jnp.real(jnp.conj(delta) * (mean - average)),
        )
        _put(layer, dict(zip(_ROOM, room, strict=True)))
        return y


def passes_of(
    model: nn.Module | Bridge,
    modes: Mapping[str, bool | None],
    loss_fn: LossFn | None,
    kwargs: Mapping[str, Any],
) -> Passes:
    """The passes, those of the last diagnoses where they were the same: they are compiled."""
    try:
        given = tuple(kwargs.items())
        hash(given)
        if isinstance(model, nn.Module):
            return _cached(model, loss_fn, given, overrides.active())
    except TypeError:  # a field or an argument without a hash
        pass
    return Passes(model, modes, loss_fn, kwargs)


@functools.lru_cache(maxsize=8)
def _cached(model: nn.Module, loss_fn: LossFn | None, kwargs: Any, outside: Any) -> Passes:
    return Passes(model, {}, loss_fn, dict(kwargs))


def compare(a: Any, b: Any, size: int, examples: Any = None) -> tuple[jax.Array, jax.Array]:
    """Sums of the squared differences of two outputs, and of b's deviations over the examples."""
    differences, deviations = jnp.zeros(()), jnp.zeros(())
    for one, other in zip(*map(jax.tree.leaves, (a, b)), strict=True):
        if not jnp.issubdtype(other.dtype, jnp.inexact):
            continue
        one, other = (output.astype(working_dtype(other.dtype)) for output in (one, other))
        counts, center = jnp.ones(()), jnp.zeros(())
        if jnp.ndim(other) and other.shape[0] == size:
            counts = jnp.ones(size) if examples is None else examples
            counts = counts.reshape(-1, *(1,) * (other.ndim - 1))
            if size > 1:
                center = jnp.mean(other, 0, where=counts > 0)
        seen = counts > 0
        differences += jnp.sum(jnp.abs(jnp.where(seen, one - other, 0)) ** 2)
        deviations += jnp.sum(jnp.abs(jnp.where(seen, other - center, 0)) ** 2)
    return differences, deviations


@contextlib.contextmanager
def _here(layer: Any, args: tuple, kwargs: dict[str, Any]) -> Iterator[tuple[tuple, Any]]:
    """The layer under the overrides that hold here, and without the devices of the training."""
    with contextlib.ExitStack() as stack:
        given = args, kwargs
        if isinstance(layer, nn.Module):
            # They act here and not below, where they would undo what is set for a measurement.
            given = stack.enter_context(overrides.overridden(layer, args, kwargs))
            stack.enter_context(overrides.none())
        stack.enter_context(without_devices(layer))
        yield given


def _frozen(path: Path, outside: Any) -> bool:
    """Whether an override that holds around the diagnosis, the innermost first, freezes a layer."""
    modes = [
        dict(one.fields).get("use_running_average") for one in outside if one.fits("/".join(path))
    ]
    return next((mode for mode in reversed(modes) if mode is not None), False)


def _values(layer: Any, shape: tuple[int, ...], mask: Any) -> Any:
    """How many values per channel a layer normalizes with; of a virtual batch in the smallest."""
    axes = checks.feature_axes(layer.axis, len(shape))
    reduced = [a for a in range(len(shape)) if a not in axes]
    if mask is not None:
        mask = jnp.broadcast_to(checks.mask(jnp.asarray(mask, bool), shape), shape)
        return jnp.sum(mask, reduced, dtype=jnp.float32)
    values = math.prod(shape[a] for a in reduced)
    group = getattr(layer, "virtual_batch_size", None)
    if group is None or not values:
        return values
    examples = shape[reduced[0]]
    return values // examples * (examples % min(group, examples) or min(group, examples))


def _with_room(path: Path, stats: Mapping[str, Any]) -> dict[str, Any]:
    """The statistics of a layer in float32 at least, with room for what it sees."""
    wide = {name: jnp.asarray(stats[name]) for name in ("mean", "var")}
    wide = {name: value.astype(working_dtype(value.dtype)) for name, value in wide.items()}
    mean, real = jnp.zeros_like(wide["mean"]), jnp.zeros_like(wide["var"])
    room = Seen(calls=real, mean=mean, var=real, between=real, values=real)
    return {**stats, **wide, **dict(zip(_ROOM, room, strict=True))}


def _put(layer: Any, values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        if isinstance(layer, nn.Module):
            layer.put_variable("batch_stats", name, value)
        else:
            getattr(layer, name)[...] = value


def _means(loss_fn: LossFn | None, outputs: Any, batch: Batch) -> dict[str, jax.Array]:
    """Loss and metrics, over the examples that count."""
    totals = {} if loss_fn is None else totals_of(loss_fn, outputs, batch)
    return {name: total / jnp.maximum(counted(batch), 1) for name, total in totals.items()}
