"""Fold batch norms into the conv and dense layers after them."""

from collections import defaultdict
from collections.abc import Collection

import jax.numpy as jnp
import numpy as np

from bnjax._words import number_of
from bnjax.models.folding.flows import Flow, flow_of, onward
from bnjax.models.folding.numbers import Forward, Numbers
from bnjax.models.folding.program import OUTPUT, Place, Program, quoted
from bnjax.models.statistics import Path

_OWN = ""  # for a batch norm at the model's output, which needs no reason


def forward(
    program: Program, numbers: Numbers, taken: Collection[Path]
) -> tuple[list[Forward], dict[Path, str]]:
    """Fold batch norms into all layers after them; also return why others can't be folded.

    Args:
        program: the program of the model.
        numbers: its variables.
        taken: paths of batch norms and branches that are already folded.
    """
    visits: dict[Path, list[Place]] = defaultdict(list)
    for visit in program.visits:
        visits[visit.call.path].append(visit)
    found: dict[Path, dict[int, Forward]] = {}
    reasons: dict[Path, str] = {}
    lost = {program.calls[number].path for number in program.lost}
    for path, calls in visits.items():
        if not calls[0].call.norm or path in taken or path in lost:
            continue
        after = _After(program, numbers, taken)
        for visit in calls:
            after.norm(visit)
        if after.reason is None:
            found[path] = after.found
        else:
            reasons[path] = after.reason
    _refuse_others(program, visits, found, reasons, taken)
    edits = {edit.layer.path: edit for each in found.values() for edit in each.values()}
    return list(edits.values()), reasons


def _refuse_others(
    program: Program,
    visits: dict[Path, list[Place]],
    found: dict[Path, dict[int, Forward]],
    reasons: dict[Path, str],
    taken: Collection[Path],
) -> None:
    """Refuse layers that are also called on other inputs than one batch norm's output."""
    lost = {program.calls[number].path for number in program.lost}
    for path, each in list(found.items()):
        first: dict[Path, Forward] = {}
        for edit in each.values():
            layer = edit.layer.path
            other = first.setdefault(layer, edit)
            fed = {start for start, e in each.items() if e.layer.path == layer}
            if fed != {v.start for v in visits[layer]} or layer in lost:
                reasons[path] = f"{quoted(layer)} is also used for another input"
            elif not np.array_equal(other.channel, edit.channel):
                reasons[path] = f"{quoted(layer)} is also used for its channels in another order"
        if path in reasons:
            del found[path]


class _After:
    """The layers after all calls of a batch norm.

    Attributes:
        found: what is folded into each call of a layer, by its start.
        reason: why nothing is folded; None if something is.
    """

    def __init__(self, program: Program, numbers: Numbers, taken: Collection[Path]) -> None:
        self._program, self._numbers, self._taken = program, numbers, taken
        self.found: dict[int, Forward] = {}
        self.reason: str | None = None

    def norm(self, visit: Place) -> None:
        """Follow the output of a call."""
        self._refuse(self._program.trouble(visit))
        shape = visit.call.shapes.get("exit")
        if self.reason is None and shape is not None:
            self._value(visit, visit.result, flow_of(shape, visit.call.axes))
            if not self.found and self.reason is None:
                self.reason = "its output is not used"

    def _refuse(self, reason: str | None) -> None:
        self.reason = reason if self.reason is None else self.reason

    def _value(self, norm: Place, value: int, flow: Flow) -> None:
        program = self._program
        for user in program.uses[value]:
            step, layer = program.steps[user], program.starting.get(user)
            if layer is not None and layer.call.path in self._taken:
                continue  # merged into another layer with the same input
            if layer is not None and not layer.call.norm:
                self._layer(norm, layer, flow)
                continue
            found = None if step.mark else onward(step, value, flow, program.literals)
            if found is None:
                name = program.named(user)
                self._refuse(_OWN if name == OUTPUT else f"its output goes into {name}")
            for result, each in zip(step.results, found or (), strict=False):
                self._value(norm, result, each)

    def _layer(self, norm: Place, layer: Place, flow: Flow) -> None:
        name, linear = quoted(layer.call.path), layer.call.linear
        reason = self._program.trouble(layer)
        if reason is None and not linear.inner:
            only = f"and a {linear.kind} can only fold what follows it"
            reason = f"its output goes into {name}, {only}"
        elif reason is None and linear.opaque:
            reason = f"its output goes into {name}, which {linear.opaque}"
        elif reason is None and linear.window and set(linear.window.input_dilation) - {1}:
            reason = f"its output goes into {name}, which dilates it with zeros"
        elif reason is None and not flow.axes.issubset(linear.inner):
            axes = ", ".join(str(a) for a in sorted(flow.axes - {*linear.inner}))
            reason = (
                f"its channels are axis {axes} of the input of {name}, which does not sum over it"
            )
        elif reason is None and flow.scaled:
            reason = f"its output is {flow.scaled} before {name}"
        if reason is None:
            edit = Forward(norm.call, layer.call, _channel(layer, flow))
            self.found[layer.start] = edit
            reason = self._padding(edit)
        self._refuse(reason)

    def _padding(self, edit: Forward) -> str | None:
        """Why the layer's padding can't be replaced; None if it can."""
        if not edit.pads:
            return None
        value = np.asarray(edit.pad_value(self._numbers))
        dtype = edit.layer.dtypes[0]
        fits = np.abs(value) <= float(jnp.finfo(dtype).max)
        if fits.all():
            return None
        name, several = quoted(edit.layer.path), number_of(int((~fits).sum()), "channel")
        return (
            f"its output goes into {name}, which pads it with zeros, and in {several} no input "
            "gives zero"
        )


def _channel(layer: Place, flow: Flow) -> np.ndarray:
    """The channel of a batch norm for each entry of a layer's kernel, broadcastable to it."""
    linear = layer.call.linear
    index = flow.on(linear.inner)
    if linear.window is None or linear.window.groups == 1:
        return index.reshape(*index.shape, *(1,) * linear.features)
    groups, size = linear.window.groups, layer.call.input[-1]
    index = np.broadcast_to(index, size).reshape(groups, -1)
    outputs = linear.bias_shape[-1]
    return np.repeat(index, outputs // groups, 0).T
