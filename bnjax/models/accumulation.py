"""Accumulate the moments of every batch norm in a model over several forward passes.

Running statistics are decaying averages that are updated once per forward pass. For exact
statistics over many passes (micro-batches, a data set), layers accumulate moments instead. These
live in `batch_stats`, one leaf of the mean's shape for each part and call, so `nn.remat`, `nn.scan`
and `nn.vmap` carry them along with the statistics.
"""

import contextlib
import functools
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta, unfreeze

from bnjax.core import compat
from bnjax.core.devices import pool
from bnjax.core.measuring import measure
from bnjax.core.moments import Moments, merge, working_dtype
from bnjax.core.running import move
from bnjax.core.sharding import on_auto_axes
from bnjax.models import checks
from bnjax.models.conventions import Facts
from bnjax.models.statistics import Path, layers_of, map_layers
from bnjax.models.visit import Visit
from bnjax.models.visits import visiting

_PARTS = ("count", "origin", "offset", "m2")
_CALLS = "seen_calls"  # how many times the layer was called in this forward pass


@contextlib.contextmanager
def accumulating() -> Iterator[dict[Path, Facts]]:
    """A context in which training batch norms accumulate moments, not update their statistics.

    The statistics of the model must come from `begin` and be mutable.

    Yields:
        The facts of each measured layer by path, in the order of first calls; filled while the
        model is traced.

    Raises:
        ValueError: an unknown module keeps a mean and a variance.
    """
    measured: dict[Path, Facts] = {}

    def norm(visit: Visit) -> Any:
        if visit.running or _CALLS not in visit.statistics:
            return visit.run()
        checks.poolable(visit.layer, _kept(visit.statistics), "/".join(visit.path))
        measured[visit.path] = visit.facts
        return run_and_add(visit)

    with visiting(norm) as strangers:
        try:
            yield measured
        finally:  # even after a failure, which they may have caused
            checks.none_unknown(strangers)


def run_and_add(visit: Visit, **how: Any) -> Any:
    """Run a call and accumulate the moments of its input; leave the statistics unchanged.

    Args:
        visit: the call.
        **how: options of `Visit.run`.
    """
    before = visit.statistics
    y = visit.run(**how)
    visit.put(_with_call(before, visit))
    return y


def begin(batch_stats: Any, calls: Mapping[Path, int] | None = None) -> Any:
    """Add empty moments to the statistics of each batch norm.

    With the counts from `rehearse`, each call of a layer gets its own moments; without, all calls
    are pooled.
    """

    def add_room(path: Path, stats: Mapping[str, Any]) -> dict[str, Any]:
        stats = dict(meta.unbox(stats))
        number = jnp.zeros_like(stats["mean"], working_dtype(stats["mean"].dtype))
        real = jnp.real(number)
        for call in range(calls[path] if calls else 1):
            stats |= dict(zip(_names(call), (real, number, number, real), strict=True))
        return {**stats, _CALLS: jnp.zeros(real.shape, jnp.int32)}

    return map_layers(add_room, unfreeze(batch_stats))


def rehearse(
    forward: Callable[[Any], tuple[Any, Any]], accumulated: Any
) -> tuple[dict[Path, int], Any]:
    """Count the calls of each layer in one forward pass; also return the shapes of its results.

    A loop traces its body once but runs it many times. So trace the pass on shapes, remove
    everything that the counters do not depend on, and run the rest.

    Args:
        forward: `forward(accumulated)` returns the new statistics and other results.
        accumulated: the statistics from `begin`.

    Raises:
        ValueError: the number of calls depends on the data.
    """
    traced, shapes = jax.make_jaxpr(forward, return_shape=True)(accumulated)
    leaves, tree = jax.tree_util.tree_flatten_with_path(shapes)
    counters = [path[-1:] == (jax.tree_util.DictKey(_CALLS),) for path, _ in leaves]
    count, needed = compat.needed(traced, counters)
    inputs = zip(traced.in_avals, needed, strict=True)
    with jax.ensure_compile_time_eval():
        counts = iter(count(*(np.zeros(each.shape, each.dtype) for each, needs in inputs if needs)))
    counted = tree.unflatten(next(counts) if counter else None for counter in counters)
    calls = {
        path: checks.number_of_calls(stats[_CALLS], "/".join(path))
        for path, stats in layers_of(counted[0]).items()
    }
    return calls, shapes[1]


def _with_call(stats: dict[str, Any], visit: Visit) -> dict[str, Any]:
    """Add the moments of one more input to a layer's statistics."""
    x, mask = jnp.asarray(visit.x), visit.mask
    mask = None if mask is None else checks.mask(jnp.asarray(mask, bool), x.shape)
    add = functools.partial(_add, axes=visit.axes, devices=visit.devices)
    return on_auto_axes(add, (stats, x, mask, visit.bank), x, like=stats)


def _add(
    stats: dict[str, Any], x: Any, mask: Any, bank: Any, *, axes: Any, devices: Any
) -> dict[str, Any]:
    banks = None if bank is None else len(stats["mean"])
    batch, (axis_name, groups) = measure(x, axes, mask, bank, banks), devices
    if axis_name is not None:
        batch = pool(batch, axis_name, groups)
    shape, last, new = batch.m2.shape, _calls(stats) - 1, {}
    batch = Moments(*(jnp.broadcast_to(part, shape) for part in _parts(batch)))
    for call in range(last + 1):
        held = [stats[name] for name in _names(call)]
        this = jnp.minimum(stats[_CALLS], last) == call
        merged = _parts(merge(Moments(*held), batch))
        chosen = (
            jnp.where(this, n.astype(old.dtype), old) for n, old in zip(merged, held, strict=True)
        )
        new |= dict(zip(_names(call), chosen, strict=True))
    return {**stats, **new, _CALLS: stats[_CALLS] + 1}


def _names(call: int) -> tuple[str, ...]:
    return tuple(f"seen_{call}_{part}" for part in _PARTS)


def _calls(stats: Mapping[str, Any]) -> int:
    return sum(name.startswith("seen_") and name.endswith("_m2") for name in stats)


def _parts(moments: Moments) -> tuple[jax.Array, ...]:
    return moments.count, moments.origin, moments.offset, moments.m2


def next_pass(accumulated: Any) -> Any:
    """Reset the call counters before another forward pass."""

    def rewind(path: Path, stats: Mapping[str, Any]) -> dict[str, Any]:
        return {**stats, _CALLS: jnp.zeros_like(stats[_CALLS])}

    return map_layers(rewind, accumulated)


def finish(accumulated: Any, measured: Mapping[Path, Facts]) -> Any:
    """The running statistics after one update with everything seen since `begin`."""

    def settle(path: Path, stats: Mapping[str, Any]) -> dict[str, Any]:
        kept = _kept(stats)
        if path not in measured:
            return kept
        new, does = kept, measured[path]
        for call in _by_call(stats):  # each updates the statistics, as in a plain forward pass
            new = move(new, call, does.momentum, does.correction)
        return {name: new[name].astype(value.dtype) for name, value in kept.items()}

    return map_layers(settle, accumulated)


def population(accumulated: Any, measured: Collection[Path]) -> dict[Path, Moments]:
    """The pooled moments of everything that each measured layer has seen since `begin`."""
    layers = layers_of(accumulated)
    return {path: functools.reduce(merge, _by_call(layers[path])) for path in measured}


def _kept(stats: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in stats.items() if not name.startswith("seen_")}


def _by_call(stats: Mapping[str, Any]) -> list[Moments]:
    """The moments of each call of a layer, in call order, pooled over the forward passes."""
    calls = range(_calls(stats))
    return [Moments(*(stats[name] for name in _names(call))) for call in calls]
