"""Which name of a PyTorch state dict is which array of a Flax model."""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from bnjax import globs

Rename = Mapping[str, str] | Callable[[str], str]

_PARAMETERS = {"kernel": "weight", "scale": "weight", "embedding": "weight"}
_STATISTICS = {"mean": "running_mean", "var": "running_var", "count": "num_batches_tracked"}
COUNTER = _STATISTICS["count"]


class Name(NamedTuple):
    """The name of an array of a Flax model: its module, its own name, and what it is."""

    module: tuple[str, ...]
    leaf: str
    statistic: bool = False

    def __str__(self) -> str:  # noqa: D105 - the class says it
        return "/".join((*self.module, self.leaf))

    @property
    def in_torch(self) -> str:
        """The same name as PyTorch writes it."""
        names = _STATISTICS if self.statistic else _PARAMETERS
        return ".".join((*self.module, names.get(self.leaf, self.leaf)))

    @property
    def exported(self) -> str:
        """A name for PyTorch if there is none to match: a number at an end becomes a module."""
        module = "".join(re.sub(r"_(\d+)$", r".\1", name) + "." for name in self.module)
        return module + self.in_torch.rpartition(".")[2]


class Matching(NamedTuple):
    """Names of PyTorch with their counterparts in Flax, and what is left over on both sides."""

    pairs: dict[str, Name]
    ambiguous: list[tuple[list[str], list[Name]]]
    torch_only: list[str]
    flax_only: list[Name]


def renamed(names: Sequence[str], rename: Rename | None) -> dict[str, str]:
    """Each PyTorch name with the name to look for. Of a mapping, the longest prefix counts."""
    if rename is None:
        return {name: name for name in names}
    if callable(rename):
        return {name: rename(name).replace("/", ".") for name in names}
    for old in rename:
        globs.check_fits(old, any(_prefix_of(old, name) for name in names), names, "name to rename")
    return {name: _by_prefix(name, rename) for name in names}


def _prefix_of(prefix: str, name: str) -> bool:
    """Whether this is the name, or that of a module which it is in."""
    return not prefix or name == prefix or name.startswith(f"{prefix}.")


def _by_prefix(name: str, rename: Mapping[str, str]) -> str:
    found = max((old for old in rename if _prefix_of(old, name)), key=len, default=None)
    if found is None:
        return name
    rest = name.removeprefix(found).removeprefix(".")
    return ".".join(filter(None, (rename[found].replace("/", "."), rest)))


def match(wanted: Mapping[str, str], names: Iterable[Name]) -> Matching:
    """Pair each PyTorch name, by the one `wanted` in its place, with one of Flax's.

    First those that are the same, and then those that are nearly, as `_PASSES` says.
    """
    torch, flax = list(wanted), list(names)
    pairs: dict[str, Name] = {}
    ambiguous = []
    for spelled, form in _PASSES:
        left, right = defaultdict(list), defaultdict(list)
        for key in torch:
            left[form(wanted[key])].append(key)
        for name in flax:
            right[form(spelled(name))].append(name)
        for shared in left.keys() & right.keys():
            keys, there = left[shared], right[shared]
            if len(keys) == len(there) == 1:
                pairs[keys[0]] = there[0]
            else:
                ambiguous.append((keys, there))
        torch = [key for key in torch if form(wanted[key]) not in right]
        flax = [name for name in flax if form(spelled(name)) not in left]
    return Matching(pairs, sorted(ambiguous), torch, flax)


def _tokens(name: str) -> tuple[str, ...]:
    return tuple(re.split(r"[._]", name))


def _without_layers(name: str) -> tuple[str, ...]:
    return _tokens(re.sub(r"(^|[._])layers[._](?=\d)", r"\1", name))


# First the names in Flax, which `rename` may give in full; then those in PyTorch: `layer1.0.bn1` is
# `layer1/0/bn1`; then `layer1_0/bn1`; and the `0` of a PyTorch `Sequential` is Flax's `layers_0`.
_PASSES: tuple[tuple[Callable[[Name], str], Callable[[str], Any]], ...] = (
    (lambda name: ".".join((*name.module, name.leaf)), str),
    (lambda name: name.in_torch, str),
    (lambda name: name.in_torch, _tokens),
    (lambda name: name.in_torch, _without_layers),
)
