"""What a batch norm is, in one vocabulary, whoever wrote it: bnjax or Flax, linen or nnx."""

import abc
import dataclasses
import inspect
import types
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import linen as nn
from flax import nnx
from flax.typing import Axes

from bnjax.core.devices import AxisName, Groups
from bnjax.core.policies import Policy
from bnjax.layers import conventions
from bnjax.layers import linen as linen_layers
from bnjax.layers import nnx as nnx_layers


class Linen(abc.ABC):  # noqa: B024 - it only says what is one
    """Any batch norm of linen that is known, those that a user has registered among them."""


class NNX(abc.ABC):  # noqa: B024
    """Any batch norm of nnx that is known."""


OWN_LINEN: tuple[Any, ...] = (linen_layers.TorchBatchNorm, linen_layers.BatchNorm, nn.BatchNorm)
OWN_NNX: tuple[Any, ...] = (nnx_layers.TorchBatchNorm, nnx_layers.BatchNorm, nnx.BatchNorm)
OWN = (*OWN_LINEN[:2], *OWN_NNX[:2])  # of bnjax alone
LINEAR_LINEN = (nn.Conv, nn.ConvLocal, nn.ConvTranspose, nn.Dense, nn.DenseGeneral)
LINEAR_NNX = (nnx.Conv, nnx.ConvTranspose, nnx.Linear, nnx.LinearGeneral)
LINEAR: tuple[Any, ...] = LINEAR_LINEN + LINEAR_NNX

# The code of the layers themselves, below whatever a subclass wraps around it; and, by class, that
# of those which a user has registered.
_OWN_CALLS = {inspect.unwrap(kind.__call__) for kind in OWN_LINEN + LINEAR_LINEN}
_OWN_CALLS |= {kind.__call__ for kind in OWN_NNX + LINEAR_NNX}
_calls: dict[type, Any] = {}
_times: list[None] = []  # as many as there were calls of `know`
for _kind in OWN_LINEN + OWN_NNX:
    (Linen if _kind in OWN_LINEN else NNX).register(_kind)


def know(kind: Any) -> None:
    """Take a class, and its subclasses, for batch norms."""
    linen = issubclass(kind, nn.Module)
    (Linen if linen else NNX).register(kind)
    _calls[kind] = inspect.unwrap(kind.__call__) if linen else kind.__call__
    _times.append(None)


def knowledge() -> int:
    """A number that changes with what is known: programs of before have met other layers."""
    return len(_times)


def registered_class(layer: Any) -> type | None:
    """The class of a layer that a user has registered, if it is known by that."""
    return next((kind for kind in type(layer).__mro__ if kind in _calls), None)


def is_call(layer: Any, function: Any) -> bool:
    """Whether a function is the call of a batch norm, or of a linear layer, itself."""
    registered = registered_class(layer)
    if registered is not None:
        return _calls[registered] is function
    return function in _OWN_CALLS and isinstance(layer, (Linen, NNX, *LINEAR))


def is_some_call(function: Any) -> bool:
    """Whether a function is the call of some layer that is known."""
    return function in _OWN_CALLS or function in _calls.values()


def is_rewritten(kind: Any) -> bool:
    """Whether a subclass has a call of its own that leaves out that of the known class."""
    call = inspect.unwrap(kind.__call__)
    names = {*call.__code__.co_names, *call.__code__.co_freevars}
    return not is_some_call(call) and not names & {"super", "__class__", "__call__"}


@dataclasses.dataclass(frozen=True)
class Facts:
    """What a batch norm does, in PyTorch's terms whatever the convention it is written in.

    Attributes:
        layer: the name of its class.
        flax: whether its momentum is written in Flax's convention.
        axis: the feature axis, or axes.
        eps: what it adds to the variance.
        written: its momentum as it is written.
        correction: 1 where it keeps the unbiased variance.
        tracked: whether it keeps running statistics.
        running: whether its fields say to use them; None leaves that to the call, or to `mutable`.
        by_mutability: whether it trains, where nobody says, if its statistics are mutable.
        affine: which of scale and bias it has.
        axis_name: the mapped axes whose devices it pools.
        axis_index_groups: groups of these.
        virtual_batch_size: the size of the groups that are normalized by themselves.
        using: the policy that says what normalizes; None for the default.
        banks: how many sets of statistics it keeps, or their names; None for one.
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
        """What moves the running statistics, as `bnjax.batch_norm` takes it."""
        return conventions.of_torch(self.written) if self.flax else self.written

    @property
    def weight(self) -> float | None:
        """The weight of a new batch in the running statistics, where it is always the same."""
        momentum = self.momentum
        return float(momentum) if isinstance(momentum, int | float | np.number) else None

    @property
    def by_batch(self) -> bool:
        """Whether it normalizes with the batch where it evaluates."""
        return self.using is not None and (self.using.by_batch(False) or self.using.per_example)


def facts(
    layer: Any, fields: Mapping[str, Any] = types.MappingProxyType({}), told: Any = None
) -> Facts:
    """The facts of a batch norm, or of what is told of it; `fields` are looked at first."""
    told = _Told(layer if told is None else told, fields)
    torch, settings = conventions.is_torch(told), conventions.settings(told)
    del settings["momentum"]  # in PyTorch's terms, it may be traced in a loop that it outlives
    return Facts(
        layer=own_type(layer).__name__,
        flax=not torch,
        tracked=bool(conventions.statistics(told)),
        running=told.use_running_average,
        by_mutability=torch and isinstance(layer, nn.Module),
        affine=conventions.parameters(told),
        written=told.momentum,
        banks=_names(getattr(told, "banks", None)),
        **settings,
    )


def _names(banks: Any) -> Any:
    return tuple(banks) if isinstance(banks, list | tuple) else banks


class _Told:
    """A layer with other fields."""

    def __init__(self, layer: Any, fields: Mapping[str, Any]) -> None:
        self._layer, self._fields = layer, fields

    def __getattr__(self, name: str) -> Any:
        return self._fields[name] if name in self._fields else getattr(self._layer, name)


# The fields with which a batch norm is frozen: it uses its running statistics, and they stay.
FROZEN: Mapping[str, Any] = types.MappingProxyType({"use_running_average": True, "using": None})


class Frozen(nnx.Module):
    """An nnx batch norm that has one mode, and remembers the one that it is asked for."""

    @property
    def use_running_average(self) -> bool:  # noqa: D102 - the layers document it
        return True

    @use_running_average.setter
    def use_running_average(self, asked_for: bool | None) -> None:
        vars(self)["use_running_average"] = asked_for


def own_type(layer: Any) -> type:
    """The type that a layer was made with."""
    return next(kind for kind in type(layer).__mro__ if not issubclass(kind, Frozen))
