"""The mode of a layer that was told none: what `mutable` says of it, and who said it."""

import sys
from types import CodeType, FrameType
from typing import Any

from flax import core
from flax import linen as nn
from flax.core.scope import DenyList, Filter
from flax.nnx import bridge

from bnjax.core import checks

# The frames of Flax in which a model is applied with `mutable`, and a linen one in an nnx model.
_APPLY = core.apply(lambda scope: None).__code__
_TO_NNX = bridge.ToNNX.__call__.__code__
# What `init` passes, and with it `nn.tabulate` to the `apply` whose operations it counts.
_AT_INIT = DenyList("intermediates")


def asked_to_train(layer: nn.Module, collection: str) -> bool:
    """Whether whoever applied the model has named the statistics as mutable, or everything.

    A deny-list such as Keras' `DenyList(["params"])` names neither, in training or in prediction:
    the layer evaluates, and a warning says so.
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
    """The `mutable` of the `apply` that the layer runs in, whatever lifting made of it here.

    `nn.jit` and `nn.remat` keep a deny-list; `nn.scan` and `nn.vmap` turn it into the set of the
    collections that they lift, where only the frame of the `apply` still has it.
    """
    here = layer.scope.root.mutable
    frame = _frame(sys._getframe(), _APPLY) if isinstance(here, set) else None
    return here if frame is None else frame.f_locals.get("mutable", here)


def _is_silent_bridge() -> bool:
    """Whether `ToNNX` applies the model, and neither its caller nor a model around it said how."""
    frame = _frame(_frame(sys._getframe(), _APPLY), _TO_NNX, within=("flax", "jax"))
    # `mutable` is looked for in a model around it, `m`, only where the caller has given none.
    return frame is not None and frame.f_locals.get("m", frame) is None


def _frame(
    frame: FrameType | None, code: CodeType, within: tuple[str, ...] = ("",)
) -> FrameType | None:
    """The nearest frame, from this one up, that runs the code, if those between are of `within`."""
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
        if frame is not None and not frame.f_globals.get("__name__", "").startswith(within):
            return None
    return frame


def check_bridge(*, drop_in: bool) -> None:
    """An nnx layer that trains in a linen model, by `ToLinen`, has statistics that can move.

    Flax's own layer trains without them, silently; a drop-in for it warns.
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
