"""Match the layers of an auto-named Flax model with PyTorch's by order and shape."""

import re
from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from bnjax.checkpoints.conversion.blocks import ATTENTION
from bnjax.checkpoints.conversion.names import COUNTER, Name

_STATES = 20_000  # the most states to search


class Unit(NamedTuple):
    """A layer: its name, and its kind and shapes, which a counterpart must share."""

    name: str
    like: Hashable


class Node(NamedTuple):
    """A Flax module: its own arrays, if any, and its submodules in chains (`Conv_0`, `Conv_1`)."""

    unit: Unit | None
    chains: tuple[tuple["Node", ...], ...]
    size: int


def by_order(
    found: Any, torch: Mapping[str, np.ndarray], leaves: Mapping[Name, Any], ruled: Any
) -> tuple[dict[str, str], int] | None:
    """PyTorch layer names with Flax paths, and the number of ways to match them.

    PyTorch's layers are in order. Flax orders only modules of the same class in the same parent,
    `Conv_0` before `Conv_1`, and the layers of a module stay together.
    """
    theirs, ours = _of_torch(found, torch), _of_flax(found, leaves, ruled)
    if len(theirs) != len(ours) or not ours:
        return None
    search = _Search([unit.like for unit in theirs])
    root = _node((), ours)
    ways = search.ways(root, 0)
    if not ways:
        return _by_kind(theirs, [*ours.values()])
    order = [unit.name for unit in search.order(root, 0)]
    return {unit.name: name for unit, name in zip(theirs, order, strict=True)}, ways


def _by_kind(theirs: Sequence[Unit], ours: Sequence[Unit]) -> tuple[dict[str, str], int] | None:
    """Match the layers of each shape in order, if no order of all layers matches."""
    kinds = []
    for units in (theirs, ours):
        kinds.append(defaultdict(list))
        for unit in units:
            kinds[-1][unit.like].append(unit.name)
    one, other = kinds
    if {k: len(v) for k, v in one.items()} != {k: len(v) for k, v in other.items()}:
        return None
    pairs = {a: b for kind in one for a, b in zip(one[kind], other[kind], strict=True)}
    several = any(len(names) > 1 for names in one.values())
    return {unit.name: pairs[unit.name] for unit in theirs}, 1 + several


def _of_torch(found: Any, torch: Mapping[str, np.ndarray]) -> list[Unit]:
    grouped = {key: each for each in found.groups for key in each.keys.values()}
    units: dict[str, Any] = {}
    for key in found.torch_only:
        if key in grouped:
            group = grouped[key]
            units[group.place] = (group.kind, group.sizes if group.kind != ATTENTION else ())
        elif not key.endswith(COUNTER):
            module, _, leaf = key.rpartition(".")
            units.setdefault(module, set()).add((leaf, torch[key].shape))
    return [Unit(name, _frozen(like)) for name, like in units.items()]


def _of_flax(found: Any, leaves: Mapping[Name, Any], ruled: Any) -> dict[tuple[str, ...], Unit]:
    inside = {
        (*each.path, child): each for each in found.blocks for child in each.children.values()
    }
    units: dict[tuple[str, ...], Any] = {}
    for name in sorted(found.flax_only, key=lambda name: _natural(name.module)):
        if name.module in inside:
            block = inside[name.module]
            units[block.path] = (block.kind, block.sizes)
        elif not (name.statistic and name.leaf == "count"):
            shape = ruled.layout(name, leaves[name].value.shape).torch_shape
            leaf = name.in_torch.rpartition(".")[2]
            units.setdefault(name.module, set()).add((leaf, shape))
    return {path: Unit("/".join(path), _frozen(like)) for path, like in units.items()}


def _frozen(like: Any) -> Hashable:
    return frozenset(like) if isinstance(like, set) else like


def _natural(path: tuple[str, ...]) -> list[tuple[str, int]]:
    return [_numbered(name) for name in path]


def _numbered(name: str) -> tuple[str, int]:
    """The base of a name and its number, 0 if it has none."""
    base, number = re.fullmatch(r"(.*?)_?(\d*)", name).groups()  # type: ignore[union-attr]
    return base, int(number or 0)


def _node(path: tuple[str, ...], units: Mapping[tuple[str, ...], Unit]) -> Node:
    """The module at this path, with the layers inside it."""
    depth = len(path)
    parts: dict[str, dict[tuple[str, ...], Unit]] = defaultdict(dict)
    for each, unit in units.items():
        if len(each) > depth:
            parts[each[depth]][each] = unit
    chains: dict[str, list[Node]] = defaultdict(list)
    for name in sorted(parts, key=_numbered):
        chains[_numbered(name)[0]].append(_node((*path, name), parts[name]))
    ordered = sorted(chains.values(), key=lambda chain: max(node.size for node in chain))
    own = units.get(path)
    size = (own is not None) + sum(node.size for chain in ordered for node in chain)
    return Node(own, tuple(map(tuple, ordered)), size)


class _Search:
    """A search for orders of submodules in which their layers match a given sequence."""

    def __init__(self, likes: Sequence[Hashable]) -> None:
        self._likes, self._known, self._budget = likes, {}, _STATES

    def ways(self, node: Node, start: int) -> int:
        """The number of orders in which the layers of a node match the sequence from `start`."""
        key = id(node), start
        if key not in self._known:
            self._known[key] = self._merges(node, (0,) * len(node.chains), start, {})
        return self._known[key]

    def order(self, node: Node, start: int) -> Iterator[Unit]:
        """The layers of a node in the first matching order."""
        if node.unit is not None:
            yield node.unit
            start += 1
        taken = [0] * len(node.chains)
        memo: dict[Any, int] = {}
        while any(at < len(chain) for at, chain in zip(taken, node.chains, strict=True)):
            for number, chain in enumerate(node.chains):
                if taken[number] < len(chain):
                    part, after = chain[taken[number]], [*taken]
                    after[number] += 1
                    fits = self.ways(part, start)
                    if fits and self._rest(node, tuple(after), start + part.size, memo):
                        yield from self.order(part, start)
                        taken, start = after, start + part.size
                        break

    def _merges(self, node: Node, taken: tuple[int, ...], start: int, memo: dict[Any, int]) -> int:
        if node.unit is not None:
            if start >= len(self._likes) or self._likes[start] != node.unit.like:
                return 0
            start += 1
        return self._rest(node, taken, start, memo)

    def _rest(self, node: Node, taken: tuple[int, ...], start: int, memo: dict[Any, int]) -> int:
        """The number of orders in which the submodules not yet taken match from `start`."""
        if taken in memo:
            return memo[taken]
        self._budget -= 1
        if self._budget < 0:
            return 0
        left = [n for n, chain in enumerate(node.chains) if taken[n] < len(chain)]
        found = 0 if left else 1
        for number in left:
            part = node.chains[number][taken[number]]
            fits = self.ways(part, start)
            if fits:
                after = tuple(at + (n == number) for n, at in enumerate(taken))
                found += fits * self._rest(node, after, start + part.size, memo)
        memo[taken] = found
        return found
