"""Merge branches of one input that are added into a single conv or dense layer."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from bnjax.models.folding.numbers import Backward, Merge
from bnjax.models.folding.program import Place, Program
from bnjax.models.folding.report import Branch
from bnjax.models.folding.windows import Window, taps
from bnjax.models.statistics import Path

_UNMOVED = {"name", "copy", "copy_p", "sharding_constraint"}
_CAST = {*_UNMOVED, "convert_element_type"}


class _Group(NamedTuple):
    """Calls with the same input whose outputs are added."""

    calls: list[Place]
    root: int | None  # the sum, if it has no other terms


class Branches:
    """Find and merge the branches of a program.

    Args:
        program: the program of the model.
        exits: the output of each call, after what was folded into it.

    Attributes:
        gone: paths of layers and batch norms that were merged into others.
        paths: paths of all layers in a sum of branches, merged or not.
        norms: pairs of a layer and a batch norm that was merged into it.
        report: what was merged, and why the rest was not.
    """

    def __init__(self, program: Program, exits: dict[int, int]) -> None:
        self._program, self._exits = program, exits
        self._values: set[int] = set()
        self._seen: set[tuple[Path, ...]] = set()
        self.gone: set[Path] = set()
        self.paths: set[Path] = set()
        self.norms: list[tuple[Path, Path]] = []
        self.report: list[Branch] = []

    def merge(self, links: Mapping[Path, list[Backward]]) -> list[Merge]:
        """Merge branches, considering each set of layers once.

        Args:
            links: the batch norms that were folded into each layer.
        """
        groups: dict[tuple[Path, ...], list[_Group]] = defaultdict(list)
        for group in self._groups(links):
            groups[tuple(sorted(call.call.path for call in group.calls))].append(group)
        found = []
        for paths, each in groups.items():
            if paths in self._seen:
                continue
            self._seen.add(paths)
            found += self._merged(each)
        return found

    def _merged(self, groups: list[_Group]) -> list[Merge]:
        """Merge groups with the same layers, in all of them or in none."""
        calls = sorted(groups[0].calls, key=lambda place: place.start)
        linear = [place for place in calls if not place.call.norm]
        host = max(linear, key=lambda p: _reach(p.call.linear.window, calls))
        found = []
        for place in calls:
            if place.call.path != host.call.path:
                merged = self._merge(host, place, groups)
                reason = merged if isinstance(merged, str) else None
                names = "/".join(place.call.path), "/".join(host.call.path)
                self.report.append(Branch(*names, reason))
                found += [merged] if isinstance(merged, Merge) else []
        gone = {merge.branch.path for merge in found}
        self.gone |= gone
        self.paths |= {place.call.path for place in linear}
        self.norms += [(m.host.path, m.branch.path) for m in found if m.branch.norm]
        if len(gone) == len(calls) - 1:
            for group in groups:
                start = next(p.start for p in group.calls if p.call.path == host.call.path)
                self._exits[start] = self._exits[start] if group.root is None else group.root
        return found

    def _merge(self, host: Place, place: Place, groups: list[_Group]) -> Merge | str:
        """The merge of a branch into a layer, or why it can't be merged."""
        for each in (host, place):
            if reason := self._program.trouble(each):
                return reason
            visits = [v for v in self._program.visits if v.call.path == each.call.path]
            lost = any(self._program.calls[n].path == each.call.path for n in self._program.lost)
            if len(visits) != len(groups) or lost:
                return f"'{'/'.join(each.call.path)}' is also used elsewhere"
        into, window = host.call.linear, _window(place, host)
        if not place.call.norm and place.call.linear.style != into.style:
            return "it computes in another dtype or precision"
        if opaque := into.opaque or place.call.linear.opaque:
            return f"one of them {opaque}"
        if into.mask is not None:
            return "the other has a kernel mask"
        if into.window is None or window is None:
            return f"a {host.call.linear.kind} and a {place.call.linear.kind} can't be merged"
        if place.call.norm and place.call.axes != (len(place.call.input) - 1,):
            return "its channels are not the last axis"
        found = taps(into.window, window, place.call.input)
        if isinstance(found, str):
            return found
        return Merge(host.call, place.call, found, window)

    def _groups(self, links: Mapping[Path, list[Backward]]) -> list[_Group]:
        """Calls with the same input whose outputs are added, in the order of the sums."""
        program = self._program
        taken = self.gone | {link.norm.path for each in links.values() for link in each}
        self._values = {*self._exits.values()}
        ends: dict[int, Place] = {}
        for visit in program.visits:
            path = visit.call.path
            plain = all(link.plain for link in links.get(path, ()))
            if path not in taken and plain and visit.end:
                ends[self._exits[visit.start]] = visit
        groups = []
        for step in program.steps:
            if step.name == "add" and not self._is_inner(step.results[0]):
                leaves = self._leaves(step.results[0])
                by_source: dict[int, list[Place]] = defaultdict(list)
                for leaf in leaves:
                    if leaf in ends:
                        by_source[self._origin(ends[leaf].source)].append(ends[leaf])
                for calls in by_source.values():
                    complete = len(calls) == len(leaves)
                    if len(calls) > 1 and not all(place.call.norm for place in calls):
                        groups.append(_Group(calls, step.results[0] if complete else None))
        return groups

    def _is_inner(self, value: int) -> bool:
        """Whether a sum is only a term of another."""
        users = self._program.uses[value]
        if len(users) != 1:
            return False
        step = self._program.steps[users[0]]
        if step.name in _CAST and not step.mark:
            return self._is_inner(step.results[0])
        return step.name == "add"

    def _leaves(self, root: int) -> list[int]:
        """The terms of a sum; -1 for those that are also used elsewhere."""
        program, leaves, sums = self._program, [], [root]
        while sums:
            for operand in program.steps[program.makers[sums.pop()]].operands:
                leaf = self._end(operand)
                maker = program.makers.get(leaf)
                once = self._used_once(operand, leaf)
                if self._is_zero(leaf):
                    continue
                is_sum = maker is not None and program.steps[maker].name == "add"
                if is_sum and once and leaf not in self._values:
                    sums.append(leaf)
                else:
                    leaves.append(leaf if once else -1)
        return leaves

    def _is_zero(self, value: int) -> bool:
        literal = self._program.literals.get(value)
        return literal is not None and not np.ndim(literal) and float(literal) == 0

    def _end(self, value: int) -> int:
        """The value before any casts, or the output of a layer."""
        while value not in self._values:
            maker = self._program.makers.get(value)
            step = None if maker is None else self._program.steps[maker]
            if step is None or step.name not in _CAST or step.mark:
                break
            value = step.operands[0]
        return value

    def _used_once(self, value: int, leaf: int) -> bool:
        """Whether a leaf is used only in the sum."""
        while len(self._program.uses[value]) == 1:
            if value == leaf:
                return True
            value = self._program.steps[self._program.makers[value]].operands[0]
        return False

    def _origin(self, value: int) -> int:
        """The value that the input of a layer is a copy of."""
        while (maker := self._program.makers.get(value)) is not None:
            step = self._program.steps[maker]
            if step.name not in _UNMOVED or (step.mark and step.mark[1] == "exit"):
                break
            value = step.operands[0]
        return value


def _window(place: Place, host: Place) -> Window | None:
    """The window of a branch; a batch norm is a depthwise conv with a single tap."""
    if not place.call.norm:
        return place.call.linear.window
    like = host.call.linear.window
    if like is None:
        return None
    ones = (1,) * len(like.size)
    return Window(ones, ones, ones, ones, ((0, 0),) * len(ones), place.call.input[-1])


def _reach(window: Window | None, calls: Sequence[Place]) -> tuple[int, int, int]:
    """A sort key that is largest for the kernel that can hold the others."""
    if window is None:
        return (-1, 0, 0)
    return (math.prod(window.extent), math.prod(window.size), -window.groups)
