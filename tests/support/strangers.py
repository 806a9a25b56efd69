"""Other people's batch norms and models, and their arguments for `bnjax.register`."""

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx

CONFIG = SimpleNamespace(momentum=0.9, epsilon=1e-3)


def kept(layer: nn.Module, size: int) -> tuple[nn.Variable, nn.Variable]:
    """The running statistics of a linen layer."""
    mean = layer.variable("batch_stats", "mean", jnp.zeros, (size,))
    return mean, layer.variable("batch_stats", "var", jnp.ones, (size,))


class Copied(nn.Module):
    """A copy of Flax's, as found in many repositories."""

    use_running_average: bool | None = None
    axis: int = -1
    momentum: float = 0.9
    epsilon: float = 1e-5
    use_bias: bool = True
    use_scale: bool = True
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, use_running_average: bool | None = None):
        running = nn.merge_param(
            "use_running_average", self.use_running_average, use_running_average
        )
        ra_mean, ra_var = kept(self, x.shape[-1])
        mean, var = ra_mean.value, ra_var.value
        if not running:
            axes = tuple(range(x.ndim - 1))
            mean, mean2 = x.mean(axes), (x**2).mean(axes)
            if self.axis_name is not None and not self.is_initializing():
                mean, mean2 = jax.lax.pmean((mean, mean2), self.axis_name)
            var = mean2 - mean**2
            if not self.is_initializing():
                ra_mean.value = self.momentum * ra_mean.value + (1 - self.momentum) * mean
                ra_var.value = self.momentum * ra_var.value + (1 - self.momentum) * var
        y = (x - mean) * jax.lax.rsqrt(var + self.epsilon)
        y *= self.param("scale", nn.initializers.ones, x.shape[-1:]) if self.use_scale else 1
        return y + (self.param("bias", nn.initializers.zeros, x.shape[-1:]) if self.use_bias else 0)


class Masked(nn.Module):
    """Takes the length of each example, and returns it as well."""

    decay: float = 0.9
    eps: float = 1e-5

    @nn.compact
    def __call__(self, x, training, lengths=None):
        fresh = not self.has_variable("batch_stats", "mean")
        ra_mean, ra_var = kept(self, x.shape[-1])
        mean, var = ra_mean.value, ra_var.value
        if training:
            seen = None if lengths is None else within(lengths, x)
            mean, var = x.mean((0, 1), where=seen), x.var((0, 1), where=seen)
            if not fresh:
                ra_mean.value = self.decay * ra_mean.value + (1 - self.decay) * mean
                ra_var.value = self.decay * ra_var.value + (1 - self.decay) * var
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
        return (x - mean) / jnp.sqrt(var + self.eps) * scale + bias, lengths


def within(lengths: Any, x: Any) -> jax.Array:
    """The positions of each example that are not padding."""
    return (jnp.arange(x.shape[1]) < jnp.asarray(lengths)[:, None])[..., None]


class Configured(nn.Module):
    """Has a config, paddings, two flags, a scale around zero, and statistics with all axes."""

    config: Any

    def setup(self):
        self.ra_mean = self.variable("batch_stats", "mean", jnp.zeros, 4)
        self.ra_var = self.variable("batch_stats", "var", jnp.ones, 4)
        self.gamma = self.param("scale", nn.initializers.zeros, (4,))
        self.beta = self.param("bias", nn.initializers.zeros, (4,))

    def __call__(self, inputs, input_paddings, update_batch_norm, use_running_average_bn):
        padding, momentum = input_paddings[..., None], self.config.momentum
        mean, var = self.ra_mean.value, self.ra_var.value
        if not use_running_average_bn:
            seen = 1.0 - padding
            count = jnp.maximum((jnp.ones_like(inputs) * seen).sum((0, 1), keepdims=True), 1)
            mean = (inputs * seen).sum((0, 1), keepdims=True) / count
            var = ((inputs - mean) ** 2 * seen).sum((0, 1), keepdims=True) / count
            if update_batch_norm:
                self.ra_mean.value = momentum * self.ra_mean.value + (1 - momentum) * mean
                self.ra_var.value = momentum * self.ra_var.value + (1 - momentum) * var
        y = (inputs - mean) * (1 + self.gamma) / jnp.sqrt(var + self.config.epsilon) + self.beta
        return y * (1.0 - padding)


class Renorm(nn.Module):
    """Keeps more than a mean and a variance."""

    momentum: float = 0.9

    @nn.compact
    def __call__(self, x, use_running_average):
        ra_mean, ra_var = kept(self, x.shape[-1])
        steps = self.variable("batch_stats", "steps", jnp.zeros, ())
        mean, var = ra_mean.value, ra_var.value
        if not use_running_average:
            mean, var = x.mean((0, 1)), x.var((0, 1))
            if not self.is_initializing():
                ra_mean.value = self.momentum * ra_mean.value + (1 - self.momentum) * mean
                ra_var.value = self.momentum * ra_var.value + (1 - self.momentum) * var
                steps.value += 1
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
        return (x - mean) / jnp.sqrt(var + 1e-5) * scale + bias


class OfNnx(nnx.Module):
    """The common part of the nnx classes."""

    def __init__(self, size: int, momentum: float = 0.9) -> None:
        self.mean, self.var = nnx.BatchStat(jnp.zeros(size)), nnx.BatchStat(jnp.ones(size))
        self.scale, self.bias = nnx.Param(jnp.ones(size)), nnx.Param(jnp.zeros(size))
        self.momentum, self.epsilon, self.training = momentum, 1e-5, True

    def normalized(self, x, train: bool):
        mean, var = self.mean[...], self.var[...]
        if train:
            axes = tuple(range(x.ndim - 1))
            mean, var = x.mean(axes), x.var(axes)
            self.mean[...] = self.momentum * self.mean[...] + (1 - self.momentum) * mean
            self.var[...] = self.momentum * self.var[...] + (1 - self.momentum) * var
        y = (x - mean) * jax.lax.rsqrt(var + self.epsilon)
        return y * self.scale[...] + self.bias[...]


class Switched(OfNnx):
    """Has its mode as an attribute."""

    def __call__(self, x):
        return self.normalized(x, self.training)


class Told(OfNnx):
    """Takes its mode in each call."""

    def __call__(self, x, train):
        return self.normalized(x, train)


class Whitened(nn.Module):
    """Has a scale around zero, and no mask that would prevent folding."""

    momentum: float = 0.9

    @nn.compact
    def __call__(self, x, use_running_average):
        mean, var = (each.value for each in kept(self, x.shape[-1]))
        scale = self.param("scale", nn.initializers.normal(), x.shape[-1:])
        return (x - mean) / jnp.sqrt(var + 1e-5) * (1 + scale)


class Sub(Copied):
    """A subclass that calls its parent."""

    @nn.compact
    def __call__(self, x, use_running_average: bool | None = None):
        return super().__call__(x, use_running_average) + 1


class Plain(Copied):
    """A subclass that changes nothing."""


class Parent(nn.Module):
    """Stays unregistered, but a registered class inherits its call."""

    momentum: float = 0.9

    @nn.compact
    def __call__(self, x, use_running_average):
        ra_mean, ra_var = kept(self, x.shape[-1])
        if not use_running_average:
            ra_mean.value, ra_var.value = x.mean((0, 1)), x.var((0, 1))
        return (x - ra_mean.value) / jnp.sqrt(ra_var.value + 1e-5)


class Child(Parent):
    """Is registered, and inherits its call."""


class Stranger(nn.Module):
    """Is never registered, and has its own call."""

    @nn.compact
    def __call__(self, x, use_running_average):
        ra_mean, _ = kept(self, x.shape[-1])
        if not use_running_average:
            ra_mean.value = x.mean((0, 1))
        return x - ra_mean.value


class Rewritten(nn.BatchNorm):
    """A subclass of Flax's that does not call its parent."""

    @nn.compact
    def __call__(self, x, use_running_average=None, *, mask=None):
        ra_mean, ra_var = kept(self, x.shape[-1])
        if not use_running_average:
            ra_mean.value = 0.9 * ra_mean.value + 0.1 * x.mean((0, 1))
        return (x - ra_mean.value) / jnp.sqrt(ra_var.value + self.epsilon)


class Unknown(nnx.Module):
    """An nnx class that is never registered."""

    def __init__(self, size: int) -> None:
        self.mean, self.var = nnx.BatchStat(jnp.zeros(size)), nnx.BatchStat(jnp.ones(size))
        self.training = True

    def __call__(self, x):
        return (x - self.mean[...]) / jnp.sqrt(self.var[...] + 1e-5)


class Case(NamedTuple):
    """A class, its arguments for `register`, and a call with x, padding and mode."""

    kind: Any
    facts: Mapping[str, Any]
    call: Callable[[Any, Any, bool], Any]
    padded: bool = False


def lengths_of(padding: Any) -> jax.Array:
    return jnp.sum(1 - padding, 1)


CASES = {
    "copied": Case(
        Copied, {}, lambda x, _, train: Copied(use_running_average=not train, name="norm")(x)
    ),
    "copied_told_in_call": Case(Copied, {}, lambda x, _, train: Copied(name="norm")(x, not train)),
    "masked": Case(
        Masked,
        {
            "use_running_average": "not training",
            "momentum": "decay",
            "epsilon": "eps",
            "mask": lambda _, args: (
                None if args["lengths"] is None else within(args["lengths"], args["x"])
            ),
        },
        lambda x, padding, train: Masked(name="norm")(x, train, lengths_of(padding))[0],
        padded=True,
    ),
    "configured": Case(
        Configured,
        {
            "use_running_average": "use_running_average_bn",
            "momentum": "config.momentum",
            "epsilon": "config.epsilon",
            "mask": lambda _, args: 1.0 - args["input_paddings"][..., None],
        },
        lambda x, padding, train: Configured(CONFIG, name="norm")(x, padding, train, not train),
        padded=True,
    ),
    "renorm": Case(Renorm, {}, lambda x, _, train: Renorm(name="norm")(x, not train)),
}
CASES_NNX = {
    "switched": Case(
        Switched, {"use_running_average": "not training"}, lambda norm, x, train: norm(x)
    ),
    "told": Case(Told, {"use_running_average": "not train"}, lambda norm, x, train: norm(x, train)),
}


class Noisy(nn.Module):
    """A model that draws from its own random stream and records what it drew."""

    stream: str = "z"

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.BatchNorm(not train, name="bn")(nn.Dense(4)(x))
        seen = self.variable("log", "noise", jnp.zeros, 24)
        calls = self.variable("log", "calls", lambda: jnp.zeros((), jnp.int32))
        if train:
            noise = jax.random.normal(self.make_rng(self.stream))
            seen.value = seen.value.at[calls.value].set(noise)
            calls.value += 1
            x = x * (1 + noise)
        return nn.Dense(1)(x)[:, 0]


class Codebook(nn.Module):
    """A vector quantizer with a codebook that follows the data, and sown values."""

    @nn.compact
    def __call__(self, x, train=False):
        h = nn.BatchNorm(not train, momentum=0.9, name="bn")(nn.Dense(4)(x))
        book = self.variable("codebook", "ema", lambda: jnp.eye(6, 4))
        index = jnp.argmin(jnp.sum((h[:, None] - book.value) ** 2, -1), 1)
        if train:
            book.value = 0.9 * book.value + 0.1 * jax.ops.segment_sum(h, index, 6)
        self.sow("intermediates", "h", h)
        self.sow("losses", "commit", jnp.mean(h**2))
        return nn.Dense(1)(h + jax.lax.stop_gradient(book.value[index] - h))[:, 0]


class Spectral(nn.Module):
    """A model with spectral norms, which keep their state in `batch_stats`."""

    @nn.compact
    def __call__(self, x, train=False):
        h = nn.SpectralNorm(nn.Dense(4))(x, update_stats=train)
        h = nn.BatchNorm(not train, momentum=0.9, name="bn")(h)
        return nn.Dense(1)(h)[:, 0]


class Net(nn.Module):
    """A batch norm of one of these classes between two dense layers."""

    call: Callable[[Any, Any, bool], Any]

    @nn.compact
    def __call__(self, x, padding, train=False):
        y = self.call(nn.Dense(4, name="dense")(x), padding, train)
        return nn.Dense(1, name="head")(nn.relu(y)).mean((1, 2))


class NetNnx(nnx.Module):
    """The same network in nnx, without padding."""

    def __init__(self, case: Case) -> None:
        rngs = nnx.Rngs(0)
        self.dense, self.head = nnx.Linear(5, 4, rngs=rngs), nnx.Linear(4, 1, rngs=rngs)
        self.norm, self.call = case.kind(4), case.call

    def __call__(self, x, train=False):
        y = self.call(self.norm, self.dense(x), train)
        return self.head(nnx.relu(y)).mean((1, 2))


def batch(seed: int, size: int = 24) -> dict[str, Any]:
    """Examples of three positions, of which the last may be padding."""
    rng = np.random.default_rng(seed)
    padding = np.arange(3) >= rng.integers(1, 4, (size, 1))
    x = (2 + 3 * rng.normal(size=(size, 3, 5))).astype(np.float32)
    return {"x": x, "padding": padding.astype(np.float32)}


def measured(params: Any, batches: Any, padded: bool) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of the batch norm's input, in float64."""
    values = []
    for each in batches:
        kernel, bias = (np.asarray(params["dense"][n], np.float64) for n in ("kernel", "bias"))
        counts = each["padding"] == 0 if padded else np.full(each["padding"].shape, True)
        values.append((np.asarray(each["x"], np.float64) @ kernel + bias)[counts])
    values = np.concatenate(values)
    return values.mean(0), values.var(0)


INPUTS = ("x", "padding")
BATCHES = [batch(seed) for seed in range(8)]


def start(case: Case) -> tuple[Net, Any]:
    """A network and its variables."""
    net = Net(case.call)
    return net, net.init(jax.random.key(0), *(BATCHES[0][name] for name in INPUTS))


def stats_of(variables: Any) -> tuple[np.ndarray, ...]:
    """The batch norm's statistics, by channel."""
    norm = variables["batch_stats"]["norm"]
    return tuple(np.asarray(norm[name]).reshape(-1) for name in ("mean", "var"))


def trained(net: Net, variables: Any, each: Any) -> tuple[Any, Any]:
    """The outputs in training, and the updated variables."""
    args = (each[name] for name in INPUTS)
    y, new = net.apply(variables, *args, train=True, mutable=["batch_stats"])
    return y, variables | new
