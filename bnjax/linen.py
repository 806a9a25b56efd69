"""Flax linen layers: PyTorch's `BatchNorm1d/2d/3d`, and a drop-in for `flax.linen.BatchNorm`."""

from bnjax.layers.conditional import (
    ConditionalBatchNorm1d,
    ConditionalBatchNorm2d,
    ConditionalBatchNorm3d,
)
from bnjax.layers.linen import BatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d

__all__ = [
    "BatchNorm",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "ConditionalBatchNorm1d",
    "ConditionalBatchNorm2d",
    "ConditionalBatchNorm3d",
]
