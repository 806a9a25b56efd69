"""The public names of `bnjax`. Importing this loads JAX, which `bnjax --help` does not need."""

from bnjax import diagnosis, linen, masks, nnx, policies, training
from bnjax.checkpoints.conversion import from_torch, to_torch, torch_outputs
from bnjax.checkpoints.files import load, save
from bnjax.core.batch_norm import batch_norm, init
from bnjax.core.moments import remat_policy
from bnjax.linen import (
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    ConditionalBatchNorm1d,
    ConditionalBatchNorm2d,
    ConditionalBatchNorm3d,
)
from bnjax.masks import decay_mask, trainable_labels
from bnjax.models.banks import bank, select_bank, to_banks
from bnjax.models.diagnosis import diagnose
from bnjax.models.folding import fold
from bnjax.models.overrides import freeze, override
from bnjax.models.recalibration import recalibrate
from bnjax.models.registered import register
from bnjax.models.statistics import merge_batch_stats

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "ConditionalBatchNorm1d",
    "ConditionalBatchNorm2d",
    "ConditionalBatchNorm3d",
    "bank",
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
    "policies",
    "recalibrate",
    "register",
    "remat_policy",
    "save",
    "select_bank",
    "to_banks",
    "to_torch",
    "torch_outputs",
    "trainable_labels",
    "training",
]
