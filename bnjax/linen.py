"""Flax linen layers: PyTorch's `BatchNorm1d/2d/3d`, and a drop-in for `flax.linen.BatchNorm`."""

from typing import TYPE_CHECKING

from bnjax._names import front
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

if not TYPE_CHECKING:  # else every name would seem to exist
    __getattr__, __dir__ = front(__name__, __all__)
