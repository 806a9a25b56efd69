"""The arithmetic of folding: in float64 with NumPy when done once, or traced with JAX."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.core import meta

from bnjax.models.folding.calls import Call
from bnjax.models.folding.windows import Taps, Window
from bnjax.models.statistics import Path

PAD = "pad_value"
Key = tuple[str, ...]


class Numbers:
    """The arrays of a model in high precision, with the changes that edits make.

    Args:
        flat: the variables by collection and path.
        xp: numpy, for float64, or jax.numpy, for the precision of the parameters, float32 at least.

    Attributes:
        new: the changed arrays, by collection and path.
        gains: what each kernel has been multiplied by.
    """

    def __init__(self, flat: Mapping[Key, Any], xp: Any) -> None:
        self._flat, self.xp = flat, xp
        self.new: dict[Key, Any] = {}
        self.gains: dict[Path, Any] = {}

    def read(self, collection: str, path: Path, name: str, default: float = 0) -> Any:
        """Read an array of a layer, with all changes so far."""
        key = (collection, *path, name)
        if key in self.new:
            return self.new[key]
        value = meta.unbox(self._flat.get(key, default))
        if self.xp is np:
            value = np.asarray(value)
            return value.astype(np.complex128 if np.iscomplexobj(value) else np.float64)
        return jnp.asarray(value, jnp.promote_types(jnp.result_type(value), jnp.float32))

    def kernel(self, call: Call) -> Any:
        """The kernel that a layer computes with, masked if it has a mask."""
        kernel, mask = self.read("params", call.path, "kernel"), call.linear.mask
        return kernel if mask is None else kernel * mask

    def bias(self, call: Call) -> Any:
        """The bias of a layer, or zeros if it has none."""
        held = "bias" in call.affine or ("params", *call.path, "bias") in self.new
        bias = self.read("params", call.path, "bias") if held else 0.0
        return self.xp.broadcast_to(bias, call.linear.bias_shape)

    def put(self, call: Call, kernel: Any, bias: Any, gain: Any = 1.0) -> None:
        """Replace the kernel and bias of a layer, and record the kernel's gain."""
        self.new[("params", *call.path, "kernel")] = kernel
        self.new[("params", *call.path, "bias")] = bias
        self.gains[call.path] = self.gains.get(call.path, 1.0) * gain

    def affine(self, norm: Call) -> tuple[Any, Any, Any]:
        """Factor, mean and bias of a batch norm per channel, in `(x - mean) * factor + bias`."""
        mean, var = (self.read("batch_stats", norm.path, name) for name in ("mean", "var"))
        # A layer of a registered class may lack them even if its facts name them.
        scale = self.read("params", norm.path, "scale", 1) if "scale" in norm.affine else 1.0
        bias = self.read("params", norm.path, "bias") if "bias" in norm.affine else 0.0
        factor = scale / self.xp.sqrt(var + norm.eps)
        bias = self.xp.broadcast_to(bias, factor.shape)
        return tuple(each.reshape(-1) for each in (factor, mean, bias))

    def map(self, norm: Call) -> tuple[Any, Any]:
        """Factor and shift of a batch norm per channel, in `x * factor + shift`."""
        factor, mean, bias = self.affine(norm)
        return factor, bias - mean * factor


@dataclasses.dataclass(frozen=True, eq=False)
class Backward:
    """A batch norm that is folded into the layer before it.

    Attributes:
        layer: the layer.
        norm: the batch norm.
        channel: the channel of the batch norm for each output of the layer.
        plain: whether its output has the shape and channel order of the layer's.
    """

    layer: Call
    norm: Call
    channel: np.ndarray
    plain: bool

    def run(self, numbers: Numbers) -> None:
        """Fold it."""
        linear = self.layer.linear
        each = (part[self.channel.reshape(linear.channels)] for part in numbers.affine(self.norm))
        factor, mean, shift = each
        bias = (numbers.bias(self.layer) - mean) * factor + shift
        gain = factor[:, None] if linear.transposed else factor
        numbers.put(self.layer, numbers.kernel(self.layer) * gain, bias, gain)


@dataclasses.dataclass(frozen=True, eq=False)
class Forward:
    """A batch norm that is folded into a layer after it.

    Attributes:
        norm: the batch norm.
        layer: the layer.
        channel: the channel of the batch norm for each entry of the layer's kernel, to which it
            broadcasts.
    """

    norm: Call
    layer: Call
    channel: np.ndarray

    def run(self, numbers: Numbers) -> None:
        """Fold it; if the layer pads with zeros, set the value to pad with instead."""
        linear, kernel = self.layer.linear, numbers.kernel(self.layer)
        factor, shift = numbers.map(self.norm)
        summed = tuple(range(linear.batch, kernel.ndim - linear.features))
        bias = numbers.bias(self.layer) + (kernel * shift[self.channel]).sum(summed)
        gain = factor[self.channel]
        numbers.put(self.layer, kernel * gain, bias, gain)
        if self.pads:
            numbers.new[("params", *self.layer.path, PAD)] = self.pad_value(numbers)

    @property
    def pads(self) -> bool:
        """Whether the layer pads the output of the batch norm with zeros."""
        window = self.layer.linear.window
        return window is not None and window.may_pad and not window.by_values

    def pad_value(self, numbers: Numbers) -> Any:
        """The value that the batch norm maps to zero, for each input channel of the layer."""
        factor, shift = numbers.map(self.norm)
        where = numbers.xp.where
        none = where(shift == 0, 0.0, np.inf)  # every value maps to zero, or none does
        value = where(factor == 0, none, -shift / where(factor == 0, 1.0, factor))
        groups = self.layer.linear.window.groups if self.layer.linear.window else 1
        per_group = self.channel.shape[-1] // groups  # outputs
        return value[self.channel[..., ::per_group].swapaxes(-1, -2).reshape(-1)]


@dataclasses.dataclass(frozen=True, eq=False)
class Merge:
    """A branch that is added to the kernel of another layer.

    Attributes:
        host: the layer that holds the branch.
        branch: the merged layer or batch norm, which has the same input.
        taps: the tap of the branch for each tap of the host's kernel.
        window: the window of the branch.
    """

    host: Call
    branch: Call
    taps: Taps
    window: Window

    def run(self, numbers: Numbers) -> None:
        """Add the kernel and bias of the branch to those of the host."""
        xp, rank = numbers.xp, len(self.taps)
        if self.branch.norm:
            factor, bias = numbers.map(self.branch)
            kernel = factor.reshape(*(1,) * rank, 1, -1)
        else:
            kernel, bias = numbers.kernel(self.branch), numbers.bias(self.branch)
        for axis, taps in enumerate(self.taps):
            index = np.where(np.asarray(taps) < 0, kernel.shape[axis], taps)
            zero = xp.zeros_like(xp.take(kernel, np.zeros(1, int), axis))
            kernel = xp.take(xp.concatenate([kernel, zero], axis), index, axis)
        own = numbers.kernel(self.host)
        kernel = _regrouped(xp, kernel, self.window.groups, own.shape)
        numbers.put(self.host, own + kernel, numbers.bias(self.host) + bias)


def _regrouped(xp: Any, kernel: Any, groups: int, shape: tuple[int, ...]) -> Any:
    """Expand a grouped kernel to the shape of one with fewer groups, with zeros between groups."""
    inner, outer = shape[-2:]
    size = kernel.shape[-2]
    group = np.arange(outer) // (outer // groups)
    first = (np.arange(outer) // (outer * inner // (size * groups))) * inner
    entry = np.arange(inner)[:, None] + first - group * size
    entry = np.where((entry >= 0) & (entry < size), entry, size)
    zero = xp.zeros_like(kernel[..., :1, :])
    kernel = xp.concatenate([kernel, zero], -2)
    entry = np.broadcast_to(entry, (*kernel.shape[:-2], inner, outer))
    return xp.take_along_axis(kernel, xp.asarray(entry), -2)


Edit = Backward | Forward | Merge
