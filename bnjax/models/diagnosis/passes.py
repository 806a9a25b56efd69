"""Run a model on a batch in evaluation and in training, and record what its batch norms see.

One step is compiled for each kind of batch, and activations never leave it.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import unfreeze

from bnjax.core.banks import totals
from bnjax.core.moments import working_dtype
from bnjax.core.policies import Renorm
from bnjax.layers.conventions import rows
from bnjax.models import checks
from bnjax.models.batches import Batch, Layout, LossFn
from bnjax.models.compat import in_filter, union_filters
from bnjax.models.conventions import Facts, registered_class
from bnjax.models.frames import settings_key
from bnjax.models.nnx_copies import Copy
from bnjax.models.programs import Program, kept_with
from bnjax.models.statistics import Path, layers_of, map_layers
from bnjax.models.visit import Visit
from bnjax.models.visits import visiting


@dataclasses.dataclass(frozen=True)
class Kind(Facts):
    """The facts of a batch norm as seen in its calls; `running` is its mode in evaluation."""

    frozen: bool  # whether it uses its running statistics even in training
    given: bool | None  # the mode passed to its call in evaluation
    dtype: Any  # of its input

    @property
    def has_mode(self) -> bool:
        """Whether the layer's mode, rather than its call, decides what it normalizes with."""
        return self.tracked and self.given is None


class Seen(NamedTuple):
    """What a layer saw in one pass, averaged over its calls; each (C,)."""

    calls: Any  # the number of measured calls
    mean: Any  # NaN if the mean of any call was not finite
    var: Any  # with the layer's correction
    between: Any  # the sum of squared deviations of the calls' means
    values: Any  # per channel, in the last call
    limited: Any  # the number of calls in which batch renormalization hit its limits


_ROOM = tuple(f"seen_{name}" for name in Seen._fields)


class Passes:
    """The passes of a linen model, or of a copy of an nnx model in evaluation mode.

    `step` is compiled, and its notes hold the `kinds` of the batch norms by path. `strangers` holds
    the classes, by path, of unknown modules that keep a mean and a variance.
    """

    def __init__(
        self,
        model: nn.Module | Copy,
        loss_fn: LossFn | None,
        batches: Layout,
        kwargs: Mapping[str, Any],
    ) -> None:
        self.model, self.loss_fn, self.layout = model, loss_fn, batches
        self.kwargs = dict(kwargs)
        copied = ["batch_stats"] if isinstance(model, Copy) else False  # its layers have modes
        self.mutable = self.kwargs.pop("mutable", copied)
        self.moves = in_filter(self.mutable, "batch_stats")
        self.strangers: dict[str, str] = dict(getattr(model, "strangers", {}))
        self.step = Program(self._step)

    def _step(self, notes: dict[str, Any], variables: Any, batch: Batch) -> dict[str, Any]:
        """The outputs in evaluation, what the layers saw in training, and how the two compare."""
        variables, kinds = unfreeze(variables), notes.setdefault("kinds", {})
        before = variables.get("batch_stats", {})

        def evaluating(visit: Visit) -> Any:
            kinds[visit.path] = kind = _kind(visit)
            return _evaluated(visit, kind, self.moves)

        evaluated, after = self._apply(self.model, variables, batch, evaluating, self.mutable)
        moved = {}
        if self.moves:
            moved = jax.tree.map(
                lambda a, b: jnp.any((a != b) & ((a == a) | (b == b))), after, before
            )
        room = {**variables, "batch_stats": map_layers(_with_room, before)}
        model = self.model.holding(room) if isinstance(self.model, Copy) else self.model
        mutable = union_filters(self.mutable, "batch_stats")
        trained, after = self._apply(
            model, room, batch, lambda visit: _trained(visit, _kind(visit)), mutable
        )
        layers = {
            path: Seen(*(stats[name] for name in _ROOM))
            for path, stats in layers_of(after).items()
            if path in kinds
        }
        return {
            "outputs": evaluated,
            "layers": layers,
            "moved": moved,
            "gap": compare(evaluated, trained, self.layout.size(batch), batch.get("mask")),
            "losses": {
                "train": self._means(trained, batch),
                "eval": self._means(evaluated, batch),
            },
        }

    def _apply(
        self, model: Any, variables: Any, batch: Batch, norm: Callable, mutable: Any
    ) -> tuple[Any, Any]:
        args, inputs = self.layout.call(batch)
        with visiting(lambda visit: norm(visit.of(batch))) as strangers:
            result = model.apply(variables, *args, mutable=mutable, **inputs, **self.kwargs)
        self.strangers |= strangers
        y, updates = result if mutable is not False else (result, {})
        return y, updates.get("batch_stats", {})

    def _means(self, outputs: Any, batch: Batch) -> dict[str, jax.Array]:
        """Mean loss and metrics over the examples that count."""
        if self.loss_fn is None:
            return {}
        _, totals = self.layout.totals(self.loss_fn, outputs, batch)
        return {name: total / jnp.maximum(totals.count, 1) for name, total in totals.items()}


def passes_of(
    model: nn.Module | Copy, loss_fn: LossFn | None, batches: Layout, kwargs: Mapping[str, Any]
) -> Passes:
    """The passes; cached, because they are compiled."""
    key = "diagnosis", loss_fn, batches, tuple(kwargs.items()), settings_key()
    if isinstance(model, Copy):
        make = lambda: Passes(model.abstract(), loss_fn, batches, kwargs)  # noqa: E731
        return model.kept(key, make)
    return kept_with(model, key, lambda: Passes(model, loss_fn, batches, kwargs))


def _kind(visit: Visit) -> Kind:
    checks.given(visit.running)
    facts = {**vars(visit.facts), "running": bool(visit.running)}
    dtype = jnp.asarray(visit.x).dtype
    return Kind(**facts, frozen=visit.frozen, given=visit.given, dtype=dtype)


def _evaluated(visit: Visit, kind: Kind, moves: bool) -> Any:
    if kind.tracked:
        shape = tuple(jnp.shape(visit.x)[axis] for axis in visit.axes)
        kept = ("mean", "var", "count")
        held = {name: value for name, value in visit.statistics.items() if name in kept}
        if registered_class(visit.layer) is None:  # registered ones may have more axes
            banks = rows(visit.facts)
            checks.shapes("batch_stats", held, (*banks, *shape), banks)
        if not kind.running and not moves:
            return visit.by_batch()  # the statistics are not mutable
    return visit.run(running=kind.running, here=True)


def _trained(visit: Visit, kind: Kind) -> Any:
    before = visit.statistics
    if not kind.tracked or kind.frozen or _ROOM[0] not in before:
        return visit.run(running=kind.tracked, here=True)
    values = _values(visit)
    room = Seen(*(before[name] for name in _ROOM))
    room = room._replace(values=jnp.zeros_like(room.values) + values)
    if not isinstance(values, jax.Array) and values <= kind.correction:
        visit.put(dict(zip(_ROOM, room, strict=True)))
        return visit.run(running=True, here=True)  # too few values to train on, as in PyTorch
    new = visit.seen()
    limited = _at_limits(visit, new)
    y = visit.run(running=False, here=True)
    calls, delta = room.calls + 1, new["mean"] - room.mean
    average = room.mean + delta / calls
    room = room._replace(
        calls=calls,
        mean=average,
        var=room.var + (new["var"] - room.var) / calls,
        between=room.between + jnp.real(jnp.conj(delta) * (new["mean"] - average)),
        limited=room.limited + limited,
    )
    visit.put({**before, **dict(zip(_ROOM, room, strict=True))})
    return y


def _at_limits(visit: Visit, batch: Mapping[str, jax.Array]) -> Any:
    """The channels where batch renormalization hits its limits; none while it is batch norm."""
    policy, stats = visit.facts.using, visit.statistics
    if not isinstance(policy, Renorm):
        return 0
    policy, eps = policy.at(stats.get("count")), visit.facts.eps
    deviation = jnp.sqrt(stats["var"] + eps)
    ratio = jnp.abs(jnp.log(jnp.sqrt(batch["var"] + eps) / deviation))
    distance = jnp.abs((batch["mean"] - stats["mean"]) / deviation)
    r_max, d_max = (
        jnp.reshape(jnp.asarray(each), (*jnp.shape(each), *(1,) * len(visit.axes)))
        for each in (policy.r_max, policy.d_max)
    )
    limited = (r_max > 1) & (ratio > jnp.log(r_max)) | (d_max > 0) & (distance > d_max)
    return limited.astype(ratio.dtype)


def compare(a: Any, b: Any, size: int, examples: Any = None) -> tuple[jax.Array, jax.Array]:
    """Sums of squared differences between two outputs, and of b's deviations over examples."""
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


def _values(visit: Visit) -> Any:
    """Values per channel that a layer normalizes with, in its smallest virtual batch."""
    shape = jnp.shape(visit.x)
    reduced = [axis for axis in range(len(shape)) if axis not in visit.axes]
    if visit.mask is not None or visit.bank is not None:
        mask = True if visit.mask is None else checks.mask(jnp.asarray(visit.mask, bool), shape)
        mask = jnp.broadcast_to(mask, shape)
        if visit.bank is None:
            return jnp.sum(mask, reduced, dtype=jnp.float32)
        each = jnp.moveaxis(mask, reduced[0], 0)
        axes = tuple(axis + (axis < reduced[0]) for axis in reduced[1:])
        bank = jnp.broadcast_to(jnp.asarray(visit.bank), len(each))
        (counts,) = totals([jnp.sum(each, axes, dtype=jnp.float32)], bank, *rows(visit.facts))
        return counts
    values, group = math.prod(shape[axis] for axis in reduced), visit.facts.virtual_batch_size
    if group is None or not values:
        return values
    examples = shape[reduced[0]]
    return values // examples * (examples % min(group, examples) or min(group, examples))


def _with_room(path: Path, stats: Mapping[str, Any]) -> dict[str, Any]:
    """The statistics of a layer in at least float32, with room to record what it sees."""
    wide = {name: jnp.asarray(stats[name]) for name in ("mean", "var")}
    wide = {name: value.astype(working_dtype(value.dtype)) for name, value in wide.items()}
    mean, real = jnp.zeros_like(wide["mean"]), jnp.zeros_like(wide["var"])
    room = Seen(calls=real, mean=mean, var=real, between=real, values=real, limited=real)
    return {**stats, **wide, **dict(zip(_ROOM, room, strict=True))}
