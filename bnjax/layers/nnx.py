"""Flax nnx layers: PyTorch's `BatchNorm1d/2d/3d`, and a drop-in for `flax.nnx.BatchNorm`."""

import functools
import sys
import types
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

import chex
import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import canonicalize_dtype, promote_dtype
from flax.typing import Axes, Dtype, Initializer, PromoteDtypeFn
from jax import lax
from jax.nn.initializers import ones, zeros

from bnjax.core import checks
from bnjax.core.devices import AxisName, Groups
from bnjax.core.policies import Policy
from bnjax.core.settings import Momentum
from bnjax.layers import arguments, conventions, modes


class _Layer(nnx.Module):
    """What both conventions share: it owns variables and calls the core."""

    num_features: int
    use_running_average: bool | None
    # nnx variables, or None.
    mean: Any
    var: Any
    scale: Any
    bias: Any

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Create a layer, after a check of the argument names."""
        if args or kwargs:  # copies are created without
            arguments.constructed(cls, args, kwargs)
        return super().__new__(cls)

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
            use_running_average: the mode of this call; overrides that of the layer.
            mask: bool, broadcastable to `x`: only True positions enter the statistics.
            bank: for a layer with `banks`: the name or number of a bank, or an int32 array of shape
                (N,), one for each example.
            scale: one for each example, (N, C) or broadcastable: multiplied after the learned scale
                and bias.
            bias: one for each example, likewise: added last.

        Returns:
            The normalized input, with x's shape.

        Raises:
            ValueError: wrong rank, axis or number of channels, no mode in the layer or the call,
                removed statistics, or, in PyTorch's convention, one value per channel in training.
            TypeError: a mask that is not boolean, or, in PyTorch's convention, integer input.
        """
        with conventions.naming(self, functools.partial(_place, self)):
            given = {"mask": mask, "bank": bank, "scale": scale, "bias": bias}
            at_call = use_running_average
            running = self.use_running_average if at_call is None else at_call
            return _normalize(self, jnp.asarray(x), running, given)

    def set_view(self, use_running_average: bool | None = None) -> None:
        """Set the mode of a view of the layer; `nnx.view` calls it.

        Args:
          use_running_average: normalize with the running statistics instead of the batch's.
        """  # Indented by two, as `nnx.view_info` reads it.
        if use_running_average is not None:
            self.use_running_average = use_running_average


def _place(layer: Any) -> str:
    """Where the layer is in the outermost model being called, or its size if there is none."""
    frame, models = sys._getframe(), []
    while frame is not None:
        models += [value for value in (*frame.f_locals.values(),) if isinstance(value, nnx.Module)]
        frame = frame.f_back
    for model in reversed(models):
        for path, module in nnx.iter_modules(model):
            if module is layer and path:
                return f"at {checks.where([str(key) for key in path])}"
    return f"of {layer.num_features} features"


_Layer.__call__ = arguments.checked(_Layer.__call__, _place)


def _make_variables(layer: Any, rngs: nnx.Rngs, **makers: tuple[Initializer, Any]) -> None:
    """Check a layer and create its variables; those that it does not use are None, as in Flax."""
    conventions.check(layer)
    stats = conventions.first_statistics(layer, (layer.num_features,), layer.param_dtype)
    made: dict[str, nnx.Variable | None] = {"mean": None, "var": None}
    made |= {name: nnx.BatchStat(value) for name, value in stats.items()}
    for name, (make, metadata) in makers.items():
        made[name] = None
        if name in conventions.parameters(layer):
            shape = conventions.parameter_shape(layer, name, (layer.num_features,))
            made[name] = nnx.Param(make(rngs.params(), shape, layer.param_dtype), **metadata)
    for name in conventions.parameters(layer):
        if name not in made:  # what each bank adds to the shared ones
            shape = conventions.parameter_shape(layer, name, (layer.num_features,))
            made[name] = nnx.Param(jnp.zeros(shape, layer.param_dtype))
    for name, variable in made.items():
        setattr(layer, name, nnx.data(variable))


def _static(banks: Any) -> Any:
    """Names as a tuple, since nnx would treat a list as data."""
    return tuple(banks) if isinstance(banks, list) else banks


def _normalize(layer: Any, x: jax.Array, running: bool | None, given: dict[str, Any]) -> jax.Array:
    """Normalize x with the variables of the layer, and update them in training."""
    conventions.check_input(layer, x, any_rank="bnjax.nnx.BatchNorm")
    checks.given(running)
    checks.static("use_running_average", running)
    names = conventions.statistics(layer)
    torch = conventions.is_torch(layer)
    if names and not running:
        modes.check_bridge(drop_in=not torch)
    params, stats = (
        {name: held for name in group if (held := getattr(layer, name, None)) is not None}
        for group in (conventions.parameters(layer), names)
    )
    checks.present(names, stats)
    stats |= {name: getattr(layer, name) for name in conventions.with_kept((), vars(layer))}
    settings: dict[str, Any] = {"dtype": layer.dtype, **given}
    if not torch:
        settings["dtype"] = _output_dtype(layer, x, {**params, **stats})
    params, values = (
        {name: held[...] for name, held in group.items()} for group in (params, stats)
    )
    y, moved = conventions.normalize(layer, params, values, x, mutable=not running, **settings)
    if not running:
        # As in Flax, statistics carry no gradient: a reference can't be written within grad.
        for name, new in lax.stop_gradient(moved).items():
            if new.dtype == values[name].dtype:
                stats[name][...] = new
            else:
                stats[name].set_value(new)
    return y


def _output_dtype(layer: Any, x: jax.Array, held: Mapping[str, nnx.Variable]) -> Dtype:
    """Flax's rule: promote x and the variables together, then x, scale and bias again."""

    def promoted(x: jax.Array, held: Mapping[str, jax.Array]) -> jax.Array:
        arrays = (x, *map(held.get, ("mean", "var", "scale", "bias")))
        x, _, _, scale, bias = layer.promote_dtype(arrays, dtype=layer.dtype)
        return jnp.zeros((), canonicalize_dtype(x, scale, bias, dtype=layer.dtype))

    return jax.eval_shape(promoted, x, {name: each[...] for name, each in held.items()}).dtype


class TorchBatchNorm(_Layer):
    """PyTorch's signature and semantics, for inputs with any number of spatial axes."""

    _spatial: ClassVar[tuple[str, ...]]

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: Momentum = 0.1,
        affine: bool | Literal["own", "both"] = True,
        track_running_stats: bool = True,
        *,
        axis: int = -1,
        use_running_average: bool | None = False,
        axis_name: AxisName | None = None,
        axis_index_groups: Groups | None = None,
        virtual_batch_size: int | None = None,
        using: Policy | None = None,
        banks: int | Sequence[str] | None = None,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        scale_init: Initializer = ones,
        bias_init: Initializer = zeros,
        rngs: nnx.Rngs,
    ) -> None:
        self.num_features = num_features
        self.eps = eps
        self.momentum = momentum
        self.affine = affine
        self.track_running_stats = track_running_stats
        self.axis = axis
        self.use_running_average = use_running_average
        self.axis_name = axis_name
        self.axis_index_groups = axis_index_groups
        self.virtual_batch_size = virtual_batch_size
        self.using = using
        self.banks = _static(banks)
        self.dtype = dtype
        self.param_dtype = param_dtype
        _make_variables(self, rngs, scale=(scale_init, {}), bias=(bias_init, {}))


class BatchNorm1d(TorchBatchNorm):
    """`torch.nn.BatchNorm1d` for (N, C) or (N, L, C); mode and attributes as in `BatchNorm2d`."""

    _spatial = conventions.SPATIAL[1]


class BatchNorm2d(TorchBatchNorm):
    """`torch.nn.BatchNorm2d` for (N, H, W, C): its signature, semantics and results.

    A new layer trains: it normalizes with the batch and updates its running statistics. Call
    `.eval()` on the layer or the whole model to use the running ones, and `.train()` to switch
    back; `nnx.view(model, use_running_average=True)` is a model in eval mode with the same
    variables. After each training call the statistics are at least float32, even if all variables
    were cast to half precision. In a linen model, via `nnx.bridge.ToLinen`, it only trains if
    `batch_stats` is mutable.

    The attributes are those of `bnjax.linen.BatchNorm2d`, except:

    Attributes:
        num_features: number of channels, C; required, since nnx creates variables at construction.
        use_running_average: the mode: True after `.eval()`, False after `.train()`; overridden by
            the argument of a call.
        rngs: keys for the initializers of `scale` and `bias`.

    Guides: examples/guides/conventions.md, examples/guides/running_statistics.md

    >>> layer = BatchNorm2d(3, rngs=nnx.Rngs(0))
    >>> y = layer(jnp.ones((2, 4, 4, 3)))
    >>> [round(v, 4) for v in layer.mean[...].tolist()]  # 0.9 * 0 + 0.1 * 1
    [0.1, 0.1, 0.1]
    """

    _spatial = conventions.SPATIAL[2]


class BatchNorm3d(TorchBatchNorm):
    """`torch.nn.BatchNorm3d` for (N, D, H, W, C); mode and attributes as in `BatchNorm2d`."""

    _spatial = conventions.SPATIAL[3]


class BatchNorm(_Layer):
    """Drop-in for `flax.nnx.BatchNorm`: its signature, variables and output dtype.

    In a model written for Flax's layer, replacing the name changes only the accuracy: statistics
    are exact at any mean, regardless of `use_fast_variance`, and are computed and kept in float32,
    regardless of `dtype`; NaN under a mask affects nothing else; and a batch without finite mean
    and variance updates nothing.

    The attributes are those of `flax.nnx.BatchNorm`, except:

    Attributes:
        momentum: weight of the old statistics (Flax's convention: one minus PyTorch's).
        axis_name: name of a mapped axis, or several, over whose devices statistics are pooled,
            weighted by count, where Flax averages the devices' means.
        use_fast_variance: accepted for compatibility; the variance is always fast and exact.
        promote_dtype: only affects the dtype of the output.
        using: bnjax only, as for `BatchNorm2d`.
        banks: bnjax only, as for `BatchNorm2d`; then `use_bias` and `use_scale` may be "own" or
            "both".

    Guide: examples/guides/conventions.md
    """

    def __init__(
        self,
        num_features: int,
        *,
        use_running_average: bool | None = False,
        axis: Axes = -1,
        momentum: Momentum = 0.99,
        epsilon: float = 1e-5,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        use_bias: bool | Literal["own", "both"] = True,
        use_scale: bool | Literal["own", "both"] = True,
        bias_init: Initializer = zeros,
        scale_init: Initializer = ones,
        axis_name: AxisName | None = None,
        axis_index_groups: Any = None,
        use_fast_variance: bool = True,
        promote_dtype: PromoteDtypeFn = promote_dtype,
        rngs: nnx.Rngs,
        bias_metadata: Mapping[str, Any] = types.MappingProxyType({}),
        scale_metadata: Mapping[str, Any] = types.MappingProxyType({}),
        using: Policy | None = None,
        banks: int | Sequence[str] | None = None,
    ) -> None:
        self.num_features = num_features
        self.use_running_average = use_running_average
        self.axis = axis
        self.momentum = momentum
        self.epsilon = epsilon
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.use_bias = use_bias
        self.use_scale = use_scale
        self.axis_name = axis_name
        self.axis_index_groups = axis_index_groups
        self.use_fast_variance = use_fast_variance
        self.promote_dtype = promote_dtype
        self.using = using
        self.banks = _static(banks)
        scale, bias = (scale_init, scale_metadata), (bias_init, bias_metadata)
        _make_variables(self, rngs, scale=scale, bias=bias)
