"""Batch normalization for JAX and Flax, done completely."""

from bnjax import linen as linen
from bnjax import masks as masks
from bnjax import nnx as nnx
from bnjax import training as training
from bnjax.accumulation import merge_batch_stats as merge_batch_stats
from bnjax.conversion import from_torch as from_torch
from bnjax.conversion import to_torch as to_torch
from bnjax.diagnosis import diagnose as diagnose
from bnjax.files import load as load
from bnjax.files import save as save
from bnjax.folding import fold as fold
from bnjax.functional import batch_norm as batch_norm
from bnjax.functional import init as init
from bnjax.linen import BatchNorm1d as BatchNorm1d
from bnjax.linen import BatchNorm2d as BatchNorm2d
from bnjax.linen import BatchNorm3d as BatchNorm3d
from bnjax.masks import decay_mask as decay_mask
from bnjax.masks import trainable_labels as trainable_labels
from bnjax.moments import remat_policy as remat_policy
from bnjax.overrides import freeze as freeze
from bnjax.overrides import override as override
from bnjax.recalibration import recalibrate as recalibrate
