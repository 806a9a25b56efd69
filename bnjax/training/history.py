"""A record of the running statistics over a training."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from flax.core import meta

from bnjax import globs
from bnjax.models.batches import DEFAULT
from bnjax.models.freezing import batch_norms
from bnjax.models.statistics import layers_of


def history(
    step: Callable[..., Any],
    record: dict[str, Any],
    *,
    momentum: float | Literal["own"] | None = "own",
    every: int = 1,
    paths: globs.Paths = "**",
    channels: int | None = None,
) -> Callable[..., Any]:
    """The step, which also keeps a record of the running statistics, for `diagnose` and pictures.

    A logged step costs O(C) numbers for each layer and waits for the step to end. The record is a
    dict of lists of plain numbers, so a checkpoint can hold it, and a resumed run goes on with it.

    Args:
        step: what `train_step` returned, that of `bnjax.training` or of `bnjax.nnx`.
        record: `{}`, or the record of the steps before. To it are appended, for each logged step,
            `"step"`, `"examples"` (the batch size) and `"params_norm"`; and in `"layers"`, for each
            path, the running `"mean"` and `"var"` after the step and those of the batch alone,
            `"batch_mean"` and `"batch_var"`, each a list of C numbers.
        momentum: weight of a new batch in the running statistics (PyTorch's convention), by which
            the statistics of the batch are told from the running ones; None leaves them out. By
            default each layer's own, as the step has met it.
        every: log each so many-th step.
        paths: which layers, as globs over module paths.
        channels: how many channels of each, the first ones; all by default.

    Returns:
        A step to use in the place of the one given.
    """
    fits = [globs.matcher(pattern) for pattern in globs.as_tuple(paths)]
    calls = 0

    def weight_of(path: str) -> float | None:
        if momentum != "own":
            return momentum
        met = getattr(step, "met", {}).get(path)
        own = None if met is None else met.facts.momentum
        return float(own) if isinstance(own, float | int | np.number) else None

    def recorded(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls % every:
            return step(*args)
        before = _statistics(args[0], fits, channels)
        result = step(*args)
        # A model and its optimizer are changed in place; a state is returned anew.
        after, counter = args[:2] if isinstance(args[0], nnx.Module) else (result[0], result[0])
        layout = getattr(step, "layout", DEFAULT)
        for name, value in (
            ("step", int(jnp.asarray(counter.step))),
            ("examples", layout.size(layout.named(args[-1]))),
            ("params_norm", float(_norm(_params(after)))),
        ):
            record.setdefault(name, []).append(value)
        for name, arrays in _statistics(after, fits, channels).items():
            lines = record.setdefault("layers", {}).setdefault(name, {})
            for key, value in arrays.items():
                lines.setdefault(key, []).append(value.tolist())
                if weight := weight_of(name):
                    # running = (1 - weight) * old + weight * batch, solved for the batch
                    alone = before[name][key] + (value - before[name][key]) / weight
                    lines.setdefault(f"batch_{key}", []).append(alone.tolist())
        return result

    return recorded


def _statistics(
    trained: Any, fits: list[Callable[[str], bool]], channels: int | None
) -> dict[str, dict[str, np.ndarray]]:
    """Running means and variances of a state or a model, by path, in float64."""
    if isinstance(trained, nnx.Module):
        layers = {path: vars(layer) for path, layer in batch_norms(trained)}
        layers = {path: kept for path, kept in layers.items() if kept.get("mean") is not None}
    else:
        layers = {"/".join(path): kept for path, kept in layers_of(trained.batch_stats).items()}

    def read(value: Any) -> np.ndarray:
        value = value[...] if isinstance(value, nnx.Variable) else meta.unbox(value)
        return np.array(np.ravel(value)[:channels], np.float64)  # a step may reuse its memory

    return {
        path: {key: read(kept[key]) for key in ("mean", "var")}
        for path, kept in layers.items()
        if any(fit(path) for fit in fits)
    }


def _params(trained: Any) -> Any:
    is_model = isinstance(trained, nnx.Module)
    return jax.tree.leaves(nnx.state(trained, nnx.Param)) if is_model else trained.params


_norm = jax.jit(optax.tree.norm)
