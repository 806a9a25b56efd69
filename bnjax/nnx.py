"""For Flax nnx: PyTorch's `BatchNorm1d/2d/3d`, a drop-in for `nnx.BatchNorm`; freeze; training."""

from typing import TYPE_CHECKING

from bnjax._names import front
from bnjax.layers.conditional import NNXConditionalBatchNorm1d as ConditionalBatchNorm1d
from bnjax.layers.conditional import NNXConditionalBatchNorm2d as ConditionalBatchNorm2d
from bnjax.layers.conditional import NNXConditionalBatchNorm3d as ConditionalBatchNorm3d
from bnjax.layers.nnx import BatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d
from bnjax.models.freezing import freeze, unfreeze
from bnjax.models.overrides import override_nnx as override
from bnjax.training.nnx_steps import eval_step, train_step
from bnjax.training.steps import evaluate

__all__ = [
    "BatchNorm",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "ConditionalBatchNorm1d",
    "ConditionalBatchNorm2d",
    "ConditionalBatchNorm3d",
    "eval_step",
    "evaluate",
    "freeze",
    "override",
    "train_step",
    "unfreeze",
]

if not TYPE_CHECKING:  # else every name would seem to exist
    __getattr__, __dir__ = front(__name__, __all__)
