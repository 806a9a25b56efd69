"""Class-conditional batch norm: a scale and a bias for each class (Dumoulin et al. 2017)."""

import dataclasses
from typing import Any, ClassVar

import chex
import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx
from flax.typing import Dtype, Initializer
from jax.nn.initializers import ones, zeros

from bnjax.core import checks
from bnjax.core.devices import AxisName, Groups
from bnjax.core.policies import Policy
from bnjax.core.settings import Momentum
from bnjax.layers import linen as linen_layers
from bnjax.layers import nnx as nnx_layers


def _of_classes(
    scale: jax.Array, bias: jax.Array, classes: chex.Array, x: chex.Array, axis: int
) -> dict[str, jax.Array]:
    """The scale and bias of each example, looked up by class."""
    batch = 1 if axis in (0, -jnp.ndim(x)) else 0
    classes = checks.classes(classes, jnp.shape(x)[batch], len(scale))
    return {"scale": jnp.take(scale, classes, 0), "bias": jnp.take(bias, classes, 0)}


class _Conditional(nn.Module):
    """A batch norm without scale and bias, followed by those of each example's class."""

    num_features: int
    num_classes: int
    eps: float = 1e-5
    momentum: Momentum = 0.1
    track_running_stats: bool = True
    _: dataclasses.KW_ONLY
    axis: int = -1
    use_running_average: bool | None = None
    axis_name: AxisName | None = None
    axis_index_groups: Groups | None = None
    virtual_batch_size: int | None = None
    using: Policy | None = None
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    scale_init: Initializer = ones
    bias_init: Initializer = zeros

    _norm: ClassVar[Any]

    @nn.compact
    def __call__(
        self,
        x: chex.Array,
        classes: chex.Array,
        use_running_average: bool | None = None,
        *,
        mask: chex.Array | None = None,
    ) -> jax.Array:
        """Normalize `x` per channel; scale and shift each example by its class.

        Args:
            x: input of shape (N, ..., C).
            classes: the class of each example, integers of shape (N,). If a traced one is out of
                range, its output is NaN.
            use_running_average: as for `BatchNorm2d`.
            mask: as for `BatchNorm2d`.

        Raises:
            ValueError: `classes` have the wrong shape or are out of range.
            TypeError: `classes` are not integers.
        """
        shape = self.num_classes, self.num_features
        scale = self.param("scale", self.scale_init, shape, self.param_dtype)
        bias = self.param("bias", self.bias_init, shape, self.param_dtype)
        shared = [field.name for field in dataclasses.fields(self._norm)]
        mine = {field.name for field in dataclasses.fields(self)} - {"scale_init", "bias_init"}
        settings = {name: getattr(self, name) for name in shared if name in mine}
        norm = self._norm(**{**settings, "affine": False, "name": "norm", "parent": self})
        given = _of_classes(scale, bias, classes, x, self.axis)
        return norm(x, use_running_average, mask=mask, **given)


class ConditionalBatchNorm1d(_Conditional):
    """Class-conditional batch norm of (N, C) or (N, L, C), as `ConditionalBatchNorm2d`."""

    _norm = linen_layers.BatchNorm1d


class ConditionalBatchNorm2d(_Conditional):
    """Class-conditional batch norm of (N, H, W, C): all classes share statistics.

    `y = (x - mean) / sqrt(var + eps) * scale[class] + bias[class]` (Dumoulin et al. 2017; the
    generators of SNGAN and BigGAN): `torch.nn.BatchNorm2d(affine=False)` times an embedding. For
    scales and biases that come from elsewhere, as in FiLM, pass them to a `BatchNorm2d`:
    `norm(x, scale=g, bias=b)`.

    Guide: examples/guides/banks.md

    Attributes: those of `BatchNorm2d` except `affine` and `banks`, and:
        num_classes: number of classes. `params` are a `scale` (ones) and a `bias` (zeros) of shape
            (num_classes, C); the submodule `norm` holds the statistics.

    >>> layer = ConditionalBatchNorm2d(3, num_classes=10)
    >>> x, classes = jnp.ones((2, 4, 4, 3)), jnp.array([7, 1])
    >>> variables = layer.init(jax.random.key(0), x, classes)
    >>> y, updates = layer.apply(variables, x, classes, mutable=["batch_stats"])
    """

    _norm = linen_layers.BatchNorm2d


class ConditionalBatchNorm3d(_Conditional):
    """Class-conditional batch norm of (N, D, H, W, C), as `ConditionalBatchNorm2d`."""

    _norm = linen_layers.BatchNorm3d


class _NNXConditional(nnx.Module):
    """A batch norm without scale and bias, followed by those of each example's class."""

    _norm: ClassVar[Any]

    def __init__(
        self,
        num_features: int,
        num_classes: int,
        eps: float = 1e-5,
        momentum: Momentum = 0.1,
        track_running_stats: bool = True,
        *,
        param_dtype: Dtype = jnp.float32,
        scale_init: Initializer = ones,
        bias_init: Initializer = zeros,
        rngs: nnx.Rngs,
        **settings: Any,
    ) -> None:
        self.norm = self._norm(
            num_features,
            eps,
            momentum,
            False,
            track_running_stats,
            param_dtype=param_dtype,
            rngs=rngs,
            **settings,
        )
        shape = num_classes, num_features
        self.scale = nnx.Param(scale_init(rngs.params(), shape, param_dtype))
        self.bias = nnx.Param(bias_init(rngs.params(), shape, param_dtype))

    def __call__(
        self,
        x: chex.Array,
        classes: chex.Array,
        use_running_average: bool | None = None,
        *,
        mask: chex.Array | None = None,
    ) -> jax.Array:
        """Normalize `x` per channel; scale and shift each example by its class.

        Args: as for `bnjax.ConditionalBatchNorm2d`; `use_running_average` overrides that of `norm`.
        """
        given = _of_classes(self.scale[...], self.bias[...], classes, x, self.norm.axis)
        return self.norm(x, use_running_average, mask=mask, **given)


class NNXConditionalBatchNorm1d(_NNXConditional):
    """Class-conditional batch norm of (N, C) or (N, L, C), as `ConditionalBatchNorm2d`."""

    _norm = nnx_layers.BatchNorm1d


class NNXConditionalBatchNorm2d(_NNXConditional):
    """Class-conditional batch norm of (N, H, W, C): `bnjax.ConditionalBatchNorm2d` for nnx.

    Args: those of `bnjax.nnx.BatchNorm2d` except `affine` and `banks`, and `num_classes`.
    """

    _norm = nnx_layers.BatchNorm2d


class NNXConditionalBatchNorm3d(_NNXConditional):
    """Class-conditional batch norm of (N, D, H, W, C), as `ConditionalBatchNorm2d`."""

    _norm = nnx_layers.BatchNorm3d


for _kind in (NNXConditionalBatchNorm1d, NNXConditionalBatchNorm2d, NNXConditionalBatchNorm3d):
    _kind.__name__ = _kind.__qualname__ = _kind.__name__.removeprefix("NNX")
