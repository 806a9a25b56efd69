"""What a call is told, checked once."""

import dataclasses
import functools
from typing import Self

import chex
import jax

from bnjax.core import checks
from bnjax.core.moments import Axes


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["eps", "momentum", "correction"],
    meta_fields="axes by_batch moves axis_name axis_index_groups virtual_batch_size dtype".split(),
)
@dataclasses.dataclass(frozen=True)
class Settings:
    """The arguments of `batch_norm` that are no arrays, as a pytree: numbers may be traced.

    Attributes:
        axes: the feature axes, sorted and not negative.
        by_batch: the statistics of the batch are taken.
        moves: the running statistics move.
        eps: added to the variance.
        momentum: the weight of the new batch; None for the cumulative average.
        correction: taken off the count in the running variance.
        axis_name: of the devices that pool their statistics; None for this one alone.
        axis_index_groups: those of them that pool among themselves; None for all.
        virtual_batch_size: how many examples share statistics; None for all.
        dtype: of the output.
    """

    axes: Axes
    by_batch: bool
    moves: bool
    eps: chex.Numeric
    momentum: chex.Numeric | None
    correction: chex.Numeric
    axis_name: tuple[str, ...] | None
    axis_index_groups: tuple[tuple[int, ...], ...] | None
    virtual_batch_size: int | None
    dtype: jax.typing.DTypeLike

    def checked(self, x: jax.Array) -> Self:
        """The same, if it makes sense together, for this input."""
        checks.momentum(self.momentum)
        checks.eps(self.eps, training=self.by_batch)
        checks.correction(self.correction)
        checks.virtual_batch_size(self.virtual_batch_size, self.axis_index_groups)
        if self.by_batch:
            devices = checks.devices(self.axis_name, self.axis_index_groups)
            size = self.virtual_batch_size
            checks.several_values(x, self.axes, devices, self.correction, size)
        return self
