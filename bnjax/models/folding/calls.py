"""What folding needs to know about a call of a conv, dense or batch norm layer."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx
from flax.core import meta

from bnjax.models import checks
from bnjax.models.attributes import variables_of
from bnjax.models.compat import is_traced
from bnjax.models.conventions import LINEAR, own_type
from bnjax.models.folding.windows import Window, window_of
from bnjax.models.statistics import Path
from bnjax.models.visit import Visit

_PLAIN = (nn.Dense, nnx.Linear)
_CONV = (nn.Conv, nnx.Conv)
_FUNCTIONS = ("dot_general", "dot_general_cls", "conv_general_dilated", "conv_general_dilated_cls")
_FLAX = (jax.lax.dot_general, jax.lax.conv_general_dilated)
_GENERAL = (nn.DenseGeneral, nnx.LinearGeneral)


@dataclasses.dataclass(frozen=True, eq=False)
class Linear:
    """How a conv or dense layer treats the axes of its input.

    Attributes:
        kind: the name of its class.
        features: the number of trailing output axes that are channels.
        bias_shape: the shape of its bias, whether or not it has one.
        inner: the input axes that its kernel has, in the kernel's order.
        batch: how many of these are batch axes, which its output also has.
        transposed: whether its output channels are the second to last axis of its kernel.
        window: where it reads its input; None if unknown.
        mask: what its kernel is multiplied by.
        style: its dtype and precision.
        opaque: what it does that folding can't see through; None if nothing.
    """

    kind: str
    features: int
    bias_shape: tuple[int, ...]
    inner: tuple[int, ...] = ()
    batch: int = 0
    transposed: bool = False
    window: Window | None = None
    mask: Any = None
    style: tuple[Any, ...] = (None, None)
    opaque: str | None = None

    @property
    def channels(self) -> tuple[int, ...]:
        """The shape of its channels."""
        return self.bias_shape[len(self.bias_shape) - self.features :]


class Call(NamedTuple):
    """A call of a conv, dense or batch norm layer, as described by the layer."""

    path: Path
    norm: bool
    reason: str | None  # why it can't be folded, if the layer alone rules it out
    affine: tuple[str, ...]  # which of scale and bias it has
    dtypes: tuple[Any, Any]  # of input and output
    shapes: dict[str, tuple[int, ...]]  # of the values that it marked, as the layer saw them
    axes: tuple[int, ...] = ()  # the channel axes of a batch norm
    eps: Any = 0.0
    linear: Linear = Linear("", 0, ())

    @property
    def input(self) -> tuple[int, ...]:
        """The shape of its input."""
        return self.shapes["enter"]


def norm_facts(visit: Visit) -> dict[str, Any]:
    """What a call of a batch norm does."""
    does = visit.facts
    if does.tracked and not visit.running:
        raise ValueError(
            f"`model` must be in evaluation mode, but the batch norm at {checks.where(visit.path)} "
            "is in training mode. Switch it, as with `apply_kwargs={'train': False}`."
        )
    reason = None
    if not does.tracked:
        reason = "the batch norm has no running statistics"
    elif visit.mask is not None:
        reason = "the batch norm is called with a mask, which it does not need in evaluation"
    elif does.by_batch:
        reason = f"the batch norm normalizes by its input in evaluation, with using={does.using}"
    elif does.banks is not None:
        reason = "the batch norm has banks: fold the same model without banks, with the variables "
        reason += "that bnjax.select_bank(variables, bank) returns"
    elif {"scale", "bias"} & visit.extra.keys():
        reason = "the batch norm is called with a scale or a bias for each example"
    axes = checks.feature_axes(does.axis, jnp.ndim(visit.x))
    return {"reason": reason, "affine": does.affine, "axes": axes, "eps": does.eps}


def linear_facts(layer: Any, x: jax.Array) -> dict[str, Any]:
    """What a call of a conv or dense layer does."""
    kind, reason = own_type(layer), None
    base = next(c for c in kind.__mro__ if c in LINEAR)
    if any(getattr(kind, name, 0) is not getattr(base, name, 0) for name in ("__call__", "param")):
        reason = f"{kind.__name__} changes what {base.__name__} computes"
    shape = jnp.shape(meta.unbox(variables_of(layer).get("params", {}).get("kernel", 0)))
    affine = ("bias",) if layer.use_bias else ()
    return {"reason": reason, "affine": affine, "linear": _linear(base, layer, shape, x.ndim)}


def _linear(base: Any, layer: Any, shape: tuple[int, ...], ndim: int) -> Linear:
    name, mask = base.__name__, getattr(layer, "mask", None)
    opaque = _opaque(layer, mask)
    mask = None if mask is None or opaque else np.asarray(mask)
    known = {"mask": mask, "style": (layer.dtype, layer.precision), "opaque": opaque}
    if base in (*_PLAIN, *_CONV):
        window = Window() if base in _PLAIN else window_of(layer)
        return Linear(name, 1, shape[-1:], (ndim - 1,), window=window, **known)
    if base not in _GENERAL:
        transposed = getattr(layer, "transpose_kernel", False)
        bias_shape = shape[:-2] + shape[-1:] if base is nn.ConvLocal else shape[-1:]
        bias_shape = shape[-2:-1] if transposed else bias_shape
        return Linear(name, 1, bias_shape, transposed=transposed, **known)
    linen = base is nn.DenseGeneral
    out = layer.features if linen else layer.out_features
    batch = _several(layer.batch_dims if linen else tuple(layer.batch_axis))
    contracted = (sorted(a % ndim for a in _several(axes)) for axes in (batch, layer.axis))
    features = len(_several(out))
    bias_shape = shape[: len(batch)] + shape[len(shape) - features :]
    inner = tuple(itertools.chain(*contracted))
    return Linear(name, features, bias_shape, inner, len(batch), **known)


def _opaque(layer: Any, mask: Any) -> str | None:
    functions = (getattr(layer, name, None) for name in _FUNCTIONS)
    if any(each not in (None, *_FLAX) for each in functions):
        return "computes with a custom function"
    return "has a mask that is computed in the model" if is_traced(mask) else None


def _several(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, Sequence) else (value,)
