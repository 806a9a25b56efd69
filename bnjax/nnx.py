"""Flax nnx layers: PyTorch's `BatchNorm1d/2d/3d`, a drop-in for `flax.nnx.BatchNorm`; freeze."""

from bnjax.layers.nnx import BatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d
from bnjax.models.freezing import freeze, unfreeze

__all__ = ["BatchNorm", "BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "freeze", "unfreeze"]
