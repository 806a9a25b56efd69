"""The moments of every batch norm in a model, pooled over several forward passes.

The running statistics of a model are a decaying average, one step for each forward pass. Whoever
wants the exact statistics of many passes (a batch cut into micro-batches, a data set) lets the
layers add their moments up instead. What is added up travels in the collection `batch_stats`, one
leaf of the shape of the mean for each part and call, so that `nn.remat`, `nn.scan` and `nn.vmap`
carry it over whatever axis they carry the statistics.
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
from bnjax.models.visits import Visit, visiting

_PARTS = ("count", "origin", "offset", "m2")
_CALLS = "seen_calls"  # how often the layer was called in this forward pass


@contextlib.contextmanager
def accumulating() -> Iterator[dict[Path, Facts]]:
    """A context in which batch norms that train add their moments up, and leave their statistics.

    The statistics of the model must come from `begin`, and be mutable.

    Yields:
        A dict that has, once a model was traced, the path and facts of each measured layer, in the
        order of their first calls.

    Raises:
        ValueError: a module that is not known keeps a mean and a variance.
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
        finally:  # of a failure, too: it may be theirs
            checks.none_unknown(strangers)


def run_and_add(visit: Visit, **how: Any) -> Any:
    """What a layer makes of a call, after which its statistics are as before, its moments more.

    Args:
        visit: the call.
        **how: how to run it, as `Visit.run` takes it.
    """
    before = visit.statistics
    y = visit.run(**how)
    visit.put(_with_call(before, visit))
    return y


def begin(batch_stats: Any, calls: Mapping[Path, int] | None = None) -> Any:
    """The statistics of a model, with room for moments, none seen yet, beside each mean.

    With what `rehearse` has counted there is room for each call of a layer; otherwise all calls are
    pooled.
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
    """A layer's statistics after one more call, the moments of its input added."""
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
    """The same before another forward pass, whose first call of a layer is its first again."""

    def rewind(path: Path, stats: Mapping[str, Any]) -> dict[str, Any]:
        return {**stats, _CALLS: jnp.zeros_like(stats[_CALLS])}

    return map_layers(rewind, accumulated)


def finish(accumulated: Any, measured: Mapping[Path, Facts]) -> Any:
    """The running statistics after one more batch: all that was seen since `begin`, as one."""

    def settle(path: Path, stats: Mapping[str, Any]) -> dict[str, Any]:
        kept = _kept(stats)
        if path not in measured:
            return kept
        new, does = kept, measured[path]
        for call in _by_call(stats):  # each moves the statistics, as in a plain forward pass
            new = move(new, call, does.momentum, does.correction)
        return {name: new[name].astype(value.dtype) for name, value in kept.items()}

    return map_layers(settle, accumulated)


def population(accumulated: Any, measured: Collection[Path]) -> dict[Path, Moments]:
    """The moments of all that each measured layer has seen since `begin`, in all its calls."""
    layers = layers_of(accumulated)
    return {path: functools.reduce(merge, _by_call(layers[path])) for path in measured}


def _kept(stats: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in stats.items() if not name.startswith("seen_")}


def _by_call(stats: Mapping[str, Any]) -> list[Moments]:
    """What the first call of a layer has seen in all forward passes, the second one, and so on."""
    calls = range(_calls(stats))
    return [Moments(*(stats[name] for name in _names(call))) for call in calls]
