"""Batch-norm layers for JAX and Flax, and tools for the batch norms of any Flax model.

Layers
    BatchNorm2d, BatchNorm1d, BatchNorm3d   for linen, with PyTorch's signature and results
    nnx.BatchNorm2d, nnx.BatchNorm1d, ...    the same for nnx
    linen.BatchNorm, nnx.BatchNorm          drop-ins for Flax's own layers
    ConditionalBatchNorm2d                  a scale and a bias for each class
    ConditionalBatchNorm1d, ConditionalBatchNorm3d
    init, batch_norm                        two pure functions on dicts of arrays
    policies                                which statistics to normalize with: `using=`

Tools for any linen or nnx model, with Flax's layers too
    freeze, override        freeze batch norms, or change their settings, in a context
    nnx.freeze, unfreeze    freeze in place, for nnx
    recalibrate             recompute the running statistics exactly over a data set
    diagnose                find why evaluation is worse than training: layer, cause and fix
    fold                    merge batch norms into the conv or dense layers before them
    to_banks, select_bank   several sets of statistics from one, and one from several
    bank                    choose the bank that layers with banks use, in a context
    merge_batch_stats       merge the running statistics of several devices
    register                let the tools work on another batch norm class

Training
    training.train_step, nnx.train_step     forward, backward and update, compiled
    training.eval_step, nnx.eval_step       one batch with the running statistics
    training.evaluate, nnx.evaluate         mean loss and metrics over many batches
    training.init_state                     parameters, optimizer and statistics in one state
    training.Average                        averaged weights, with their own statistics
    training.history                        a record of the running statistics
    training.scalars                        running statistics as a flat dict for loggers
    decay_mask, trainable_labels            parameters that an optimizer should treat differently
    remat_policy                            what to keep for a rematerialized backward pass

Files
    load, save              .safetensors, .pth, .msgpack and orbax checkpoints
    from_torch, to_torch    variables from a PyTorch state dict, and back
    torch_outputs           outputs of a PyTorch model, layer by layer, to check against

On the command line, `bnjax inspect`, `bnjax convert` and `bnjax diagnose`.
"""

from importlib import import_module, util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bnjax._public import *  # noqa: F403

__version__ = "0.2.0"


def __getattr__(name: str) -> Any:
    """A submodule, or a name from `bnjax._public`, which loads JAX on first use."""
    if not name.startswith("__") and util.find_spec(f"{__name__}.{name}"):
        return import_module(f"{__name__}.{name}")
    public = import_module("bnjax._public")
    if name == "__all__" or name in public.__all__:
        return getattr(public, name)
    return import_module("bnjax._names").missing(__name__, name)


def __dir__() -> list[str]:
    return import_module("bnjax._public").__all__
