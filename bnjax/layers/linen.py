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
        """A layer, if it has these arguments."""
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
        """Normalize `x` per channel, and move the running statistics unless they are used.

        Args:
            x: real floating point input of the rank that a 1d, 2d or 3d layer is named for; any
                rank and dtype for `BatchNorm`.
            use_running_average: as the attribute; give it here or there.
            mask: bool, broadcastable to `x`: statistics are over the True positions only.
                `BatchNorm` takes numbers too: those that are not zero count.
            bank: of a layer with `banks`: the name or number of one, or an int32 array of shape
                (N,), one for each example.
            scale: of each example, (N, C) or broadcastable: multiplied after the learned scale and
                bias.
            bias: of each example, likewise: added last.

        Returns:
            The normalized input, of x's shape, and of x's dtype unless `dtype` says otherwise.

        Raises:
            ValueError: a wrong rank, axis or channel count, `use_running_average` given twice,
                missing statistics, `use_running_average=False` with immutable ones, or, in
                PyTorch's convention, one value per channel in training.
            TypeError: in PyTorch's convention, an integer or complex input.
        """
        with conventions.naming(self, functools.partial(_place, self)):
            given = {"bank": bank, "scale": scale, "bias": bias}
            return _normalize(self, jnp.asarray(x), use_running_average, mask, given)


def _place(layer: Any) -> str:
    """Where the layer is; nowhere unless it is in a model or is one that is applied."""
    if layer.scope is not None and layer.name is not None:
        return f"at {checks.where(layer.path)}"
    parent = getattr(layer.parent, "scope", None)
    if layer.scope is not None or parent is None:
        return f"at {checks.where(())}" if layer.scope is not None else ""
    return f"in {checks.where(layer.parent.path)}"


# Around what Flax has wrapped around it, which refuses a layer without variables.
_Layer.__call__ = arguments.checked(_Layer.__call__, _place)


# Functions, not methods: what Flax calls a method, it tabulates as a call of its own.
def _normalize(
    layer: Any, x: jax.Array, at_call: bool | None, mask: Any, given: dict[str, Any]
) -> jax.Array:
    """Normalize x with the variables of the layer, and move them unless it evaluates."""
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
    """The mode: as given to the constructor or the call, or what `mutable` says of it."""
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
    """PyTorch's signature and meaning, for inputs of any number of spatial axes."""

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
    """`torch.nn.BatchNorm1d`, of (N, C) or (N, L, C); mode and attributes as in `BatchNorm2d`."""

    _spatial = conventions.SPATIAL[1]


class BatchNorm2d(TorchBatchNorm):
    """`torch.nn.BatchNorm2d`, of (N, H, W, C): its signature, meaning and results.

    Whether it trains is Flax's own `mutable` flag: applied with `mutable=["batch_stats"]`, or True,
    it normalizes with the batch and moves the running statistics, otherwise with the running ones.
    While a model is initialized it uses mean 0 and variance 1 and moves nothing. A deny-list, which
    names no statistics, evaluates and warns: give Keras' `FlaxLayer` the mode in
    `use_running_average`. In an nnx model, `nnx.bridge.ToNNX` needs `mutable` at each call.

    After a training call the statistics are float32 at least, also where a policy has cast all
    variables to half precision; a `lax.scan` that carries such statistics says that their dtype
    changes: cast them back to float32 first.

    Guides: examples/guides/conventions.md, examples/guides/running_statistics.md

    Attributes:
        num_features: number of channels, C; None takes it from the first input.
        eps: added to the variance.
        momentum: weight of the new batch in the running statistics (PyTorch's convention: one
            minus Flax's); None for the cumulative average over all batches; a function of the
            number of training steps, such as a schedule of optax, or `bnjax.policies.Debiased`;
            "pooled" for mean and variance of all values ever seen, as one set.
        affine: learn `scale` and `bias`, in the collection `params`. With banks, True shares them,
            "own" has one of each for each bank, and "both" adds `bank_scale` and `bank_bias`.
        track_running_stats: keep `mean` and `var` in `batch_stats`. Without them each batch is
            normalized by its own statistics, in evaluation too.
        axis: the channel axis: -1 for channels last, 1 for NCHW.
        use_running_average: None follows the `mutable` flag; True freezes the layer: it uses its
            running statistics, and they stay, in training too; False requires mutable statistics.
        axis_name: name of a mapped axis, or several: statistics of all its devices together.
        axis_index_groups: lists of indices of that axis: statistics pooled within each.
        virtual_batch_size: groups of this many examples, each normalized by itself in training.
        using: what normalizes, if it is neither the batch in training nor the running statistics in
            evaluation: a policy of `bnjax.policies`, such as `Renorm()`.
        banks: keep several sets of statistics, by number or by names, such as
            `("source", "target")`, of which each call, or each example, uses and moves one.
        dtype: dtype of the output; that of the input if None.
        param_dtype: dtype of `scale` and `bias`; the statistics are float32 at least.
        scale_init: initializer of `scale`.
        bias_init: initializer of `bias`.
    """

    _spatial = conventions.SPATIAL[2]


class BatchNorm3d(TorchBatchNorm):
    """`torch.nn.BatchNorm3d`, of (N, D, H, W, C); mode and attributes as in `BatchNorm2d`."""

    _spatial = conventions.SPATIAL[3]


class BatchNorm(_Layer):
    """Drop-in for `flax.linen.BatchNorm`: its fields, defaults, variables and output dtype.

    In a model written for Flax's layer, replacing the name changes nothing but the accuracy: the
    statistics are exact at any mean, whatever `use_fast_variance` and `force_float32_reductions`
    say, NaN under a mask stays there, a batch without a finite mean and variance moves nothing, and
    the mean of complex input is complex from the start, so that `lax.scan` can carry it.

    Guide: examples/guides/conventions.md

    Attributes:
        use_running_average: use the statistics in `batch_stats` instead of the batch's. Give it
            here or to the call.
        axis: the feature axis, or axes.
        momentum: weight of the old statistics (Flax's convention: one minus PyTorch's).
        epsilon: added to the variance.
        dtype: dtype of the output; None infers it from the input and the parameters.
        param_dtype: dtype of `scale` and `bias`.
        use_bias: learn a `bias`.
        use_scale: learn a `scale`.
        bias_init: initializer of `bias`.
        scale_init: initializer of `scale`.
        axis_name: name of a mapped axis, or several: statistics of all its devices together, by
            count, where Flax averages the devices' means.
        axis_index_groups: lists of indices of that axis: statistics pooled within each.
        use_fast_variance: accepted, and without effect: the variance is both fast and exact.
        force_float32_reductions: False keeps the running statistics in `param_dtype`, otherwise
            they are float32 at least; the batch's are taken in float32 at least all the same.
        virtual_batch_size: bnjax's own: groups of this many examples, each normalized by itself.
        using: bnjax's own, as for `BatchNorm2d`.
        banks: bnjax's own, as for `BatchNorm2d`; then `use_bias` and `use_scale` may be "own" or
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
