"""Helpers to make mistakes, and the texts of the errors that they raise."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

import bnjax

KEY = jax.random.key(0)
PARAMS, STATS = bnjax.init(3)
NC, NHWC = jnp.ones((4, 3)), jnp.ones((2, 5, 4, 3))
VARIABLES = {"params": PARAMS, "batch_stats": STATS}
FLAX = bnjax.linen.BatchNorm


class Mistake(NamedTuple):
    """A call, and the error that it raises."""

    name: str
    call: Callable[[], Any]
    message: str
    error: type[Exception] = ValueError


# Nothing below computes values: errors are raised when a layer is built or a call is traced.


def untyped(value: Any) -> Any:
    """A value that a type checker would reject."""
    return value


def core(params: Any = PARAMS, batch_stats: Any = STATS, x: Any = NC, **settings: Any):
    settings = {"mutable": True, **settings}
    return lambda: jax.eval_shape(
        lambda *arrays: bnjax.batch_norm(*arrays, **settings), params, batch_stats, x
    )


def init(layer: nn.Module, x: jax.Array = NHWC):
    return lambda: jax.eval_shape(layer.init, KEY, x)


def apply(layer: nn.Module, x: jax.Array = NC, variables: Any = VARIABLES, **arguments: Any):
    return lambda: jax.eval_shape(lambda *arrays: layer.apply(*arrays, **arguments), variables, x)


def train(layer: nn.Module, x: jax.Array = NC, **arguments: Any):
    return apply(layer, x, mutable=["batch_stats"], **arguments)


TOP = "\nIn {} at the top of the model."
RANGE = (
    "`momentum` must lie between 0 and 1, got {}. In PyTorch's convention it is the weight of the "
    "new batch (0.1), in Flax's the weight of the old statistics (0.9)."
)
TEXT = "`momentum` must be a number, a function of the number of steps, None or 'pooled', got {}."
NEGATIVE = "`{}` must be a number and not negative, got {}. The usual value is 1e-5."
ZERO = (
    "`eps` must be positive in training, got {}: a channel of zero variance would give NaN. "
    "The usual value is 1e-5."
)
AXIS = (
    "`axis` must lie between -{0} and {1} for an input of {0} dimensions, got {2}. It names the "
    "channel axis: -1 for channels last, 1 for NCHW."
)
SINGLE = (
    "Expected more than 1 value per channel when training, got input shape {}. Use a larger batch, "
    "drop the last partial batch, or normalize with the running statistics (mutable=False, "
    "or .eval() in nnx)."
)
MASK = "`mask` must broadcast to the input of shape {}, got shape {}. "
ONES = "Give it the rank of the input, with size 1 where it does not vary."
REAL = "`x` must be real floating point, got {}. Convert it first, as in `x.astype(jnp.float32)`."
CHANNELS = "`num_features` is {}, but axis {} of the input of shape {} has {} channels. "
SHAPES = (
    "`{}` must hold arrays of shape {}, one entry for each channel of the input, got {}. Was it "
    "made for another `num_features`, or is `axis` wrong?"
)
PARAM_KEYS = (
    "`params` must have the keys {{scale, bias}} or {{scale}} or {{bias}} or {{}}, got {}. "
)
STAT_KEYS = (
    "`batch_stats` must have the keys {{mean, var}} or {{mean, var, count}} or {{}}, got {}. "
)
MADE = "bnjax.init makes it."
NUM_FEATURES = (
    "`num_features` must be an integer and not negative, got {}. It is the number of channels, "
    "such as 64."
)
COUNT = (
    "`count` is the number of training steps so far: momentum=None averages over as many batches, "
    "and schedules and limits are functions of it. Add it to each layer, such as {'mean': mean, "
    "'var': var, 'count': jnp.array(1000)}."
)
MISSES = (
    "The batch norm at {} misses {} in `{}`: it has {}. Pass the collection as "
    "`model.init` made it or training updated it, as in "
    "`model.apply({{'params': params, 'batch_stats': batch_stats}}, x)`."
)
IMMUTABLE = (
    "The batch norm at {} was asked to train (use_running_average=False), but its `batch_stats` "
    "are immutable. To train, call `y, updates = model.apply(variables, x, "
    "mutable=['batch_stats'])`; to evaluate, pass use_running_average=True."
)
RESHAPE = "Reshape the input; bnjax.linen.BatchNorm takes any rank."
