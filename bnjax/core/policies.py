"""Policies: normalize with moments of the batch, running ones, or a combination."""

import dataclasses
from collections.abc import Callable
from typing import Any, Self, TypeVar, dataclass_transform

import chex
import jax
import jax.numpy as jnp
from jax import lax

from bnjax.core import checks
from bnjax.core.moments import Moments, abs2

Limit = Any  # a number, or a function of the number of training steps
Affine = dict[str, jax.Array]
_T = TypeVar("_T", bound="Policy")


@dataclasses.dataclass(frozen=True)
class Seen:
    """What a policy can choose from; all arrays broadcast against each other.

    Attributes:
        batch: the moments of the batch, pooled over devices; None if they were not measured.
        mean: the running mean before this batch.
        var: the running variance before this batch.
        after: the running mean and variance after this batch; None if they are not updated.
        eps: added to the variance.
        mutable: whether the call trains.
        examples: returns the number of examples in the batch.
        each: returns the moments of each example alone, and the running mean and variance,
            broadcastable to them.
    """

    batch: Moments | None
    mean: jax.Array
    var: jax.Array
    after: tuple[jax.Array, jax.Array] | None
    eps: chex.Numeric
    mutable: bool
    examples: Callable[[], chex.Numeric]
    each: Callable[[], tuple[Moments, jax.Array, jax.Array]]

    @property
    def measured(self) -> Moments:
        """The moments of the batch, which were measured."""
        assert self.batch is not None, "Policy.by_batch said that they are needed"
        return self.batch

    def running(self) -> Moments:
        """The running statistics, as moments."""
        return fixed(self.mean, self.var)


def fixed(mean: jax.Array, var: jax.Array) -> Moments:
    """A mean and a variance as moments.

    The origin is the mean itself, without an offset, so evaluation computes nothing extra.
    """
    return Moments(jnp.ones((), var.dtype), mean, None, var)  # pyright: ignore[reportArgumentType]


@dataclasses.dataclass(frozen=True, repr=False)
class Policy:
    """A setting that chooses which statistics to normalize with.

    Pass a policy as `using=` to a layer, to `bnjax.batch_norm`, or to `bnjax.override`, which works
    on any Flax model. It does not affect updates: as without a policy, the running statistics are
    updated in training. Policies are frozen dataclasses: equal ones compare equal, and their
    numbers may be traced.

    Guide: examples/guides/policies.md
    """

    def __repr__(self) -> str:
        """The call that creates it, without defaults."""
        held = ((f.name, getattr(self, f.name), f.default) for f in dataclasses.fields(self))
        given = [f"{name}={value}" for name, value, default in held if value is not default]
        return f"{type(self).__name__}({', '.join(given)})"

    def by_batch(self, mutable: bool) -> bool:
        """Whether the moments of the batch are needed to normalize."""
        return True

    @property
    def per_example(self) -> bool:
        """Whether each example is normalized with its own moments."""
        return False

    @property
    def counts(self) -> bool:
        """Whether it depends on the number of training steps."""
        return False

    def at(self, count: Any) -> Self:
        """The policy after `count` training steps, with functions evaluated."""
        return self

    def choose(self, seen: Seen) -> tuple[Moments, Affine]:
        """The moments to normalize with, and a scale and bias to apply before the learned ones."""
        raise NotImplementedError


@dataclass_transform(frozen_default=True)
def _policy(cls: type[_T]) -> type[_T]:
    """Make a class a frozen dataclass and a pytree of its numbers; flags are static."""
    cls = dataclasses.dataclass(frozen=True, repr=False)(cls)
    flags = [each.name for each in dataclasses.fields(cls) if each.type is bool]
    data = [each.name for each in dataclasses.fields(cls) if each.name not in flags]
    return jax.tree_util.register_dataclass(cls, data, flags)


@_policy
class Batch(Policy):
    """Normalize with the statistics of the batch, even in evaluation.

    "Prediction-time batch norm" (Nado et al. 2020): if test data differ from the training data,
    their own statistics may fit better than the running ones, given enough examples.
    """

    def choose(self, seen: Seen) -> tuple[Moments, Affine]:  # noqa: D102 - as in Policy
        return seen.measured, {}


@_policy
class Running(Policy):
    """Normalize with the running statistics, even in training, which updates them.

    Attributes:
        updated: normalize with the statistics after this batch, without a gradient through them, as
            for observations in reinforcement learning. False uses those before it.
    """

    updated: bool = False

    def by_batch(self, mutable: bool) -> bool:  # noqa: D102
        return False

    def choose(self, seen: Seen) -> tuple[Moments, Affine]:  # noqa: D102
        if not self.updated or seen.after is None:
            return seen.running(), {}
        return fixed(*map(lax.stop_gradient, seen.after)), {}


@_policy
class Renorm(Policy):
    """Batch renormalization (Ioffe 2017): train with the statistics that evaluation uses.

    In training, with batch mean and biased variance `mu, v`, and running ones `m, V` before this
    batch:

        y = scale * ((x - mu) / sqrt(v + eps) * r + d) + bias
        r = stop_gradient(clip(sqrt(v + eps) / sqrt(V + eps), 1 / r_max, r_max))
        d = stop_gradient(clip((mu - m) / sqrt(V + eps), -d_max, d_max))

    Within the limits, this equals evaluation with the running statistics. `Renorm(1, 0)` is batch
    norm. Evaluation is that of batch norm. Start training at (1, 0), and relax the limits once the
    running statistics have settled: see `paper` and `crossq`.

    Attributes:
        r_max: at least 1, or a function of the number of previous training steps, such as an optax
            schedule. With a function, the layer counts steps in `batch_stats["count"]`.
        d_max: not negative, or a function likewise.
    """

    r_max: Limit = 3.0
    d_max: Limit = 5.0

    def __post_init__(self) -> None:  # noqa: D105
        checks.limit("r_max", self.r_max, 1)
        checks.limit("d_max", self.d_max, 0)

    @classmethod
    def paper(cls) -> Self:
        """The limits of the paper: (1, 0) for 5,000 steps; 3 from step 40,000, 5 from 25,000 on."""
        return cls(Ramp(2 / 35_000, 25 / 35, 1, 3), Ramp(5 / 20_000, -25 / 20, 0, 5))

    @classmethod
    def crossq(cls, warmup: int = 100_000) -> Self:
        """The limits of CrossQ (Bhatt et al. 2024): batch norm for `warmup` steps, then (3, 5)."""
        return cls(Switch(warmup, 1.0, 3.0), Switch(warmup, 0.0, 5.0))

    def __repr__(self) -> str:  # noqa: D105
        if self == Renorm.paper():
            return "Renorm.paper()"
        if isinstance(self.r_max, Switch) and self == Renorm.crossq(self.r_max.steps):
            return f"Renorm.crossq(warmup={self.r_max.steps})"
        return super().__repr__()

    @property
    def counts(self) -> bool:  # noqa: D102
        return callable(self.r_max) or callable(self.d_max)

    def by_batch(self, mutable: bool) -> bool:  # noqa: D102
        return mutable

    def at(self, count: Any) -> Self:  # noqa: D102
        r_max, d_max = (
            limit(count) if callable(limit) else limit for limit in (self.r_max, self.d_max)
        )
        return type(self)(r_max, d_max) if self.counts else self

    def choose(self, seen: Seen) -> tuple[Moments, Affine]:  # noqa: D102
        if not seen.mutable:
            return seen.running(), {}
        batch = seen.measured
        ratio, distance = renormalization(batch, seen.mean, seen.var, seen.eps)
        limits = (_beside(jnp.asarray(limit), ratio) for limit in (self.r_max, self.d_max))
        r_max, d_max = (limit.astype(ratio.dtype) for limit in limits)
        r = jnp.clip(ratio, 1 / r_max, r_max)
        affine = {"scale": r, "bias": _within(distance, d_max)}
        return batch, jax.tree.map(lax.stop_gradient, affine)


def renormalization(
    batch: Moments, mean: jax.Array, var: jax.Array, eps: chex.Numeric
) -> tuple[jax.Array, jax.Array]:
    """Ratio and distance of batch renormalization, before clipping."""
    deviation = jnp.sqrt(var + eps)
    return jnp.sqrt(batch.variance() + eps) / deviation, _distance(batch, mean) / deviation


def _distance(batch: Moments, mean: jax.Array) -> jax.Array:
    """The batch mean minus the running mean, without rounding the former."""
    return (batch.origin - mean) + batch.offset


def _within(value: jax.Array, limit: jax.Array) -> jax.Array:
    if jnp.iscomplexobj(value):
        size = jnp.abs(value)
        return value * jnp.where(size > limit, limit / jnp.where(size > 0, size, 1), 1)
    return jnp.clip(value, -limit, limit)


def _beside(value: jax.Array, channels: jax.Array) -> jax.Array:
    """Reshape a number, or one for each of several sets of statistics, to broadcast to channels."""
    return value.reshape(*value.shape, *(1,) * (channels.ndim - value.ndim))


@_policy
class Blend(Policy):
    """Normalize with a mixture of batch and running statistics, even in evaluation.

    With the weight a of the batch, `mean = (1 - a) * m + a * mu` and
    `var = (1 - a) * V + a * v + a * (1 - a) * (mu - m)^2`, the statistics of both sets of data
    combined. Give the weight or a prior.

    Attributes:
        prior: the number of examples that the running statistics count as: `a = n / (prior + n)`
            for a batch of n examples (Schneider et al. 2020).
        weight: a, between 0 and 1.
        between: include the last term, which makes the mixture exact (You et al. 2021); Schneider
            et al. omit it.
    """

    prior: chex.Numeric | None = None
    weight: chex.Numeric | None = None
    between: bool = True

    def __post_init__(self) -> None:  # noqa: D105
        checks.one_of("Blend", prior=self.prior, weight=self.weight)
        if self.weight is None:
            checks.not_negative("prior", self.prior)
        else:
            checks.weight("weight", self.weight)

    def choose(self, seen: Seen) -> tuple[Moments, Affine]:  # noqa: D102
        weight = self.weight
        if weight is None:
            examples = seen.examples()
            weight = examples / jnp.maximum(jnp.asarray(self.prior) + examples, 1e-30)
        return mixed(seen.measured, seen.mean, seen.var, weight, self.between), {}


@_policy
class Example(Policy):
    """Normalize each example with a mixture of its own statistics and the running ones.

    Like `Blend`, but with the moments of each example alone, over its positions (Summers and
    Dinneen 2020): in training and evaluation, the result does not depend on the rest of the batch.

    Attributes:
        weight: the weight of the example, between 0 and 1.
        between: as for `Blend`.
    """

    weight: chex.Numeric
    between: bool = True

    def __post_init__(self) -> None:  # noqa: D105
        checks.weight("weight", self.weight)

    def by_batch(self, mutable: bool) -> bool:  # noqa: D102
        return False

    @property
    def per_example(self) -> bool:  # noqa: D102
        return True

    def choose(self, seen: Seen) -> tuple[Moments, Affine]:  # noqa: D102
        return mixed(*seen.each(), self.weight, self.between), {}


def mixed(
    batch: Moments, mean: jax.Array, var: jax.Array, weight: chex.Numeric, between: bool
) -> Moments:
    """Mix running statistics with those of a batch, which get the given weight."""
    weight = jnp.asarray(weight, var.dtype)
    weight = jnp.where(batch.count > 0, _beside(weight, var), 0)
    distance = _distance(batch, mean)
    mixture = (1 - weight) * var + weight * batch.variance()
    if between:
        mixture = mixture + weight * (1 - weight) * abs2(distance)
    offset = batch.offset - (1 - weight) * distance
    return Moments(jnp.ones((), var.dtype), batch.origin, offset, mixture)


@dataclasses.dataclass(frozen=True)
class Ramp:
    """`clip(slope * count + start, low, high)`, a function of the number of steps."""

    slope: float
    start: float
    low: float
    high: float

    def __call__(self, count: Any) -> jax.Array:
        """The value after `count` steps."""
        return jnp.clip(self.slope * count + self.start, self.low, self.high)


@dataclasses.dataclass(frozen=True)
class Switch:
    """`before` for the first `steps` steps, then `after`."""

    steps: int
    before: float
    after: float

    def __call__(self, count: Any) -> jax.Array:
        """The value after `count` steps."""
        return jnp.where(count < self.steps, self.before, self.after)


@dataclasses.dataclass(frozen=True)
class Debiased:
    """A momentum without bias towards the initial statistics, mean 0 and variance 1.

    `max(momentum, 1 / (t + 1))` after t training steps: a cumulative average at first, then an
    exponential one. With a plain momentum of 0.1, the initial values still weigh 12% after 20
    steps.

    Attributes:
        momentum: the final momentum, in the convention of the layer.

    >>> [round(float(Debiased(0.3)(t)), 2) for t in range(5)]
    [1.0, 0.5, 0.33, 0.3, 0.3]
    """

    momentum: chex.Numeric

    def __post_init__(self) -> None:  # noqa: D105
        checks.momentum(self.momentum, cumulative=False)

    def __call__(self, count: Any) -> jax.Array:
        """The weight of a new batch after `count` steps."""
        return jnp.maximum(self.momentum, 1 / (jnp.asarray(count, jnp.float32) + 1))
