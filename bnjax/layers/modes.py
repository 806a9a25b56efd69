"""Infer the mode of a layer without one from `mutable`, and from where that was passed."""

import sys
from types import CodeType, FrameType
from typing import Any

from flax import core
from flax import linen as nn
from flax.core.scope import DenyList, Filter
from flax.nnx import bridge

from bnjax.core import checks

# Flax's code that applies a model with `mutable`, and that calls a linen model inside an nnx one.
_APPLY = core.apply(lambda scope: None).__code__
_TO_NNX = bridge.ToNNX.__call__.__code__
# What `init` passes, and `nn.tabulate` to the `apply` whose FLOPs it counts.
_AT_INIT = DenyList("intermediates")


def asked_to_train(layer: nn.Module, collection: str) -> bool:
    """Whether the model was applied with `mutable` naming the statistics, or everything.

    Keras passes `DenyList(["params"])`, which names neither, both to train and to predict: the
    layer then evaluates and warns.
    """
    if not layer.is_mutable_collection(collection):
        if _is_silent_bridge():
            raise ValueError(
                "In an nnx model, `ToNNX` of a linen model does not pass on `.train()` or "
                "`.eval()`. To train, call it with mutable=['batch_stats']; to evaluate, with "
                "mutable=False."
            )
        return False
    given = _applied_with(layer)
    if not isinstance(given, DenyList) or given == _AT_INIT:
        return True
    checks.warn_once(
        f"mutable={given} makes `batch_stats` mutable without naming it, so batch norms without a "
        "mode of their own evaluate, in training too. To train, write mutable=['batch_stats']; "
        "where you can't, as in Keras' FlaxLayer, give the mode: "
        "BatchNorm2d(use_running_average=not training)."
    )
    return False


def _applied_with(layer: Any) -> Filter:
    """The `mutable` passed to the `apply` that the layer runs in, before lifting changed it.

    `nn.jit` and `nn.remat` keep a deny-list, but `nn.scan` and `nn.vmap` turn it into the set of
    collections that they lift; then only the frame of `apply` still holds it.
    """
    here = layer.scope.root.mutable
    frame = _frame(sys._getframe(), _APPLY) if isinstance(here, set) else None
    return here if frame is None else frame.f_locals.get("mutable", here)


def _is_silent_bridge() -> bool:
    """Whether `ToNNX` applies the model without `mutable` from its caller or an outer model."""
    frame = _frame(_frame(sys._getframe(), _APPLY), _TO_NNX, within=("flax", "jax"))
    # Flax looks for `mutable` in an outer model, `m`, only if the caller passed none.
    return frame is not None and frame.f_locals.get("m", frame) is None


def _frame(
    frame: FrameType | None, code: CodeType, within: tuple[str, ...] = ("",)
) -> FrameType | None:
    """The nearest frame upwards that runs the code, if only modules in `within` lie between."""
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
        if frame is not None and not frame.f_globals.get("__name__", "").startswith(within):
            return None
    return frame


def check_bridge(*, drop_in: bool) -> None:
    """Check that an nnx layer training in a linen model, by `ToLinen`, has mutable statistics.

    Flax's own layer silently trains without them, so its drop-in only warns.
    """
    module = bridge.wrappers.current_linen_module()
    if not isinstance(module, bridge.ToLinen):
        return
    try:
        checks.mutable_statistics(module.is_mutable_collection("batch_stats"), module.path)
    except ValueError as error:
        if not drop_in:
            raise
        checks.warn_once(f"{error} Here it normalizes with the batch and forgets its statistics.")
