"""Flax linen layers: PyTorch's `BatchNorm1d/2d/3d`, and a drop-in for `flax.linen.BatchNorm`."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.dtypes import canonicalize_dtype
from flax.typing import Axes, Dtype, Initializer
from jax.nn.initializers import ones, zeros

from bnjax.core import checks
from bnjax.core.batch_norm import batch_norm
from bnjax.core.devices import AxisName, Groups
from bnjax.core.moments import working_dtype

_COLLECTION = "batch_stats"
# Between the check and the user: the layer's __post_init__, and two __init__ of dataclasses.
_FRAMES = 4


class _Layer(nn.Module):
    """What both conventions share: the mode, the variables, and one call of the core."""

    def _use_running(self, at_call: bool | None, tracked: bool) -> bool | None:
        """The mode as given to the constructor or the call; None if it was given to neither."""
        at_init: bool | None = getattr(self, "use_running_average", None)
        checks.given_once(at_init, at_call)
        use_running = at_init if at_call is None else at_call
        if use_running is False and tracked:
            checks.mutable_statistics(self.is_mutable_collection(_COLLECTION), self.path)
        return use_running

    def _normalize(
        self,
        x: jax.Array,
        params: Mapping[str, tuple[Initializer, Dtype]],
        statistics: Mapping[str, Callable[[tuple[int, ...]], jax.Array]],
        *,
        running: bool,
        **settings: Any,
    ) -> jax.Array:
        """Normalize x, and move the statistics, if any, unless `running` or initializing."""
        axes = checks.feature_axes(settings["axis"], x.ndim)
        shape = tuple(x.shape[a] for a in axes)
        for collection, expected in (("params", params), (_COLLECTION, statistics)):
            held = self.variables.get(collection, {})
            if not self.is_initializing() and (held or not self.is_mutable_collection(collection)):
                checks.held(collection, held, expected, self.path)
        stats = {
            name: self.variable(_COLLECTION, name, make, shape) for name, make in statistics.items()
        }
        affine = {
            name: self.param(name, init, shape, dtype) for name, (init, dtype) in params.items()
        }
        values = {name: stat.value for name, stat in stats.items()}
        if self.is_initializing() and running and not values:
            values = {"mean": jnp.zeros(shape), "var": jnp.ones(shape), "count": jnp.array(0)}
        try:
            y, moved = batch_norm(affine, values, x, mutable=not running, **settings)
        except (TypeError, ValueError) as error:
            error.add_note(f"In {type(self).__name__} at {checks.where(self.path)}.")
            raise
        if not running and not self.is_initializing():
            for name, stat in stats.items():
                # As in Flax, the mean of complex input is complex.
                same = jnp.iscomplexobj(moved[name]) or moved[name].dtype == stat.value.dtype
                stat.value = moved[name] if same else moved[name].astype(stat.value.dtype)
        return y


class TorchBatchNorm(_Layer):
    """PyTorch's signature and meaning, for inputs of any number of spatial axes."""

    num_features: int | None = None
    eps: float = 1e-5
    momentum: float | None = 0.1
    affine: bool = True
    track_running_stats: bool = True
    _: dataclasses.KW_ONLY
    axis: int = -1
    use_running_average: bool | None = None
    axis_name: AxisName | None = None
    axis_index_groups: Groups | None = None
    virtual_batch_size: int | None = None
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    scale_init: Initializer = ones
    bias_init: Initializer = zeros

    _spatial: ClassVar[tuple[str, ...]]

    def __post_init__(self) -> None:  # noqa: D105 - flax's name, not ours
        checks.momentum(self.momentum)
        checks.eps(self.eps, training=False)
        checks.torch_momentum_is_plausible(self.momentum, _FRAMES)
        super().__post_init__()

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
    ) -> jax.Array:
        """Normalize `x` per channel.

        Args:
            x: real floating point input of the rank the layer is named for.
            use_running_average: as the attribute; give it here or there.
            mask: bool, broadcastable to `x`: statistics are over the True positions only.

        Returns:
            The normalized input, of x's shape, and of x's dtype unless `dtype` says otherwise.

        Raises:
            ValueError: a wrong rank or channel count, one value per channel in training, missing
                statistics, or `use_running_average=False` with immutable ones.
            TypeError: an integer or complex input.
        """
        x = jnp.asarray(x)
        layer, any_rank = type(self).__name__, "bnjax.linen.BatchNorm"
        checks.torch_input(x, self._spatial, self.axis, self.num_features, layer, any_rank)
        running = self._use_running(use_running_average, self.track_running_stats)
        if running is None or self.is_initializing():
            running = self.is_initializing() or not self.is_mutable_collection(_COLLECTION)
        kept = working_dtype(self.param_dtype)
        statistics: dict[str, Callable] = {}
        if self.track_running_stats:
            statistics = {"mean": lambda s: jnp.zeros(s, kept), "var": lambda s: jnp.ones(s, kept)}
            if self.momentum is None:
                statistics["count"] = lambda _: jnp.zeros((), jnp.int32)
        inits = {"scale": self.scale_init, "bias": self.bias_init} if self.affine else {}
        return self._normalize(
            x,
            {name: (init, self.param_dtype) for name, init in inits.items()},
            statistics,
            running=running,
            axis=self.axis,
            eps=self.eps,
            momentum=self.momentum,
            mask=mask,
            axis_name=None if self.is_initializing() else self.axis_name,
            axis_index_groups=None if self.is_initializing() else self.axis_index_groups,
            virtual_batch_size=self.virtual_batch_size,
            dtype=self.dtype,
        )


class BatchNorm1d(TorchBatchNorm):
    """`torch.nn.BatchNorm1d`, of (N, C) or (N, L, C); mode and attributes as in `BatchNorm2d`."""

    _spatial = ("", "L")


class BatchNorm2d(TorchBatchNorm):
    """`torch.nn.BatchNorm2d`, of (N, H, W, C): its signature, meaning and results.

    Whether it trains is Flax's own `mutable` flag: with a mutable `batch_stats` collection it
    normalizes with the batch and moves the running statistics, otherwise with the running ones.
    While a model is initialized it uses mean 0 and variance 1 and moves nothing.

    Attributes:
        num_features: number of channels, C; None takes it from the first input.
        eps: added to the variance.
        momentum: weight of the new batch in the running statistics (PyTorch's convention: one
            minus Flax's); None for the cumulative average over all batches.
        affine: learn `scale` and `bias`, in the collection `params`.
        track_running_stats: keep `mean` and `var` in `batch_stats`. Without them each batch is
            normalized by its own statistics, in evaluation too.
        axis: the channel axis: -1 for channels last, 1 for NCHW.
        use_running_average: None follows the `mutable` flag; True freezes the layer: it uses its
            running statistics, and they stay, in training too; False requires mutable statistics.
        axis_name: name of a mapped axis, or several: statistics of all its devices together.
        axis_index_groups: lists of indices of that axis: statistics pooled within each.
        virtual_batch_size: groups of this many examples, each normalized by itself in training.
        dtype: dtype of the output; that of the input if None.
        param_dtype: dtype of `scale` and `bias`; the statistics are float32 at least.
        scale_init: initializer of `scale`.
        bias_init: initializer of `bias`.
    """

    _spatial = ("HW",)


class BatchNorm3d(TorchBatchNorm):
    """`torch.nn.BatchNorm3d`, of (N, D, H, W, C); mode and attributes as in `BatchNorm2d`."""

    _spatial = ("DHW",)


class BatchNorm(_Layer):
    """Drop-in for `flax.linen.BatchNorm`: its fields, defaults, variables and output dtype.

    In a model written for Flax's layer, replacing the name changes nothing but the accuracy: the
    statistics are exact at any mean, whatever `use_fast_variance` and `force_float32_reductions`
    say, NaN under a mask stays there, and a batch without a finite mean and variance moves nothing.

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
        force_float32_reductions: False keeps the running statistics in `param_dtype`; the batch
            statistics are taken in float32 at least all the same.
        virtual_batch_size: bnjax's own: groups of this many examples, each normalized by itself.
    """

    use_running_average: bool | None = None
    axis: Axes = -1
    momentum: float = 0.99
    epsilon: float = 1e-5
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Initializer = zeros
    scale_init: Initializer = ones
    axis_name: AxisName | None = None
    axis_index_groups: Any = None
    use_fast_variance: bool = True
    force_float32_reductions: bool = True
    _: dataclasses.KW_ONLY
    virtual_batch_size: int | None = None

    def __post_init__(self) -> None:  # noqa: D105 - flax's name, not ours
        checks.momentum(self.momentum)
        checks.eps(self.epsilon, training=False, name="epsilon")
        checks.flax_momentum_is_plausible(self.momentum, _FRAMES)
        super().__post_init__()

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
    ) -> jax.Array:
        """Normalize `x` per feature.

        Args:
            x: the input, of any rank and dtype.
            use_running_average: as the attribute; give it here or there.
            mask: broadcastable to `x`: statistics are over the positions that are not zero.

        Returns:
            The normalized input, of x's shape.

        Raises:
            ValueError: `use_running_average` given twice or not at all, a wrong axis, or
                `use_running_average=False` with immutable statistics.
        """
        x = jnp.asarray(x)
        running = self._use_running(use_running_average, not self.is_initializing())
        checks.given(running)
        inits = {"scale": self.scale_init} if self.use_scale else {}
        if self.use_bias:
            inits["bias"] = self.bias_init
        kept = jnp.float32 if self.force_float32_reductions else self.param_dtype
        return self._normalize(
            x,
            {name: (init, self.param_dtype) for name, init in inits.items()},
            {"mean": lambda s: jnp.zeros(s, kept), "var": lambda s: jnp.ones(s, kept)},
            running=bool(running),
            axis=self.axis,
            eps=self.epsilon,
            momentum=1 - self.momentum,
            correction=0,
            mask=None if mask is None else jnp.asarray(mask, bool),
            axis_name=None if self.is_initializing() else self.axis_name,
            axis_index_groups=None if self.is_initializing() else self.axis_index_groups,
            virtual_batch_size=self.virtual_batch_size,
            dtype=canonicalize_dtype(
                x, *(jnp.zeros((), self.param_dtype) for _ in inits), dtype=self.dtype
            ),
        )
