"""Record running statistics during training."""

from collections.abc import Callable
from typing import Any, Literal, TypeVar, cast

import jax
import numpy as np
import optax
from flax import nnx
from flax.core import meta
from flax.traverse_util import unflatten_dict

from bnjax import globs
from bnjax.models.batches import DEFAULT, Layout
from bnjax.models.conventions import banks_of, label_of_bank, place_of_bank
from bnjax.models.statistics import layers_of

AnyStep = TypeVar("AnyStep", bound=Callable[..., Any])


def history(
    step: AnyStep,
    record: dict[str, Any],
    *,
    momentum: float | Literal["own"] | None = "own",
    every: int = 1,
    paths: globs.Paths = "**",
    channels: int | None = None,
) -> AnyStep:
    """Wrap a step so that it records running statistics, for `diagnose`, `scalars` and plots.

    A recorded step stores O(C) numbers per layer and waits for the step to finish. The record is a
    dict of lists of plain numbers, so a checkpoint can hold it and a resumed run can extend it.

    Guides: examples/guides/diagnosis.md, examples/guides/logging.md

    Args:
        step: the step from `bnjax.training.train_step` or `bnjax.nnx.train_step`.
        record: `{}`, or the record of earlier steps. Each recorded step appends `"step"`,
            `"examples"` (the batch size) and `"params_norm"`; and in `"layers"`, for each path, the
            running `"mean"` and `"var"` after the step and those of the batch alone,
            `"batch_mean"` and `"batch_var"`, each a list of C numbers. Each bank is recorded as a
            layer, such as `bn[clean]`; the batch's are NaN if it had no example.
        momentum: weight of the new batch in the running statistics (PyTorch's convention), used to
            recover the batch's own statistics; None leaves those out. By default each layer's own
            momentum, as seen when the step was traced.
        every: record one step out of this many.
        paths: which layers, as globs over module paths.
        channels: how many channels to record per layer, from the first; all by default.

    Returns:
        The wrapped step, to use instead of the given one.
    """
    fits = globs.any_of(paths)
    calls = 0

    def statistics(batch_stats: Any) -> dict[str, dict[str, np.ndarray]]:
        def read(value: Any) -> np.ndarray:  # a copy, as the step may reuse the memory
            return np.array(meta.unbox(value), np.float64)

        layers = {"/".join(path): stats for path, stats in layers_of(batch_stats).items()}
        return {
            path: {key: read(stats[key]) for key in ("mean", "var")}
            for path, stats in layers.items()
            if fits(path)
        }

    def recorded(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls % every:
            return step(*args)
        *trained, batch = args
        before = statistics(held(trained)["batch_stats"])
        found = step(*args)
        now = held(trained if isinstance(trained[0], nnx.Module) else found)
        for name, value in (
            ("step", int(now["step"])),
            ("examples", _layout(step).size(_layout(step).named(batch))),
            ("params_norm", float(_norm(now["params"]))),
        ):
            record.setdefault(name, []).append(value)
        for path, after in statistics(now["batch_stats"]).items():
            weight = _weight(step, path, momentum)
            for label, at in _banks(step, path, after["mean"].shape).items():
                lines = record.setdefault("layers", {}).setdefault(path + label, {})
                old, new = (
                    {key: np.ravel(a[at])[:channels] for key, a in stats.items()}
                    for stats in (before[path], after)
                )
                _append(lines, old, new, weight, bool(label))
        return found

    return cast(AnyStep, recorded)


def held(trained: Any) -> dict[str, Any]:
    """Parameters, statistics and step number of a state, or of a model and its optimizer.

    Without an optimizer the number is None.
    """
    first, *others = trained
    if not isinstance(first, nnx.Module | nnx.State):
        return {name: getattr(first, name) for name in ("params", "batch_stats", "step")}

    arrays = first if isinstance(first, nnx.State) else nnx.state(first)

    def of(kind: type[nnx.Variable]) -> dict[str, Any]:
        flat = nnx.to_flat_state(nnx.filter_state(arrays, kind))
        return unflatten_dict({tuple(map(str, keys)): leaf.get_value() for keys, leaf in flat})

    optimizer = others[0]
    step = None if optimizer is None else optimizer.step.get_value()
    return {"params": of(nnx.Param), "batch_stats": of(nnx.BatchStat), "step": step}


def _append(
    lines: dict[str, list[Any]], before: Any, after: Any, weight: float | None, bank: bool
) -> None:
    """Add the running statistics after a step to the record, and those of the batch alone."""
    absent = bank and all(np.array_equal(before[key], after[key]) for key in after)
    for key, value in after.items():
        lines.setdefault(key, []).append(value.tolist())
        if weight:
            # running = (1 - weight) * old + weight * batch, solved for the batch
            alone = before[key] + (value - before[key]) / weight
            alone = np.full_like(alone, np.nan) if absent else alone
            lines.setdefault(f"batch_{key}", []).append(alone.tolist())


def _banks(step: Any, path: str, shape: tuple[int, ...]) -> dict[str, tuple[Any, ...]]:
    """The suffix of each bank's path, and its place in statistics of this shape."""
    met = getattr(step, "met", {}).get(path)
    if met is None:
        return {"": ()}
    facts = met.facts
    return {label_of_bank(b, facts): place_of_bank(b, shape, facts) for b in banks_of(facts)}


def _weight(step: Any, path: str, momentum: float | str | None) -> float | None:
    """The momentum of a layer: its own, as seen when the step was traced, or the one given."""
    if momentum != "own":
        return cast(float | None, momentum)
    met = getattr(step, "met", {}).get(path)
    own = None if met is None else met.facts.weight
    return float(own) if isinstance(own, float | int | np.number) else None


def _layout(step: Any) -> Layout:
    return getattr(step, "layout", DEFAULT)


_norm = jax.jit(optax.tree.norm)
