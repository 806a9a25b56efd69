"""Flax nnx layers: PyTorch's `BatchNorm1d/2d/3d`, a drop-in for `flax.nnx.BatchNorm`."""

import types
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import canonicalize_dtype, promote_dtype
from flax.typing import Axes, Dtype, Initializer, PromoteDtypeFn
from jax import lax
from jax.nn.initializers import ones, zeros

from bnjax.core import checks
from bnjax.core.batch_norm import batch_norm, init
from bnjax.core.devices import AxisName, Groups

# Between the check and the user: the layer's __init__, and three of nnx's metaclass.
_FRAMES = 5


class _Layer(nnx.Module):
    """What both conventions share: the variables, the mode, and one call of the core."""

    num_features: int
    axis: Any
    use_running_average: bool | None
    axis_name: AxisName | None
    axis_index_groups: Any

    def _own(
        self,
        statistics: Mapping[str, jax.Array],
        params: Mapping[str, tuple[bool, Initializer, Mapping[str, Any]]],
        param_dtype: Dtype,
        rngs: nnx.Rngs,
    ) -> None:
        """Make the variables; those that the layer does without are None, as in Flax."""
        for name in dict.fromkeys(("mean", "var", *statistics)):
            value = statistics.get(name)
            setattr(self, name, nnx.data(None if value is None else nnx.BatchStat(value)))
        for name, (used, make, metadata) in params.items():
            param = None
            if used:
                value = make(rngs.params(), (self.num_features,), param_dtype)
                param = nnx.Param(value, **metadata)
            setattr(self, name, nnx.data(param))

    def _held(self, *names: str) -> dict[str, nnx.Variable]:
        return {
            name: getattr(self, name) for name in names if getattr(self, name, None) is not None
        }

    def _settings(self, x: jax.Array) -> dict[str, Any]:
        raise NotImplementedError

    def __call__(
        self,
        x: jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
    ) -> jax.Array:
        """Normalize `x` per channel, and move the running statistics unless they are used.

        Args:
            x: real floating point input of the rank that a 1d, 2d or 3d layer is named for; any
                rank and dtype for `BatchNorm`.
            use_running_average: the mode of this call; it wins over that of the layer.
            mask: bool, broadcastable to `x`: statistics are over the True positions only.

        Returns:
            The normalized input, of x's shape.

        Raises:
            ValueError: a wrong rank, axis or channel count, a mode of None in the layer and in the
                call, or, in PyTorch's convention, one value per channel in training.
            TypeError: a mask that is not boolean, or, in PyTorch's convention, integer input.
        """
        x = jnp.asarray(x)
        running = self.use_running_average if use_running_average is None else use_running_average
        checks.given(running)
        stats = self._held("mean", "var", "count")
        params = {name: param[...] for name, param in self._held("scale", "bias").items()}
        values = {name: stat[...] for name, stat in stats.items()}
        settings = {
            "axis": self.axis,
            "mask": mask,
            "axis_name": self.axis_name,
            "axis_index_groups": self.axis_index_groups,
            **self._settings(x),
        }
        try:
            y, moved = batch_norm(params, values, x, mutable=not running, **settings)
        except (TypeError, ValueError) as error:
            what = f"{type(self).__name__} of {self.num_features} features"
            error.add_note(f"In {what}, where `mutable` is False after .eval().")
            raise
        if not running:
            # As in Flax, no derivative of a statistic: a reference can't be written within grad.
            for name, stat in stats.items():
                stat[...] = lax.stop_gradient(moved[name].astype(values[name].dtype))
        return y

    def set_view(self, use_running_average: bool | None = None) -> None:
        """Set the mode of a view of the layer; `nnx.view` calls it.

        Args:
          use_running_average: normalize with the running statistics instead of the batch's.
        """  # Indented by two, as `nnx.view_info` reads it.
        if use_running_average is not None:
            self.use_running_average = use_running_average


class TorchBatchNorm(_Layer):
    """PyTorch's signature and meaning, for inputs of any number of spatial axes."""

    _spatial: ClassVar[tuple[str, ...]]

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        axis: int = -1,
        use_running_average: bool | None = False,
        axis_name: AxisName | None = None,
        axis_index_groups: Groups | None = None,
        virtual_batch_size: int | None = None,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        scale_init: Initializer = ones,
        bias_init: Initializer = zeros,
        rngs: nnx.Rngs,
    ) -> None:
        checks.momentum(momentum)
        checks.eps(eps, training=False)
        checks.torch_momentum_is_plausible(momentum, _FRAMES)
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
        self.dtype = dtype
        self.param_dtype = param_dtype
        _, statistics = init(
            num_features,
            track_running_stats=track_running_stats,
            momentum=momentum,
            dtype=param_dtype,
        )
        params = {"scale": (affine, scale_init, {}), "bias": (affine, bias_init, {})}
        self._own(statistics, params, param_dtype, rngs)

    def _settings(self, x: jax.Array) -> dict[str, Any]:
        layer, any_rank = type(self).__name__, "bnjax.nnx.BatchNorm"
        checks.torch_input(x, self._spatial, self.axis, self.num_features, layer, any_rank)
        return {
            "eps": self.eps,
            "momentum": self.momentum,
            "virtual_batch_size": self.virtual_batch_size,
            "dtype": self.dtype,
        }


class BatchNorm1d(TorchBatchNorm):
    """`torch.nn.BatchNorm1d`, of (N, C) or (N, L, C); mode and attributes as in `BatchNorm2d`."""

    _spatial = ("", "L")


class BatchNorm2d(TorchBatchNorm):
    """`torch.nn.BatchNorm2d`, of (N, H, W, C): its signature, meaning and results.

    A new layer trains: it normalizes with the batch and moves its running statistics. `.eval()`,
    on the layer or on the whole model, makes it use the running ones, `.train()` turns it back, and
    `nnx.view(model, use_running_average=True)` is a model in the other mode on the same variables.

    Attributes: those of `bnjax.linen.BatchNorm2d`, with these words to add:
        num_features: number of channels, C; nnx makes a layer before it sees an input.
        use_running_average: the mode: True after `.eval()`, False after `.train()`; the argument of
            a call wins over it.
        rngs: where the initializers of `scale` and `bias` get their keys.

    >>> layer = BatchNorm2d(3, rngs=nnx.Rngs(0))
    >>> y = layer(jnp.ones((2, 4, 4, 3)))
    >>> [round(v, 4) for v in layer.mean[...].tolist()]  # 0.9 * 0 + 0.1 * 1
    [0.1, 0.1, 0.1]
    """

    _spatial = ("HW",)


class BatchNorm3d(TorchBatchNorm):
    """`torch.nn.BatchNorm3d`, of (N, D, H, W, C); mode and attributes as in `BatchNorm2d`."""

    _spatial = ("DHW",)


class BatchNorm(_Layer):
    """Drop-in for `flax.nnx.BatchNorm`: its signature, variables and output dtype.

    In a model written for Flax's layer, replacing the name changes nothing but the accuracy: the
    statistics are exact at any mean, whatever `use_fast_variance` says, and are taken and kept in
    float32 whatever `dtype` says; NaN under a mask stays there, and a batch without a finite mean
    and variance moves nothing.

    Attributes: those of `flax.nnx.BatchNorm`, with these words to add:
        momentum: weight of the old statistics (Flax's convention: one minus PyTorch's).
        axis_name: statistics of all devices of the axis together, by count, where Flax averages the
            devices' means.
        use_fast_variance: accepted, and without effect: the variance is both fast and exact.
        promote_dtype: takes part in the dtype of the output, and in nothing else.
    """

    def __init__(
        self,
        num_features: int,
        *,
        use_running_average: bool | None = False,
        axis: Axes = -1,
        momentum: float = 0.99,
        epsilon: float = 1e-5,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Initializer = zeros,
        scale_init: Initializer = ones,
        axis_name: AxisName | None = None,
        axis_index_groups: Any = None,
        use_fast_variance: bool = True,
        promote_dtype: PromoteDtypeFn = promote_dtype,
        rngs: nnx.Rngs,
        bias_metadata: Mapping[str, Any] = types.MappingProxyType({}),
        scale_metadata: Mapping[str, Any] = types.MappingProxyType({}),
    ) -> None:
        checks.momentum(momentum)
        checks.eps(epsilon, training=False, name="epsilon")
        checks.flax_momentum_is_plausible(momentum, _FRAMES)
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
        params = {
            "scale": (use_scale, scale_init, scale_metadata),
            "bias": (use_bias, bias_init, bias_metadata),
        }
        self._own(init(num_features)[1], params, param_dtype, rngs)

    def _settings(self, x: jax.Array) -> dict[str, Any]:
        return {
            "eps": self.epsilon,
            "momentum": 1 - self.momentum,
            "correction": 0,
            "dtype": self._output_dtype(x),
        }

    def _output_dtype(self, x: jax.Array) -> Dtype:
        """Flax's rule: x and the variables are promoted together, then x, scale and bias again."""
        held = {name: variable[...] for name, variable in self._held(*_FLAXS).items()}

        def promoted(x: jax.Array, held: dict[str, jax.Array]) -> jax.Array:
            arrays = (x, *map(held.get, _FLAXS))
            x, _, _, scale, bias = self.promote_dtype(arrays, dtype=self.dtype)
            return jnp.zeros((), canonicalize_dtype(x, scale, bias, dtype=self.dtype))

        return jax.eval_shape(promoted, x, held).dtype


_FLAXS = ("mean", "var", "scale", "bias")
