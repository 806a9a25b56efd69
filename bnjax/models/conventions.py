"""What a batch norm is, in one vocabulary, whoever wrote the layer: bnjax or Flax, linen or nnx."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx
from flax.typing import Axes

from bnjax.core.devices import AxisName, Groups
from bnjax.layers import linen as linen_layers
from bnjax.layers import nnx as nnx_layers

LINEN: tuple[Any, ...] = (linen_layers.TorchBatchNorm, linen_layers.BatchNorm, nn.BatchNorm)
NNX: tuple[Any, ...] = (nnx_layers.TorchBatchNorm, nnx_layers.BatchNorm, nnx.BatchNorm)
LAYERS = LINEN + NNX


class Call(NamedTuple):
    """What one call of a layer does, in PyTorch's terms whatever the layer's convention."""

    running: bool
    momentum: float | None
    correction: int
    axis: Axes
    mask: jax.Array | None
    axis_name: AxisName | None
    axis_index_groups: Groups | None


def describe(layer: Any, use_running_average: bool | None = None, *, mask: Any = None) -> Call:
    """What a call of a layer, bnjax's or Flax's own, of linen or nnx, does with these arguments."""
    given = layer.use_running_average if use_running_average is None else use_running_average
    if hasattr(layer, "track_running_stats"):
        if given is None and isinstance(layer, nn.Module):
            given = not layer.is_mutable_collection("batch_stats")
        running, momentum, correction = given or not layer.track_running_stats, layer.momentum, 1
    else:
        running, momentum, correction = given, 1 - layer.momentum, 0
    mask = None if mask is None else jnp.asarray(mask, bool)
    groups = layer.axis_index_groups
    return Call(bool(running), momentum, correction, layer.axis, mask, layer.axis_name, groups)
