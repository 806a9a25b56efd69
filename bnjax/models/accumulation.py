"""The moments of every batch norm in a linen model, pooled over several forward passes.

The running statistics of a model are a decaying average, one step for each forward pass. Whoever
wants the exact statistics of many passes (a batch cut into micro-batches, a data set) lets the
layers add their moments up instead. It works on bnjax's layers and on Flax's own, and what is
added up travels in the collection `batch_stats`, so that `nn.remat` and `nn.scan` carry it.
"""

import contextlib
import functools
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun
from jax.interpreters import partial_eval

from bnjax.core.devices import pool
from bnjax.core.measuring import measure
from bnjax.core.moments import Moments, merge, working_dtype
from bnjax.core.running import move, weights
from bnjax.core.sharding import on_auto_axes
from bnjax.models import checks
from bnjax.models.batches import counting
from bnjax.models.conventions import LINEN, Call, describe
from bnjax.models.overrides import overridden

_COLLECTION = "batch_stats"
_SEEN = ("seen_count", "seen_origin", "seen_offset", "seen_m2")
_CALLS = "seen_calls"  # how often the layer was called in this forward pass

Path = tuple[str, ...]


class Convention(NamedTuple):
    """How a layer keeps its running statistics, in PyTorch's terms."""

    momentum: float | None
    correction: int


@contextlib.contextmanager
def accumulating(
    measured: Callable[[Path, Call], bool] = lambda path, call: not call.running,
    examples: Any = None,
) -> Iterator[dict[Path, Convention]]:
    """A context in which batch norms add their moments up and leave their statistics alone.

    The statistics of the model must come from `begin`, and be mutable.

    Args:
        measured: which calls are measured, by path and what the call does: those that train.
        examples: bool (N,), the examples of the batch that count, if not all do.

    Yields:
        A dict that has, once a model was traced, the path and convention of each measured layer,
        in the order of their first calls.
    """
    conventions: dict[Path, Convention] = {}

    def intercept(
        call: Callable, args: tuple, kwargs: dict[str, Any], context: nn.module.InterceptorContext
    ) -> Any:
        module = context.module
        if context.method_name != "__call__" or not isinstance(module, LINEN):
            return call(*args, **kwargs)
        if "x" in kwargs:
            args, kwargs = (kwargs["x"],), {k: v for k, v in kwargs.items() if k != "x"}
        if examples is not None:
            mask = counting(kwargs.get("mask"), examples, args[0].ndim)
            kwargs = {**kwargs, "mask": mask}
        with overridden(module, args, kwargs) as ((x, *others), options):
            does = describe(module, *others, **options)
        room = module.has_variable(_COLLECTION, _SEEN[0])
        if not room or not measured(module.path, does):
            return call(*args, **kwargs)
        conventions[module.path] = Convention(does.momentum, does.correction)
        before = dict(module.variables[_COLLECTION])
        y = call(*args, **kwargs)
        for name, value in added(before, x, does).items():
            module.put_variable(_COLLECTION, name, value)
        return y

    with nn.intercept_methods(intercept):
        yield conventions


def begin(batch_stats: Any, calls: Mapping[Path, int] | None = None) -> Any:
    """The statistics of a model, with room for moments, none seen yet, beside each mean.

    With what `rehearse` has counted there is room for each call of a layer; otherwise all calls are
    pooled.
    """

    def add_room(path: Path, stats: Mapping[str, Any]) -> dict[str, Any]:
        mean = stats["mean"]
        number = working_dtype(mean.dtype)
        room = jnp.zeros((*mean.shape, calls[path] if calls else 1), number)
        real = room.astype(jnp.finfo(number).dtype)
        seen = dict(zip(_SEEN, (real, room, room, real), strict=True))
        return {**stats, **seen, _CALLS: jnp.zeros(mean.shape, jnp.int32)}

    return map_layers(add_room, batch_stats)


def rehearse(
    forward: Callable[[Any], tuple[Any, Any]], accumulated: Any
) -> tuple[dict[Path, int], Any]:
    """How often each layer is called in one forward pass, and the shapes of its results.

    A loop calls many times what was traced once, so the calls are counted by running what is left
    of the pass, traced on shapes alone, when all that the counters do not need is taken out.

    Args:
        forward: `forward(accumulated)` gives the new statistics and other results.
        accumulated: the statistics from `begin`.

    Raises:
        ValueError: the number of calls depends on the data.
    """
    traced, shapes = jax.make_jaxpr(forward, return_shape=True)(accumulated)
    leaves, tree = jax.tree_util.tree_flatten_with_path(shapes)
    counters = [path[-1:] == (jax.tree_util.DictKey(_CALLS),) for path, _ in leaves]
    part, needed = partial_eval.dce_jaxpr(traced.jaxpr, counters)
    inputs = zip(traced.in_avals, needed, strict=True)
    with jax.ensure_compile_time_eval():
        zeros = [np.zeros(each.shape, each.dtype) for each, needs in inputs if needs]
        counts = iter(jaxpr_as_fun(ClosedJaxpr(part, traced.consts))(*zeros))
    counted = tree.unflatten(next(counts) if counter else None for counter in counters)
    calls: dict[Path, int] = {}

    def count(path: Path, stats: Mapping[str, Any]) -> None:
        calls[path] = checks.number_of_calls(stats[_CALLS], "/".join(path))

    map_layers(count, counted[0])
    return calls, shapes[1]


def added(stats: Mapping[str, Any], x: Any, does: Call) -> dict[str, Any]:
    """A layer's statistics after one more call, the moments of its input added."""
    x = jnp.asarray(x)
    mask = None if does.mask is None else checks.mask(does.mask, x.shape)
    stats = dict(stats)
    return on_auto_axes(functools.partial(_added, does=does), (stats, x, mask), x, like=stats)


def _added(
    stats: dict[str, Any], x: jax.Array, mask: jax.Array | None, does: Call
) -> dict[str, Any]:
    batch = measure(x, checks.feature_axes(does.axis, x.ndim), mask)
    if does.axis_name is not None:
        batch = pool(batch, does.axis_name, does.axis_index_groups)
    parts = (batch.count, batch.origin, batch.offset, batch.m2)
    one = Moments(*(jnp.broadcast_to(part, batch.m2.shape)[..., None] for part in parts))
    held = [stats[name] for name in _SEEN]
    merged = merge(Moments(*held), one)
    room = jnp.arange(held[0].shape[-1])
    this = jnp.minimum(stats[_CALLS], room[-1])[..., None] == room
    new = (merged.count, merged.origin, merged.offset, merged.m2)
    chosen = (jnp.where(this, n.astype(old.dtype), old) for n, old in zip(new, held, strict=True))
    return {**stats, **dict(zip(_SEEN, chosen, strict=True)), _CALLS: stats[_CALLS] + 1}


def next_pass(accumulated: Any) -> Any:
    """The same before another forward pass, whose first call of a layer is its first again."""

    def rewind(path: Path, stats: Mapping[str, Any]) -> dict[str, Any]:
        return {**stats, _CALLS: jnp.zeros_like(stats[_CALLS])}

    return map_layers(rewind, accumulated)


def finish(accumulated: Any, conventions: Mapping[Path, Convention]) -> Any:
    """The running statistics after one more batch: all that was seen since `begin`, as one."""

    def settle(path: Path, kept: Mapping[str, Any], seen: list[Moments]) -> Mapping[str, Any]:
        momentum, correction = conventions[path]
        for call in seen:  # each moves the statistics, as it does in a plain forward pass
            enough = call.count > correction
            kept = move(kept, call.mean, call.variance(correction), enough, weights(momentum))
        return kept

    return _settled(accumulated, conventions, settle)


def replace(accumulated: Any, paths: Collection[Path]) -> Any:
    """The statistics with mean and biased variance of all that was seen, at these paths."""

    def settle(path: Path, kept: Mapping[str, Any], seen: list[Moments]) -> Mapping[str, Any]:
        all_calls = functools.reduce(merge, seen)
        return {**kept, "mean": all_calls.mean, "var": all_calls.variance()}

    return _settled(accumulated, paths, settle)


def unmeasured(accumulated: Any, paths: Collection[Path]) -> dict[str, int]:
    """How many channels have no finite mean and variance, for the layers where any have not."""
    channels: dict[str, int] = {}

    def look(path: Path, stats: Mapping[str, Any]) -> None:
        if path in paths:
            seen = functools.reduce(merge, _by_call(stats))
            fine = (seen.count > 0) & jnp.isfinite(seen.mean) & jnp.isfinite(seen.m2)
            channels["/".join(path)] = int(jnp.sum(~fine))

    map_layers(look, accumulated)
    return {path: count for path, count in channels.items() if count}


def merge_batch_stats(batch_stats: Any, axis: int = 0) -> Any:
    """One set of running statistics from several, such as those of devices that never talked.

    The mean of the means, and by the law of total variance the mean of the variances plus the
    variance of the means; each weighs alike. (The mean of the variances alone is too small.)

    Args:
        batch_stats: a collection whose arrays have one more axis, as `pmap` without an axis name
            returns it.
        axis: that axis.

    Returns:
        The collection without that axis.

    >>> stats = {"bn": {"mean": jnp.array([[0.0], [10.0]]), "var": jnp.array([[1.0], [1.0]])}}
    >>> float(merge_batch_stats(stats)["bn"]["var"][0])
    26.0
    """

    def merged(path: Path, stats: Mapping[str, Any]) -> dict[str, Any]:
        mean = jnp.mean(stats["mean"], axis)
        var = jnp.mean(stats["var"], axis) + jnp.var(stats["mean"], axis)
        others = {name: jnp.take(value, 0, axis) for name, value in stats.items()}
        return {**others, "mean": mean, "var": var}

    return map_layers(merged, batch_stats)


def _settled(
    accumulated: Any,
    paths: Collection[Path],
    settle: Callable[[Path, Mapping[str, Any], list[Moments]], Mapping[str, Any]],
) -> Any:
    """The statistics without the room for moments, and settled at these paths."""

    def visit(path: Path, stats: Mapping[str, Any]) -> dict[str, Any]:
        kept = {name: value for name, value in stats.items() if name not in (*_SEEN, _CALLS)}
        if path not in paths:
            return kept
        new = settle(path, kept, _by_call(stats))
        return {name: new[name].astype(value.dtype) for name, value in kept.items()}

    return map_layers(visit, accumulated)


def _by_call(stats: Mapping[str, Any]) -> list[Moments]:
    """What the first call of a layer has seen in all forward passes, the second one, and so on."""
    calls = stats[_SEEN[0]].shape[-1]
    return [Moments(*(stats[name][..., call] for name in _SEEN)) for call in range(calls)]


def map_layers(function: Callable[[Path, Mapping[str, Any]], Any], tree: Any) -> Any:
    """Apply a function of path and statistics to each batch norm in a collection."""

    def visit(path: Path, node: Any) -> Any:
        if not isinstance(node, Mapping):
            return node
        if {"mean", "var"} <= {*node} and not isinstance(node["mean"], Mapping):
            return function(path, node)
        return {name: visit((*path, name), child) for name, child in node.items()}

    return visit((), tree)
