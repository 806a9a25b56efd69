"""Batch-norm layers for JAX and Flax, and tools for the batch norms of any Flax model.

Layers
    BatchNorm2d, BatchNorm1d, BatchNorm3d   for linen: PyTorch's signature and results
    nnx.BatchNorm2d, nnx.BatchNorm1d, ...    the same for nnx
    linen.BatchNorm, nnx.BatchNorm          drop-ins for Flax's own layers
    init, batch_norm                        two pure functions on dicts of arrays

Tools for any linen or nnx model, with Flax's layers too
    freeze, override        a context in which batch norms are frozen or take other settings
    nnx.freeze, unfreeze    the same in place, for nnx
    recalibrate             recompute the running statistics over a data set, exactly
    diagnose                why evaluation is worse than training: layer, cause and repair
    fold                    merge batch norms into the conv or dense layers before them
    merge_batch_stats       one set of running statistics from several devices'
    register                let the tools work on another batch norm class

Training
    training.train_step, nnx.train_step     forward, backward and update, compiled
    training.eval_step, nnx.eval_step       one batch with the running statistics
    training.evaluate, nnx.evaluate         mean loss and metrics over many batches
    training.init_state                     parameters, optimizer and statistics in one state
    training.Average                        averaged weights, with statistics of their own
    training.history                        a record of the running statistics
    decay_mask, trainable_labels            which parameters an optimizer should treat differently
    remat_policy                            what a checkpointed backward pass keeps

Files
    load, save              .safetensors, .pth, .msgpack and orbax checkpoints
    from_torch, to_torch    variables from a PyTorch state dict, and back

On the command line, `bnjax inspect`, `bnjax convert` and `bnjax diagnose`.
"""

from typing import TYPE_CHECKING

from bnjax import diagnosis, linen, masks, nnx, training
from bnjax._names import front
from bnjax.checkpoints.conversion import from_torch, to_torch
from bnjax.checkpoints.files import load, save
from bnjax.core.batch_norm import batch_norm, init
from bnjax.core.moments import remat_policy
from bnjax.linen import BatchNorm1d, BatchNorm2d, BatchNorm3d
from bnjax.masks import decay_mask, trainable_labels
from bnjax.models.diagnosis import diagnose
from bnjax.models.folding import fold
from bnjax.models.overrides import freeze, override
from bnjax.models.recalibration import recalibrate
from bnjax.models.registered import register
from bnjax.models.statistics import merge_batch_stats

__version__ = "0.2.0"

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "batch_norm",
    "decay_mask",
    "diagnose",
    "diagnosis",
    "fold",
    "freeze",
    "from_torch",
    "init",
    "linen",
    "load",
    "masks",
    "merge_batch_stats",
    "nnx",
    "override",
    "recalibrate",
    "register",
    "remat_policy",
    "save",
    "to_torch",
    "trainable_labels",
    "training",
]

if not TYPE_CHECKING:  # else every name would seem to exist
    __getattr__, __dir__ = front(__name__, __all__)
