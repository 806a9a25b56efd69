"""Decide what to fold into what, in which order, and report why the rest is not folded."""

from collections import defaultdict
from collections.abc import Collection
from typing import Any, NamedTuple

import numpy as np

from bnjax.models.folding.branches import Branches
from bnjax.models.folding.flows import SAME, Flow, flow_of, onward
from bnjax.models.folding.forward import forward
from bnjax.models.folding.numbers import Backward, Edit, Forward, Numbers
from bnjax.models.folding.program import Place, Program, quoted
from bnjax.models.folding.report import Branch, Row
from bnjax.models.statistics import Path


class Plan(NamedTuple):
    """The edits in order, and the contents of the report."""

    edits: list[Edit]
    rows: list[Row]
    branches: list[Branch]


def plan(program: Program, numbers: Numbers) -> Plan:
    """Fold batch norms into the layers before them, merge branches, and fold into layers after.

    Args:
        program: the program of the model.
        numbers: its variables.
    """
    before = _Before(program)
    edits: list[Edit] = [*before.link({v.call.path for v in program.visits if not v.call.norm})]
    branches = Branches(program, before.exits)
    while merged := branches.merge(before.links):
        edits += [*merged, *before.link({merge.host.path for merge in merged})]
    taken = {edit.norm.path for edit in edits if isinstance(edit, Backward)} | branches.gone
    found, whys = forward(program, numbers, taken)
    rows = _rows(program, before, branches, found, whys)
    return Plan([*edits, *found], rows, branches.report)


class _Follow(NamedTuple):
    """Where the output of a layer goes."""

    norm: Place | None
    reason: str | None
    channel: Any = None
    plain: bool = False


class _Before:
    """Fold batch norms into the layers before them.

    Attributes:
        links: what was folded into each layer, by its path.
        exits: the output of each call of a layer, after what was folded into it.
        targets: the batch norms after each layer.
        reasons: why nothing was folded into a layer.
    """

    def __init__(self, program: Program) -> None:
        self._program = program
        self.links: dict[Path, list[Backward]] = defaultdict(list)
        self.exits = {v.start: v.result for v in program.visits}
        self.targets: dict[Path, list[Path]] = {}
        calls = program.calls
        self._lost = {calls[n].path: why for n, why in reversed(program.lost.items())}
        self.reasons = dict(self._lost)

    def link(self, paths: Collection[Path]) -> list[Backward]:
        """Fold the batch norms after these layers into them."""
        found: dict[Path, list[tuple[Place, _Follow]]] = defaultdict(list)
        for visit in self._program.visits:
            if visit.call.path in paths:
                found[visit.call.path].append((visit, self._follow(visit)))
        new: dict[Path, list[Path]] = {}
        reasons = dict(self._lost)
        for path, each in found.items():
            new[path] = sorted({follow.norm.call.path for _, follow in each if follow.norm})
            whys = [follow.reason for _, follow in each if follow.reason]
            if len(new[path]) > 1:
                before = " and ".join(map(quoted, new[path]))
                whys = [f"it is used {len(each)} times, before {before}"]
            reasons |= {path: whys[0]} if whys else {}
        self._refuse_others(found, new, reasons)
        edits: list[Backward] = []
        for path, each in found.items():
            visit, (norm, _, channel, plain) = each[0]
            if path in reasons or norm is None:
                continue
            edit = Backward(visit.call, norm.call, channel, plain)
            edits.append(edit)
            self.links[path].append(edit)
            self.exits |= {v.start: f.norm.result for v, f in each if f.norm}
        for path, norms in new.items():
            if path not in self.targets:
                self.targets[path] = norms
                self.reasons |= {path: reasons[path]} if path in reasons else {}
            elif path not in reasons:
                self.targets[path] = [*self.targets[path], *norms]
        return edits

    def _refuse_others(self, found: Any, new: dict[Path, list[Path]], reasons: Any) -> None:
        """Refuse batch norms that are also called on outputs of other layers."""
        for _ in new:
            fed = {
                follow.norm.start
                for path, each in found.items()
                if path not in reasons
                for _, follow in each
                if follow.norm
            }
            left = {v.call.path for v in self._program.visits if v.call.norm and v.start not in fed}
            left |= {self._program.calls[number].path for number in self._program.lost}
            for path, norms in new.items():
                for norm in left.intersection(norms):
                    reasons.setdefault(path, f"{quoted(norm)} is also used for another input")

    def _follow(self, visit: Place) -> _Follow:
        """Follow the output of a layer to a batch norm; say why that can't be folded."""
        program, shape = self._program, visit.call.shapes["exit"]
        first = len(shape) - visit.call.linear.features
        value, flow, plain = self.exits[visit.start], flow_of(shape, range(first, len(shape))), True
        while True:
            users = program.uses[value]
            norms = [v for u in users if (v := program.starting.get(u)) and v.call.norm]
            if len(users) != 1:
                names = " and ".join(sorted({program.named(u) for u in users}))
                only = "only " if norms else ""
                reason = f"its output goes into {names}, not {only}into a batch norm"
                reason = reason if users else "its output is not used"
                return _Follow(next(iter(norms), None), reason)
            if norms:
                break
            step = program.steps[users[0]]
            found = None if step.mark else onward(step, value, flow, program.literals)
            if found is None or len(step.results) != 1:
                reason = f"its output goes into {program.named(users[0])}, not into a batch norm"
                return _Follow(None, reason)
            plain &= step.name in SAME
            value, flow = step.results[0], found[0]
        channel, reason = _channel(flow, norms[0])
        reason = reason or program.trouble(visit) or program.trouble(norms[0])
        plain &= reason is None and np.array_equal(channel, np.arange(channel.size))
        return _Follow(norms[0], reason, channel, plain)


def _channel(flow: Flow, norm: Place) -> tuple[np.ndarray, str | None]:
    """The channel of a batch norm for each output of a layer, or why it can't be folded."""
    channel = np.full(flow.channels.max() + 1, -1)
    found, channels = (", ".join(map(str, sorted(a))) for a in (norm.call.axes, flow.axes))
    where = f"the batch norm is over axis {found} of its output, but its channels are {channels}"
    if not flow.axes.issuperset(norm.call.axes):
        return channel, where
    own = flow_of(norm.call.input, norm.call.axes).channels
    outputs, channels = np.broadcast_arrays(flow.channels, own)
    channel[outputs] = channels
    if (channel[outputs] != channels).any():
        return channel, where
    if flow.scaled:
        return channel, f"its output is {flow.scaled} before the batch norm"
    return channel, None


def _rows(
    program: Program,
    before: _Before,
    branches: Branches,
    after: list[Forward],
    whys: dict[Path, str],
) -> list[Row]:
    """A row for each layer, in call order, and for each batch norm without a layer."""
    seen = {v.call.path: v for v in program.visits}
    there = {program.calls[number].path for number in program.lost} | set(seen)
    ahead: dict[Path, list[Path]] = defaultdict(list)
    for edit in after:
        ahead[edit.layer.path].append(edit.norm.path)
    for host, norm in branches.norms:
        ahead[host].append(norm)
    after_it = {norm for norms in ahead.values() for norm in norms}
    paired = after_it.union(*before.targets.values())
    rows = []
    for path, is_norm in {call.path: call.norm for call in program.calls}.items():
        name = "/".join(path)
        if not is_norm and path in there:
            folded = {link.norm.path for link in before.links[path]}
            rows += [Row(name, "/".join(norm), None) for norm in ahead[path]]
            for norm in before.targets.get(path, []):
                why = None if norm in folded else before.reasons.get(path)
                gone = why is not None and norm in after_it
                rows.append(Row(name, "" if gone else "/".join(norm), why))
            if not (before.targets.get(path) or ahead[path] or path in branches.paths):
                rows.append(Row(name, "", before.reasons.get(path)))
        elif is_norm and path in there - paired:
            rows.append(Row("", name, _why(program, before, seen, path, whys)))
    return rows


def _why(
    program: Program, before: _Before, seen: dict[Path, Place], path: Path, whys: dict[Path, str]
) -> str:
    """Why a batch norm is folded into neither a layer before nor after it."""
    if reason := before.reasons.get(path) or program.trouble(seen[path]):
        return reason
    maker = program.makers.get(seen[path].source)
    what = "an input of the model" if maker is None else program.named(maker)
    why = f"its input comes from {what}, not from a conv or dense layer"
    return f"{why}, and {whys[path]}" if whys.get(path) else why
