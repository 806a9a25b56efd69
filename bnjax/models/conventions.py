"""One description of all batch norms: bnjax's, Flax's and registered ones, linen and nnx."""

import abc
import dataclasses
import inspect
import types
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from flax import linen as nn
from flax import nnx
from flax.typing import Axes

from bnjax.core.checks import axis_of_banks
from bnjax.core.devices import AxisName, Groups
from bnjax.core.policies import Policy
from bnjax.layers import conventions
from bnjax.layers import linen as linen_layers
from bnjax.layers import nnx as nnx_layers


class Linen(abc.ABC):  # noqa: B024 - only for isinstance checks
    """Any known linen batch norm, including those that a user has registered."""


class NNX(abc.ABC):  # noqa: B024
    """Any known nnx batch norm."""


OWN_LINEN: tuple[Any, ...] = (linen_layers.TorchBatchNorm, linen_layers.BatchNorm, nn.BatchNorm)
OWN_NNX: tuple[Any, ...] = (nnx_layers.TorchBatchNorm, nnx_layers.BatchNorm, nnx.BatchNorm)
OWN = (*OWN_LINEN[:2], *OWN_NNX[:2])  # bnjax's only
LINEAR_LINEN = (nn.Conv, nn.ConvLocal, nn.ConvTranspose, nn.Dense, nn.DenseGeneral)
LINEAR_NNX = (nnx.Conv, nnx.ConvTranspose, nnx.Linear, nnx.LinearGeneral)
LINEAR: tuple[Any, ...] = LINEAR_LINEN + LINEAR_NNX

# The functions that the layers themselves define, which subclasses may wrap, and by class those of
# registered layers.
_OWN_CALLS = {inspect.unwrap(kind.__call__) for kind in OWN_LINEN + LINEAR_LINEN}
_OWN_CALLS |= {kind.__call__ for kind in OWN_NNX + LINEAR_NNX}
_calls: dict[type, Any] = {}
_times: list[None] = []  # one entry per call of `know`
for _kind in OWN_LINEN + OWN_NNX:
    (Linen if _kind in OWN_LINEN else NNX).register(_kind)


def know(kind: Any) -> None:
    """Treat a class and its subclasses as batch norms."""
    linen = issubclass(kind, nn.Module)
    (Linen if linen else NNX).register(kind)
    _calls[kind] = inspect.unwrap(kind.__call__) if linen else kind.__call__
    _times.append(None)


def knowledge() -> int:
    """A number that changes whenever a class becomes known, which makes compiled programs stale."""
    return len(_times)


def registered_class(layer: Any) -> type | None:
    """The registered class that a layer belongs to; None if there is none."""
    return next((kind for kind in type(layer).__mro__ if kind in _calls), None)


def is_call(layer: Any, function: Any) -> bool:
    """Whether a function is the original call of this batch norm or linear layer."""
    registered = registered_class(layer)
    if registered is not None:
        return _calls[registered] is function
    return function in _OWN_CALLS and isinstance(layer, (Linen, NNX, *LINEAR))


def is_some_call(function: Any) -> bool:
    """Whether a function is the original call of any known layer."""
    return function in _OWN_CALLS or function in _calls.values()


def is_rewritten(kind: Any) -> bool:
    """Whether a subclass overrides the call of the known class without calling it."""
    call = inspect.unwrap(kind.__call__)
    names = {*call.__code__.co_names, *call.__code__.co_freevars}
    return not is_some_call(call) and not names & {"super", "__class__", "__call__"}


@dataclasses.dataclass(frozen=True)
class Facts:
    """What a batch norm does, in PyTorch's terms, whatever its own convention.

    Attributes:
        layer: the name of its class.
        flax: whether its momentum is in Flax's convention.
        axis: the feature axis or axes.
        eps: added to the variance.
        written: its momentum, in its own convention.
        correction: 1 if it keeps the unbiased variance, otherwise 0.
        tracked: whether it keeps running statistics.
        running: whether its fields say to use them; None leaves that to the call or to `mutable`.
        by_mutability: whether, by default, it trains if its statistics are mutable.
        affine: which of scale and bias it has.
        axis_name: the mapped axes over which it pools statistics.
        axis_index_groups: groups within these axes.
        virtual_batch_size: the number of examples in each ghost batch.
        using: the policy that chooses the statistics to normalize with; None for the default.
        banks: the number of sets of statistics it keeps, or their names; None for a single one.
    """

    layer: str
    flax: bool
    axis: Axes
    eps: Any
    written: Any
    correction: int
    tracked: bool
    running: bool | None
    by_mutability: bool
    affine: tuple[str, ...]
    axis_name: AxisName | None
    axis_index_groups: Groups | None
    virtual_batch_size: int | None
    using: Policy | None
    banks: int | tuple[str, ...] | None

    @property
    def momentum(self) -> Any:
        """The momentum in PyTorch's convention, as in `bnjax.batch_norm`."""
        return conventions.of_torch(self.written) if self.flax else self.written

    @property
    def weight(self) -> float | None:
        """The weight of a new batch in the running statistics; None unless it is constant."""
        momentum = self.momentum
        return float(momentum) if isinstance(momentum, int | float | np.number) else None

    @property
    def by_batch(self) -> bool:
        """Whether it normalizes with the batch in evaluation."""
        return self.using is not None and (self.using.by_batch(False) or self.using.per_example)


def facts(
    layer: Any, fields: Mapping[str, Any] = types.MappingProxyType({}), source: Any = None
) -> Facts:
    """The facts of a batch norm, read from `source` if given, with `fields` taking precedence."""
    source = _Overridden(layer if source is None else source, fields)
    torch, settings = conventions.is_torch(source), conventions.settings(source)
    del settings["momentum"]  # converted here, it could be a tracer that outlives its trace
    return Facts(
        layer=own_type(layer).__name__,
        flax=not torch,
        tracked=bool(conventions.statistics(source)),
        running=source.use_running_average,
        by_mutability=torch and isinstance(layer, nn.Module),
        affine=conventions.parameters(source),
        written=source.momentum,
        banks=_names(getattr(source, "banks", None)),
        **settings,
    )


def _names(banks: Any) -> Any:
    return tuple(banks) if isinstance(banks, list | tuple) else banks


class _Overridden:
    """A layer with some fields replaced."""

    def __init__(self, layer: Any, fields: Mapping[str, Any]) -> None:
        self._layer, self._fields = layer, fields

    def __getattr__(self, name: str) -> Any:
        return self._fields[name] if name in self._fields else getattr(self._layer, name)


# The fields that freeze a batch norm: it uses its running statistics and does not update them.
FROZEN: Mapping[str, Any] = types.MappingProxyType({"use_running_average": True, "using": None})


class Frozen(nnx.Module):
    """An nnx batch norm with a fixed mode, which remembers the mode it was last set to."""

    @property
    def use_running_average(self) -> bool:  # noqa: D102 - the layers document it
        return True

    @use_running_average.setter
    def use_running_average(self, asked_for: bool | None) -> None:
        vars(self)["use_running_average"] = asked_for


def own_type(layer: Any) -> type:
    """The type that a layer was created with, before it was frozen."""
    return next(kind for kind in type(layer).__mro__ if not issubclass(kind, Frozen))


def banks_of(facts: Facts) -> Sequence[int | None]:
    """The banks of a layer by number, each of which counts as a layer; None if it has none."""
    return range(*conventions.rows(facts)) if facts.banks is not None else (None,)


def place_of_bank(bank: int | None, shape: tuple[int, ...], facts: Facts) -> tuple[Any, ...]:
    """The index of a bank in statistics of this shape, perhaps of layers that are stacked."""
    axis = None
    if bank is not None:
        axis = axis_of_banks(shape, *conventions.rows(facts), path=facts.layer)
    return () if axis is None else (slice(None),) * axis + (bank,)


def label_of_bank(bank: int | None, facts: Facts) -> str:
    """The suffix that a bank adds to the path of its layer."""
    if bank is None:
        return ""
    return f"[{bank if isinstance(facts.banks, int | None) else facts.banks[bank]}]"
