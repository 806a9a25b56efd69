"""Follow the channels of a value from one equation to the next.

This covers only equations that move values, or take means over values of the same channel. These
commute with an affine map of the channels.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

# Equations that leave each value where it is.
SAME = {"name", "convert_element_type", "sharding_constraint", "copy", "copy_p"}


class Flow(NamedTuple):
    """Where the channels of a layer are in a value.

    Attributes:
        channels: the channel number of each entry, with as many axes as the value, and length 1
            along those where it is constant.
        axes: the channel axes.
        weight: what a value of 1 has become.
        sums: how many sums have not been divided by a number: these are not means, even if the
            weight is 1 for inputs of this size.
    """

    channels: np.ndarray
    axes: frozenset[int]
    weight: float = 1.0
    sums: int = 0

    @property
    def scaled(self) -> str | None:
        """How the value is scaled, in words; None if it is not."""
        if self.sums > 0:
            return "summed"
        return None if abs(self.weight - 1) < 1e-6 else f"multiplied by {self.weight:.3g}"

    def varies(self, axis: int) -> bool:
        """Whether the channel may change along an axis."""
        return self.channels.shape[axis] > 1

    def on(self, axes: Sequence[int]) -> np.ndarray:
        """The channel numbers along these axes only, outside of which they are constant."""
        others = tuple(a for a in range(self.channels.ndim) if a not in axes)
        order = np.argsort(np.argsort(axes))
        return np.transpose(np.squeeze(self.channels, others), order)


def flow_of(shape: Sequence[int], axes: Sequence[int]) -> Flow:
    """The channels of a layer in a value of this shape, numbered along these sorted axes."""
    sizes = [size if axis in axes else 1 for axis, size in enumerate(shape)]
    return Flow(np.arange(math.prod(sizes)).reshape(sizes), frozenset(axes))


def onward(step: Any, value: int, flow: Flow, literals: dict[int, Any]) -> list[Flow] | None:
    """Where the channels are in each result of an equation; None if they can't be followed."""
    rule = _RULES.get(step.name)
    if rule is None or step.eqn is None or step.operands[0] != value:
        return None
    if not jnp.issubdtype(step.eqn.outvars[0].aval.dtype, jnp.inexact):
        return None
    constants = [literals.get(operand) for operand in step.operands[1:]]
    found = rule(flow, step.eqn.params, step.eqn.invars[0].aval.shape, step.eqn, constants)
    return [found] if isinstance(found, Flow) else found


def _same(flow: Flow, *_: Any) -> Flow:
    return flow


def _transpose(flow: Flow, params: Any, *_: Any) -> Flow:
    order = params["permutation"]
    axes = frozenset(new for new, old in enumerate(order) if old in flow.axes)
    return flow._replace(channels=np.transpose(flow.channels, order), axes=axes)


def _squeeze(flow: Flow, params: Any, *_: Any) -> Flow | None:
    return _without(flow, params["dimensions"])


def _without(flow: Flow, axes: Sequence[int]) -> Flow | None:
    if flow.axes.intersection(axes) or any(flow.varies(a) for a in axes):
        return None
    kept = [a for a in range(flow.channels.ndim) if a not in axes]
    left = frozenset(new for new, old in enumerate(kept) if old in flow.axes)
    return flow._replace(channels=np.squeeze(flow.channels, tuple(axes)), axes=left)


def _broadcast(flow: Flow, params: Any, shape: Any, eqn: Any, _: Any) -> Flow:
    where, new = params["broadcast_dimensions"], [1] * len(params["shape"])
    for old, axis in enumerate(where):
        new[axis] = flow.channels.shape[old]
    axes = frozenset(where[axis] for axis in flow.axes)
    return flow._replace(channels=flow.channels.reshape(new), axes=axes)


def _reshape(flow: Flow, params: Any, shape: Any, *_: Any) -> Flow | None:
    if params.get("dimensions") is not None:
        return None
    groups = _groups(shape, params["new_sizes"])
    if groups is None:
        return None
    full, new, axes, position = [], [], set(), 0
    for old, sizes in groups:
        lives = bool(flow.axes.intersection(old))
        varies = lives or any(flow.varies(a) for a in old)
        full += [shape[a] if varies else 1 for a in old]
        new += sizes if varies else [1] * len(sizes)
        several = any(size > 1 for size in sizes)
        here = range(position, position + len(sizes))
        axes |= {
            a for a, size in zip(here, sizes, strict=True) if lives and (size > 1 or not several)
        }
        position += len(sizes)
    index = np.broadcast_to(flow.channels, full).reshape(new)
    return flow._replace(channels=index, axes=frozenset(axes))


def _groups(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]] | None:
    """The old axes, by number, and the new ones, by size, of each group that is reshaped."""
    if not all(isinstance(size, int) and size for size in (*old, *new)):
        return None
    groups, at, to = [], 0, 0
    while at < len(old) or to < len(new):
        start, begin = at, to
        at, to = min(at + 1, len(old)), min(to + 1, len(new))
        while (before := math.prod(old[start:at])) != (after := math.prod(new[begin:to])):
            at, to = (at + 1, to) if before < after else (at, to + 1)
        groups.append(([*range(start, at)], [*new[begin:to]]))
    return groups


def _slice(flow: Flow, params: Any, *_: Any) -> Flow:
    strides = params["strides"] or [1] * flow.channels.ndim
    each = zip(params["start_indices"], params["limit_indices"], strides, strict=True)
    cut = tuple(
        slice(*bounds) if flow.varies(axis) else slice(None) for axis, bounds in enumerate(each)
    )
    return flow._replace(channels=flow.channels[cut])


def _dynamic_slice(flow: Flow, params: Any, shape: Any, *_: Any) -> Flow | None:
    cut = [a for a, size in enumerate(params["slice_sizes"]) if size != shape[a]]
    return None if any(flow.varies(a) for a in cut) else flow


def _split(flow: Flow, params: Any, *_: Any) -> list[Flow]:
    axis, sizes = params["axis"], params["sizes"]
    if not flow.varies(axis):
        return [flow] * len(sizes)
    parts = np.split(flow.channels, np.cumsum(sizes)[:-1], axis)
    return [flow._replace(channels=part) for part in parts]


def _rev(flow: Flow, params: Any, *_: Any) -> Flow:
    return flow._replace(channels=np.flip(flow.channels, params["dimensions"]))


def _sum(flow: Flow, params: Any, shape: Any, *_: Any) -> Flow | None:
    found = _without(flow, params["axes"])
    count = math.prod(shape[a] for a in params["axes"])
    return found and found._replace(weight=flow.weight * count, sums=flow.sums + 1)


def _window_sum(flow: Flow, params: Any, *_: Any) -> Flow | None:
    sizes, strides = params["window_dimensions"], params["window_strides"]
    moved = [a for a, each in enumerate(zip(sizes, strides, strict=True)) if each != (1, 1)]
    if any(map(flow.varies, moved)) or any(map(any, params["padding"])):
        return None
    dilated = (*params["base_dilation"], *params["window_dilation"])
    if set(dilated) != {1}:
        return None
    return flow._replace(weight=flow.weight * math.prod(sizes), sums=flow.sums + 1)


def _times(power: int) -> Callable[..., Flow | None]:
    def scaled(flow: Flow, _: Any, shape: Any, eqn: Any, constants: list[Any]) -> Flow | None:
        (factor,) = constants
        if factor is None or np.ndim(factor) or not np.isfinite(factor) or not factor:
            return None
        weight = flow.weight * float(factor) ** power
        return flow._replace(weight=weight, sums=flow.sums - 1)

    return scaled


_RULES: dict[str, Callable[..., Any]] = {name: _same for name in SAME} | {
    "transpose": _transpose,
    "squeeze": _squeeze,
    "broadcast_in_dim": _broadcast,
    "reshape": _reshape,
    "slice": _slice,
    "dynamic_slice": _dynamic_slice,
    "split": _split,
    "rev": _rev,
    "reduce_sum": _sum,
    "reduce_window_sum": _window_sum,
    "mul": _times(1),
    "div": _times(-1),
}
