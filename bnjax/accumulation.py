"""The moments of every batch norm in a linen model, pooled over several forward passes.

The running statistics of a model are a decaying average, one step for each forward pass. Whoever
wants the exact statistics of many passes (a batch cut into micro-batches, a data set) lets the
layers add their moments up instead. It works on bnjax's layers and on Flax's own, and what is
added up travels in the collection `batch_stats`, so that `nn.remat` and `nn.scan` carry it.
"""

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import linen as nn

from bnjax import _checks, linen
from bnjax.functional import move
from bnjax.moments import Moments, measure, merge, pool
from bnjax.overrides import overridden

_COLLECTION = "batch_stats"
_SEEN = ("seen_count", "seen_mean", "seen_m2")

Path = tuple[str, ...]


class Convention(NamedTuple):
    """How a layer keeps its running statistics, in PyTorch's terms."""

    momentum: float | None
    correction: int


@contextlib.contextmanager
def accumulating(
    measured: Callable[[Path, linen.Call], bool] = lambda path, call: not call.running,
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
        if context.method_name != "__call__" or not isinstance(module, linen.LAYERS):
            return call(*args, **kwargs)
        if "x" in kwargs:
            args, kwargs = (kwargs["x"],), {k: v for k, v in kwargs.items() if k != "x"}
        if examples is not None:
            mask = examples.reshape(-1, *(1,) * (args[0].ndim - 1))
            given = kwargs.get("mask")
            kwargs = {**kwargs, "mask": mask if given is None else mask & jnp.asarray(given, bool)}
        with overridden(module, args, kwargs) as ((x, *others), options):
            does = linen.describe(module, *others, **options)
        room = module.has_variable(_COLLECTION, _SEEN[0])
        if not room or not measured(module.path, does):
            return call(*args, **kwargs)
        conventions[module.path] = Convention(does.momentum, does.correction)
        before = dict(module.variables[_COLLECTION])
        y = call(*args, **kwargs)
        mask = None if does.mask is None else _checks.mask(does.mask, x.shape)
        batch = measure(x, _checks.feature_axes(does.axis, x.ndim), mask)
        if does.axis_name is not None:
            batch = pool(batch, does.axis_name, does.axis_index_groups, before["mean"])
        for name, value in (before | _held(merge(_moments(before), batch))).items():
            module.put_variable(_COLLECTION, name, value)
        return y

    with nn.intercept_methods(intercept):
        yield conventions


def begin(batch_stats: Any) -> Any:
    """The statistics of a model, with room for moments, none seen yet, beside each mean."""

    def add_room(path: Path, stats: Mapping[str, Any]) -> dict[str, Any]:
        return {**stats, **dict.fromkeys(_SEEN, jnp.zeros_like(stats["mean"]))}

    return _map_layers(add_room, batch_stats)


def finish(accumulated: Any, conventions: Mapping[Path, Convention]) -> Any:
    """The running statistics after one more batch: all that was seen since `begin`, as one."""

    def settle(path: Path, stats: Mapping[str, Any]) -> dict[str, Any]:
        kept = {name: value for name, value in stats.items() if name not in _SEEN}
        if path not in conventions:
            return kept
        momentum, correction = conventions[path]
        seen = _moments(stats)
        enough = seen.count > correction
        moved = move(kept, seen.mean, seen.variance(correction), enough, momentum)
        return {name: value.astype(kept[name].dtype) for name, value in moved.items()}

    return _map_layers(settle, accumulated)


def replace(accumulated: Any, paths: Collection[Path]) -> Any:
    """The statistics with mean and biased variance of all that was seen, at these paths."""

    def settle(path: Path, stats: Mapping[str, Any]) -> dict[str, Any]:
        kept = {name: value for name, value in stats.items() if name not in _SEEN}
        if path not in paths:
            return kept
        seen = _moments(stats)
        new = {"mean": seen.mean, "var": seen.variance()}
        return kept | {name: value.astype(kept[name].dtype) for name, value in new.items()}

    return _map_layers(settle, accumulated)


def unmeasured(accumulated: Any, paths: Collection[Path]) -> dict[str, int]:
    """How many channels have no finite mean and variance, for the layers where any have not."""
    channels: dict[str, int] = {}

    def look(path: Path, stats: Mapping[str, Any]) -> None:
        if path in paths:
            seen = _moments(stats)
            fine = (seen.count > 0) & jnp.isfinite(seen.mean) & jnp.isfinite(seen.m2)
            channels["/".join(path)] = int(jnp.sum(~fine))

    _map_layers(look, accumulated)
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

    return _map_layers(merged, batch_stats)


def _moments(stats: Mapping[str, Any]) -> Moments:
    count, mean, m2 = (stats[name] for name in _SEEN)
    return Moments(jnp.real(count), mean, jnp.zeros_like(mean), jnp.real(m2))


def _held(moments: Moments) -> dict[str, Any]:
    mean = moments.mean
    count = jnp.broadcast_to(moments.count, mean.shape)
    parts = (count, mean, moments.m2)
    return {name: part.astype(mean.dtype) for name, part in zip(_SEEN, parts, strict=True)}


def _map_layers(function: Callable[[Path, Mapping[str, Any]], Any], tree: Any) -> Any:
    """Apply a function of path and statistics to each batch norm in a collection."""

    def visit(path: Path, node: Any) -> Any:
        if not isinstance(node, Mapping):
            return node
        if "mean" in node and "var" in node:
            return function(path, node)
        return {name: visit((*path, name), child) for name, child in node.items()}

    return visit((), tree)
