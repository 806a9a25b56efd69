"""The settings of a call, checked once."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, Self

import chex
import jax

from bnjax.core import checks
from bnjax.core.moments import Axes
from bnjax.core.policies import Policy

Momentum = chex.Numeric | Callable[[Any], chex.Numeric] | Literal["pooled"] | None


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["eps", "momentum", "correction", "using"],
    meta_fields=(
        "axes mutable tracked pooled axis_name axis_index_groups virtual_batch_size dtype"
        " banks".split()
    ),
)
@dataclasses.dataclass(frozen=True)
class Settings:
    """The arguments of `batch_norm` other than arrays, as a pytree whose numbers may be traced.

    Attributes:
        axes: the feature axes, sorted and not negative.
        mutable: whether the call trains.
        tracked: whether there are running statistics.
        eps: added to the variance.
        momentum: the weight of the new batch, a number; None for the cumulative average.
        pooled: instead of a momentum, pool all values ever seen.
        correction: subtracted from the count in the running variance.
        axis_name: the mapped axes over which devices pool statistics; None for no pooling.
        axis_index_groups: groups of devices that pool; None for all.
        virtual_batch_size: the number of examples that share statistics; None for all.
        dtype: dtype of the output.
        using: the policy, with numbers in its fields; None for the default.
        banks: the number of sets of statistics; the call uses one, or one for each example. None
            without banks.
    """

    axes: Axes
    mutable: bool
    tracked: bool
    eps: chex.Numeric
    momentum: chex.Numeric | None
    pooled: bool
    correction: chex.Numeric
    axis_name: tuple[str, ...] | None
    axis_index_groups: tuple[tuple[int, ...], ...] | None
    virtual_batch_size: int | None
    dtype: jax.typing.DTypeLike
    using: Policy | None
    banks: int | None

    @property
    def moves(self) -> bool:
        """Whether the running statistics are updated."""
        return self.mutable and self.tracked

    @property
    def by_batch(self) -> bool:
        """Whether to normalize with the statistics of the batch, alone or mixed with others."""
        if self.using is not None:
            return self.using.by_batch(self.mutable)
        return self.mutable or not self.tracked

    @property
    def measures(self) -> bool:
        """Whether to compute the statistics of the batch."""
        return self.by_batch or self.moves

    def checked(self, x: jax.Array) -> Self:
        """Check the settings against each other and this input, and return them."""
        checks.policy(self.using, Policy)
        checks.has_running(self.tracked or self.using is None, self.using)
        checks.eps(self.eps, training=self.measures)
        checks.correction(self.correction)
        checks.virtual_batch_size(self.virtual_batch_size, self.axis_index_groups)
        if self.measures:
            devices = checks.devices(self.axis_name, self.axis_index_groups)
            if self.moves or self.using is None:
                size = self.virtual_batch_size
                checks.several_values(x, self.axes, devices, self.correction, size)
        return self


def counts(momentum: Momentum, using: Policy | None) -> bool:
    """Whether a setting depends on the number of training steps, which is then kept."""
    scheduled = momentum is None or callable(momentum)
    return scheduled or (using is not None and using.counts)


def at(count: Any, momentum: Momentum, using: Policy | None) -> tuple[Any, Policy | None]:
    """Momentum and policy after `count` training steps, with functions evaluated."""
    checks.momentum(momentum)
    checks.policy(using, Policy)
    if callable(momentum):
        checks.has_count(count is not None, f"momentum={momentum}")
        momentum = momentum(count)
    if using is not None and using.counts:
        checks.has_count(count is not None, f"using={using}")
        using = using.at(count)
    return momentum, using
