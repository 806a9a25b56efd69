"""Checks of layers and their settings, while they are called."""

from collections.abc import Collection, Mapping
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from bnjax._names import nearest
from bnjax.core.checks import POOLED, where


def has_examples(layer: Any, shape: tuple[int, ...], size: int, path: str) -> None:
    """Require a batch norm's input to have the examples of the mask along its leading axis."""
    if shape[:1] != (size,):
        raise ValueError(
            f"The `mask` of the batch has {size} examples, but the input of the "
            f"{type(layer).__name__} at {where([path])} has shape {shape}: the model reshapes its "
            "examples. Pass that layer its own mask, as in norm(x, mask=...), and rename that of "
            "the batch; or, in training, let the statistics include the padding with "
            "mask_statistics=False."
        )


def step_of_schedule(step: Any, path: Any, what: str = "momentum") -> Any:
    """Require a known step number for a momentum, or a policy, that is a schedule."""
    if step is None:
        repair = "pass its value: override(paths, momentum=schedule(step))."
        if what != "momentum":
            repair = "pass numbers: override(paths, using=policy.at(step))."
        raise ValueError(
            f"The {what} of the batch norm at {where(['/'.join(path)])} is a schedule, but no "
            "step is known here, and the layer keeps no count. Use bnjax.training.train_step or "
            f"bnjax.nnx.train_step, or {repair}"
        )
    return step


def keeps_for_momentum(momentum: Any, kept: Collection[str], path: str) -> None:
    """Require a layer to keep the statistics that an overriding momentum needs."""
    needed = ("count",) if momentum is None else POOLED if isinstance(momentum, str) else ()
    if kept and (missing := [name for name in needed if name not in kept]):
        raise ValueError(
            f"override(momentum={momentum!r}) needs {missing} in the `batch_stats` of the batch "
            f"norm at {where([path])}, which has {sorted(kept)}. Construct a bnjax layer with "
            f"momentum={momentum!r} instead."
        )


def number_of_calls(counted: Any, path: str) -> int:
    """Require a known number of calls, since each call of a layer has its own moments."""
    try:
        return int(np.max(np.asarray(counted), initial=1))
    except jax.errors.TracerArrayConversionError as error:
        raise ValueError(
            f"The number of calls of `{path}` depends on the data, so its statistics over "
            "micro-batches can't be exact. Train with microbatches=1."
        ) from error


def is_initializing(layer: Any) -> bool:
    """Whether a linen layer is creating its variables."""
    return isinstance(layer, nn.Module) and layer.is_initializing()


def poolable(layer: Any, statistics: Collection[str], path: str) -> None:
    """Require a layer that keeps only moments, which can be pooled."""
    if others := sorted({*statistics} - {"mean", "var", "count", *POOLED}):
        raise ValueError(
            f"The {type(layer).__name__} at {where([path])} must keep only a mean and a variance, "
            f"but also keeps {others}, which can't be pooled over micro-batches. Train with "
            "microbatches=1."
        )


def known_fields(fields: Mapping[str, Any], known: set[str]) -> None:
    """Require settings that batch norm layers have."""
    if not fields:
        raise TypeError(
            "`override` needs at least one setting, got none. Write, for example, "
            "override('encoder/**', momentum=0.01)."
        )
    for name in sorted(set(fields) - known):
        close = nearest(name, known)
        others = "momentum, eps, axis_name or use_running_average"
        hint = f"Did you mean `{close}`?" if close else f"It takes their fields, such as {others}."
        raise TypeError(f"`override` takes settings of batch norm layers, got `{name}`. {hint}")


def layer_has_fields(layer: Any, source: Any, fields: Mapping[str, Any], path: str) -> None:
    """Require that the layer has the fields; the conventions differ in some names."""
    missing = sorted(name for name in fields if name != "using" and not hasattr(source, name))
    if missing:
        raise TypeError(
            f"The {type(layer).__name__} at {where([path])} has no field {missing}. "
            "PyTorch's convention has `eps` and `affine` where Flax's has `epsilon`, `use_scale` "
            "and `use_bias`."
        )
