"""Flax linen layers: PyTorch's `BatchNorm1d/2d/3d`, and a drop-in for `flax.linen.BatchNorm`."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, Self

import chex
import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.dtypes import canonicalize_dtype
from flax.typing import Axes, Dtype, Initializer
from jax.nn.initializers import ones, zeros

from bnjax.core import checks
from bnjax.core.devices import AxisName, Groups
from bnjax.core.policies import Policy
from bnjax.core.settings import Momentum
from bnjax.layers import arguments, conventions, modes

_COLLECTION = "batch_stats"


class _Layer(nn.Module):
    """What both conventions share: it owns variables and calls the core."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Create a layer, after a check of the argument names."""
        if kwargs:
            arguments.constructed(cls, args, kwargs)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        super().__post_init__()
        with conventions.naming(self, functools.partial(_place, self)):
            conventions.check(self)

    @nn.compact
    def __call__(
        self,
        x: chex.Array,
        use_running_average: bool | None = None,
        *,
        mask: chex.Array | None = None,
        bank: int | str | chex.Array | None = None,
        scale: chex.Array | None = None,
        bias: chex.Array | None = None,
    ) -> jax.Array:
        """Normalize `x` per channel, and update the running statistics in training.

        Args:
            x: real floating-point input of the rank that a 1d, 2d or 3d layer is named for; any
                rank and dtype for `BatchNorm`.
            use_running_average: as the attribute; set only one of the two.
            mask: bool, broadcastable to `x`: only True positions enter the statistics. `BatchNorm`
                also accepts numbers, where nonzero ones count.
            bank: for a layer with `banks`: the name or number of a bank, or an int32 array of shape
                (N,), one for each example.
            scale: one for each example, (N, C) or broadcastable: multiplied after the learned scale
                and bias.
            bias: one for each example, likewise: added last.

        Returns:
            The normalized input, with x's shape, and with x's dtype unless `dtype` is set.

        Raises:
            ValueError: wrong rank, axis or number of channels, `use_running_average` set twice,
                missing statistics, `use_running_average=False` with immutable ones, or, in
                PyTorch's convention, one value per channel in training.
            TypeError: integer or complex input, in PyTorch's convention.
        """
        with conventions.naming(self, functools.partial(_place, self)):
            given = {"bank": bank, "scale": scale, "bias": bias}
            return _normalize(self, jnp.asarray(x), use_running_average, mask, given)


def _place(layer: Any) -> str:
    """Where the layer is; empty if it is neither in a model nor being applied."""
    if layer.scope is not None and layer.name is not None:
        return f"at {checks.where(layer.path)}"
    parent = getattr(layer.parent, "scope", None)
    if layer.scope is not None or parent is None:
        return f"at {checks.where(())}" if layer.scope is not None else ""
    return f"in {checks.where(layer.parent.path)}"


# Outside Flax's own wrapper, which refuses to call a layer without variables.
_Layer.__call__ = arguments.checked(_Layer.__call__, _place)


# Functions, not methods, because `nn.tabulate` calls each method of a module separately.
def _normalize(
    layer: Any, x: jax.Array, at_call: bool | None, mask: Any, given: dict[str, Any]
) -> jax.Array:
    """Normalize x with the variables of the layer, and update them in training."""
    conventions.check_input(layer, x, any_rank="bnjax.linen.BatchNorm")
    running = _uses_running(layer, at_call)
    shape = tuple(x.shape[a] for a in checks.feature_axes(layer.axis, x.ndim))
    new = layer.is_initializing()
    names = {"params": conventions.parameters(layer), _COLLECTION: conventions.statistics(layer)}
    for collection, expected in names.items():
        held = layer.variables.get(collection, {})
        if not new and (held or not layer.is_mutable_collection(collection)):
            checks.held(collection, held, expected, layer.path)
            names[collection] = conventions.with_kept(expected, held)
    stats = {
        name: layer.variable(
            _COLLECTION,
            name,
            lambda name=name: conventions.first_statistics(layer, shape, x.dtype)[name],
        )
        for name in names[_COLLECTION]
    }
    params = {
        name: layer.param(
            name,
            conventions.initializer(layer, name),
            conventions.parameter_shape(layer, name, shape),
            layer.param_dtype,
        )
        for name in names["params"]
    }
    values = {name: stat.value for name, stat in stats.items()}
    settings: dict[str, Any] = {"dtype": layer.dtype, "mask": mask, **given}
    if not conventions.is_torch(layer):
        typed = (jnp.zeros((), layer.param_dtype) for _ in params)
        settings["dtype"] = canonicalize_dtype(x, *typed, dtype=layer.dtype)
        settings["mask"] = None if mask is None else jnp.asarray(mask, bool)
    if new:
        settings |= {"axis_name": None, "axis_index_groups": None, "using": None}
        if layer.banks is not None and given["bank"] is None:
            settings["bank"] = 0
        if running and not values:
            values = {"mean": jnp.zeros(shape), "var": jnp.ones(shape), "count": jnp.array(0)}
    y, moved = conventions.normalize(layer, params, values, x, mutable=not running, **settings)
    if not running and not new:
        for name, stat in stats.items():
            stat.value = moved[name]
    return y


def _uses_running(layer: Any, at_call: bool | None) -> bool:
    """The mode, from the constructor, the call or `mutable`."""
    checks.given_once(layer.use_running_average, at_call)
    running = layer.use_running_average if at_call is None else at_call
    checks.static("use_running_average", running)
    new, torch = layer.is_initializing(), conventions.is_torch(layer)
    if running is False and (layer.track_running_stats if torch else not new):
        checks.mutable_statistics(layer.is_mutable_collection(_COLLECTION), layer.path)
    if not torch:
        checks.given(running)
        return bool(running)
    if new or running is None:
        return new or not modes.asked_to_train(layer, _COLLECTION)
    return running


class TorchBatchNorm(_Layer):
    """PyTorch's signature and semantics, for inputs with any number of spatial axes."""

    num_features: int | None = None
    eps: float = 1e-5
    momentum: Momentum = 0.1
    affine: bool | Literal["own", "both"] = True
    track_running_stats: bool = True
    _: dataclasses.KW_ONLY
    axis: int = -1
    use_running_average: bool | None = None
    axis_name: AxisName | None = None
    axis_index_groups: Groups | None = None
    virtual_batch_size: int | None = None
    using: Policy | None = None
    banks: int | Sequence[str] | None = None
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    scale_init: Initializer = ones
    bias_init: Initializer = zeros

    _spatial: ClassVar[tuple[str, ...]]


class BatchNorm1d(TorchBatchNorm):
    """`torch.nn.BatchNorm1d` for (N, C) or (N, L, C); mode and attributes as in `BatchNorm2d`."""

    _spatial = conventions.SPATIAL[1]


class BatchNorm2d(TorchBatchNorm):
    """`torch.nn.BatchNorm2d` for (N, H, W, C): its signature, semantics and results.

    It trains when applied with `mutable=["batch_stats"]` (or `mutable=True`): it normalizes with
    the batch and updates the running statistics. Otherwise it normalizes with the running ones.
    While a model is initialized, it uses mean 0 and variance 1 and updates nothing. With a
    deny-list, which does not name `batch_stats`, it evaluates and warns: for Keras' `FlaxLayer`,
    set `use_running_average`. In an nnx model, `nnx.bridge.ToNNX` needs `mutable` at each call.

    A training call returns statistics in at least float32, even if all variables were cast to half
    precision. A `lax.scan` that carries half-precision statistics fails because their dtype
    changes: cast them back to float32 first.

    Guides: examples/guides/conventions.md, examples/guides/running_statistics.md

    Attributes:
        num_features: number of channels, C; None infers it from the first input.
        eps: added to the variance.
        momentum: weight of the new batch in the running statistics (PyTorch's convention: one
            minus Flax's); None for the cumulative average over all batches; a function of the
            number of training steps, such as an optax schedule or `bnjax.policies.Debiased`;
            "pooled" for the mean and variance of all values ever seen, as one set.
        affine: learn `scale` and `bias`, in the collection `params`. With banks, True shares them,
            "own" has one of each per bank, and "both" adds `bank_scale` and `bank_bias`.
        track_running_stats: keep `mean` and `var` in `batch_stats`. If False, each batch is
            normalized with its own statistics, even in evaluation.
        axis: the channel axis: -1 for channels last, 1 for NCHW.
        use_running_average: None follows `mutable`; True freezes the layer: it uses its running
            statistics and never updates them, even in training; False requires mutable statistics.
        axis_name: name of a mapped axis, or several, over whose devices statistics are pooled.
        axis_index_groups: lists of indices of that axis; statistics are pooled within each list.
        virtual_batch_size: in training, normalize groups of this many examples separately.
        using: a policy from `bnjax.policies`, such as `Renorm()`, that sets what to normalize with;
            by default the batch in training and the running statistics in evaluation.
        banks: keep several sets of statistics, given by number or by names such as
            `("source", "target")`; each call, or each example, uses and updates one of them.
        dtype: dtype of the output; None keeps that of the input.
        param_dtype: dtype of `scale` and `bias`; the statistics are at least float32.
        scale_init: initializer of `scale`.
        bias_init: initializer of `bias`.
    """

    _spatial = conventions.SPATIAL[2]


class BatchNorm3d(TorchBatchNorm):
    """`torch.nn.BatchNorm3d` for (N, D, H, W, C); mode and attributes as in `BatchNorm2d`."""

    _spatial = conventions.SPATIAL[3]


class BatchNorm(_Layer):
    """Drop-in for `flax.linen.BatchNorm`: its fields, defaults, variables and output dtype.

    In a model written for Flax's layer, replacing the name changes only the accuracy: statistics
    are exact at any mean, regardless of `use_fast_variance` and `force_float32_reductions`; NaN
    under a mask affects nothing else; a batch without finite mean and variance updates nothing; and
    the mean of complex input is complex from the start, so that `lax.scan` can carry it.

    Guide: examples/guides/conventions.md

    Attributes:
        use_running_average: use the statistics in `batch_stats` instead of the batch's. Set it
            here or at the call.
        axis: the feature axis or axes.
        momentum: weight of the old statistics (Flax's convention: one minus PyTorch's).
        epsilon: added to the variance.
        dtype: dtype of the output; None infers it from the input and the parameters.
        param_dtype: dtype of `scale` and `bias`.
        use_bias: learn a `bias`.
        use_scale: learn a `scale`.
        bias_init: initializer of `bias`.
        scale_init: initializer of `scale`.
        axis_name: name of a mapped axis, or several, over whose devices statistics are pooled,
            weighted by count, where Flax averages the devices' means.
        axis_index_groups: lists of indices of that axis; statistics are pooled within each list.
        use_fast_variance: accepted for compatibility; the variance is always fast and exact.
        force_float32_reductions: False keeps the running statistics in `param_dtype` instead of at
            least float32. Batch statistics are computed in at least float32 either way.
        virtual_batch_size: bnjax only, as for `BatchNorm2d`.
        using: bnjax only, as for `BatchNorm2d`.
        banks: bnjax only, as for `BatchNorm2d`; then `use_bias` and `use_scale` may be "own" or
            "both".
    """

    use_running_average: bool | None = None
    axis: Axes = -1
    momentum: Momentum = 0.99
    epsilon: float = 1e-5
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    use_bias: bool | Literal["own", "both"] = True
    use_scale: bool | Literal["own", "both"] = True
    bias_init: Initializer = zeros
    scale_init: Initializer = ones
    axis_name: AxisName | None = None
    axis_index_groups: Any = None
    use_fast_variance: bool = True
    force_float32_reductions: bool = True
    _: dataclasses.KW_ONLY
    virtual_batch_size: int | None = None
    using: Policy | None = None
    banks: int | Sequence[str] | None = None
