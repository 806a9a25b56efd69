"""Plan a conversion: the counterpart and the layout of each array, and all problems."""

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from bnjax.checkpoints.conversion import problems, repeated
from bnjax.checkpoints.conversion.blocks import Block, Group, groups
from bnjax.checkpoints.conversion.layouts import Layout
from bnjax.checkpoints.conversion.names import COUNTER, Name, match, match_modules, renamed
from bnjax.checkpoints.conversion.rules import Options, Rules, matching, rules
from bnjax.checkpoints.conversion.stacked import Attention, Recurrent, stacked
from bnjax.checkpoints.conversion.trees import Leaf
from bnjax.checkpoints.tensors import as_numpy

Arrays = Mapping[str, np.ndarray]


class Found(NamedTuple):
    """All pairs of names, including parts of stacked arrays, and the names without counterparts."""

    pairs: dict[str, Name]
    stacks: list[Attention | Recurrent]
    twins: dict[str, list[str]]  # other PyTorch names of the same array
    ambiguous: list[tuple[list[str], list[Name]]]
    torch_only: dict[str, str]  # with the names to look for
    flax_only: list[Name]
    groups: list[Group]  # whose names are in `torch_only`
    blocks: list[Block]  # whose names are in `flax_only`

    @property
    def converted(self) -> set[str]:
        """The names of all PyTorch arrays that are converted."""
        stacks = {key for each in self.stacks for key in each.group.keys.values()}
        twins = {key for others in self.twins.values() for key in others}
        return {*self.pairs, *stacks, *twins}


@dataclasses.dataclass
class Plan:
    """The counterpart and layout of each PyTorch array, and all problems."""

    pairs: dict[str, tuple[Name, Layout]]
    problems: list[str]
    stacks: list[Attention | Recurrent] = dataclasses.field(default_factory=list)
    twins: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    ignored: list[str] = dataclasses.field(default_factory=list)  # PyTorch names
    rules: Rules | None = None

    def check(self, arrays: Arrays) -> None:
        """Raise one error with all problems, including values of these arrays by PyTorch name."""
        values = [
            line
            for key, (name, _) in self.pairs.items()
            for line in problems.invalid(key, name, arrays[key])
        ]
        problems.refuse(self.problems, values)

    def split(self, arrays: Arrays) -> dict[str, np.ndarray]:
        """PyTorch's arrays, together with the parts of stacked ones."""
        self.problems += [line for each in self.stacks for line in each.lost(arrays)]
        return {**arrays, **_parts(self.stacks, arrays)}

    def join(self, arrays: dict[str, np.ndarray], old: Arrays) -> dict[str, np.ndarray]:
        """PyTorch's arrays with stacked ones joined, under all their names."""
        for each in self.stacks:
            labels = {part: each.label(part) for part in each.split(old)}
            parts = {part: arrays[label] for part, label in labels.items()}
            self.problems += each.unknown(parts)
            arrays |= each.join(parts, old)
        problems.refuse(self.problems, ())
        for key, others in self.twins.items():
            arrays |= dict.fromkeys(others, arrays[key])
        return {key: arrays[key] for key in old}

    def stale(self, arrays: Arrays, old: Arrays) -> dict[str, str]:
        """Ignored arrays with old values, each with the array that it equalled before."""
        equal = problems.equal_ones(old, self.ignored, self.pairs)
        return {k: o for k, o in equal.items() if not np.array_equal(arrays[o], old[o])}


def state_arrays(state_dict: Any, argument: str) -> dict[str, np.ndarray]:
    """The arrays of a state dict; an error names all values that are not arrays."""
    if not isinstance(state_dict, Mapping):
        raise TypeError(
            f"`{argument}` must be a mapping of names to arrays, got "
            f"{type(state_dict).__name__}. For a torch module, pass `module.state_dict()`."
        )
    arrays = {name: as_numpy(value) for name, value in state_dict.items()}
    wrong = {n: type(state_dict[n]).__name__ for n, array in arrays.items() if array is None}
    if wrong:
        nested = [name for name in wrong if isinstance(state_dict[name], Mapping)]
        repair = f" Did you mean {argument}[{nested[0]!r}]?" if nested else ""
        raise TypeError(
            f"`{argument}` must hold only dense arrays of numbers, but these are not: {wrong}."
            f"{repair}"
        )
    return {name: array for name, array in arrays.items() if array is not None}


def find(torch: Arrays, leaves: Mapping[Name, Leaf], ruled: Rules, options: Options) -> Found:
    """Pair the names of both sides: arrays first, then layers with stacked arrays."""
    as_path = {name: name.replace(".", "/") for name in torch}
    ignored = matching("ignore", options.ignore, {*as_path.values(), *map(str, leaves)}, "name")
    kept = [name for name in torch if as_path[name] not in ignored]
    wanted = renamed(kept, options.rename, map(str, leaves))
    matched = match(wanted, [name for name in leaves if str(name) not in ignored])
    pairs, ambiguous = dict(matched.pairs), []
    for keys, names in matched.ambiguous:
        if len(names) == 1 and all(_equal(torch[keys[0]], torch[key]) for key in keys[1:]):
            pairs |= dict.fromkeys(keys, names[0])
        else:
            ambiguous.append((keys, names))
    lost = {key: wanted[key] for key in matched.torch_only}
    owners = {name: key for key, name in pairs.items()}
    for key, name in match(lost, owners).pairs.items():
        if _equal(torch[key], torch[owners[name]]):
            pairs[key] = name
            del lost[key]
    alone = {*matched.flax_only}
    left = [each for each in ruled.blocks if _inside(each) <= alone]
    stacks, layers = _stacks(lost, torch, left)
    alone -= {name for each in stacks for name in _inside(each.block)}
    paired = {name for each in stacks for name in each.group.keys.values()}
    for each in stacks:
        known = {name.in_torch: name for name in leaves if name.module[:-1] == each.block.path}
        for child, leaf in each.split(torch):
            name = known.get(each.block.at(child, leaf))
            if name is not None:
                pairs[each.label((child, leaf))] = name
                alone.discard(name)
    twins, pairs = _twins(torch, pairs, paired)
    same = {other for others in twins.values() for other in others}
    return Found(
        _ordered(pairs, torch, stacks),
        stacks,
        twins,
        ambiguous,
        {
            key: name
            for key, name in lost.items()
            if key not in paired and key not in same and not _counts_batches(key, pairs)
        },
        [name for name in matched.flax_only if name in alone],
        [each for each in layers if not {*each.keys.values()} & paired],
        [each for each in left if _inside(each) <= alone],
    )


def plan(torch: Arrays, leaves: Mapping[Name, Leaf], options: Options, model: Any = None) -> Plan:
    """Pair the arrays of both sides, and describe each that has no counterpart or mismatches it."""
    ruled = rules(leaves, options, model)
    found = find(torch, leaves, ruled, options)
    arrays = {**torch, **_parts(found.stacks, torch)}
    pairs = {
        key: (name, ruled.layout(name, leaves[name].value.shape, arrays[key].shape))
        for key, name in found.pairs.items()
    }

    def attempt(rename: Mapping[str, str]) -> Found | None:
        """The result with this `rename`, if it pairs all missing arrays in the right shapes."""
        after = find(torch, leaves, ruled, options._replace(rename=rename))
        new, arrays = {*found.flax_only}, {**torch, **_parts(after.stacks, torch)}
        for key, name in after.pairs.items():
            shape = leaves[name].value.shape
            there = arrays[key].shape
            if name in new and ruled.layout(name, shape, there).torch_shape != there:
                return None
        return None if after.flax_only or after.ambiguous else after

    lines = problems.of_names(found, torch, leaves, ruled, options.rename, attempt)
    for key, (name, placed) in pairs.items():
        lines += problems.mismatches(key, arrays[key], leaves[name], name, placed)
    if lines and (stack := repeated.stack(leaves, model)):
        lines.append(f"stacked: {stack}, which PyTorch keeps apart. Convert one layer at a time")
    ignored = [key for key in torch if key not in {*found.torch_only, *found.converted}]
    return Plan(pairs, lines, found.stacks, found.twins, ignored, ruled)


def exported(leaves: Mapping[Name, Leaf], options: Options, model: Any) -> Plan:
    """Plan an export without a state dict: each array gets a PyTorch name made from its path."""
    if options.rename is not None:
        raise ValueError(
            "`rename` maps PyTorch names to Flax names, so it needs the PyTorch names: pass "
            "`like=torch_model.state_dict()`."
        )
    planned, ruled = Plan({}, []), rules(leaves, options, model)
    for name, leaf in leaves.items():
        if name.exported in planned.pairs:
            both = [leaves[other].path for other in (planned.pairs[name.exported][0], name)]
            planned.problems.append(f"ambiguous: {name.exported} for {', '.join(both)}")
        planned.pairs[name.exported] = name, ruled.layout(name, leaf.value.shape)
    return planned


def without(leaves: Mapping[Name, Leaf], ignore: Any) -> dict[Name, Leaf]:
    """The arrays of a Flax model that are not ignored."""
    ignored = matching("ignore", ignore, map(str, leaves), "name")
    return {name: leaf for name, leaf in leaves.items() if str(name) not in ignored}


def _stacks(
    wanted: Mapping[str, str], torch: Arrays, there: Iterable[Block]
) -> tuple[list[Attention | Recurrent], list[Group]]:
    """The layers with stacked arrays that match a block, and all such layers."""
    layers = groups(wanted, {key: torch[key].shape for key in wanted})
    by_path = {each.path: each for each in there}
    paths = match_modules([each.module for each in layers], by_path)
    both = [(each, by_path[paths[each.module]]) for each in layers if each.module in paths]
    return [stacked(group, block) for group, block in both if group.kind == block.kind], layers


def _inside(block: Block) -> set[Name]:
    return {Name((*block.path, child), "kernel") for child in block.children.values()}


def _parts(stacks: Iterable[Attention | Recurrent], torch: Arrays) -> dict[str, np.ndarray]:
    return {each.label(part): array for each in stacks for part, array in each.split(torch).items()}


def _ordered(
    pairs: Mapping[str, Name], torch: Arrays, stacks: Iterable[Attention | Recurrent]
) -> dict[str, Name]:
    """The pairs in the order of PyTorch's names."""
    first = {min(map(list(torch).index, each.group.keys.values())): each for each in stacks}
    found: dict[str, Name] = {}
    for number, key in enumerate(torch):
        if number in first:
            labels = map(first[number].label, first[number].split(torch))
            found |= {label: pairs[label] for label in labels if label in pairs}
        if key in pairs:
            found.setdefault(key, pairs[key])
    return found


def _twins(
    torch: Arrays, pairs: Mapping[str, Name], stacks: set[str]
) -> tuple[dict[str, list[str]], dict[str, Name]]:
    """Other names of each array, by its first name with a counterpart; and the pairs without them.

    Names share an array if they share memory, or if `rename` gives equal arrays one name.
    """
    places: dict[Any, list[str]] = defaultdict(list)
    for key, array in torch.items():
        if array.size:
            place = array.ctypes.data, array.shape, array.strides, array.dtype
            places[*place, key.rpartition(".")[2]].append(key)
    by_name: dict[Name, list[str]] = defaultdict(list)
    for key, name in pairs.items():
        by_name[name].append(key)
    twins = {keys[0]: keys[1:] for keys in by_name.values() if len(keys) > 1}
    single = {keys[0]: name for name, keys in by_name.items()}
    done = {*pairs, *stacks}
    for keys in places.values():
        written = [key for key in keys if key in single or key in stacks]
        if written:
            others = [key for key in keys if key not in done]
            twins.setdefault(written[0], []).extend(others)
    return {key: others for key, others in twins.items() if others}, single


def _equal(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two arrays are the same, bit for bit."""
    alike = one.shape == other.shape and one.dtype == other.dtype
    return alike and one.tobytes() == other.tobytes()


def _counts_batches(name: str, pairs: Mapping[str, Name]) -> bool:
    """Whether it is the counter of a batch norm, which Flax may not need."""
    module, _, leaf = name.rpartition(".")
    mean = f"{module}.running_mean" if module else "running_mean"
    return leaf == COUNTER and mean in pairs and pairs[mean].statistic
