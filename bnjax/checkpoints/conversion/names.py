"""Match the names of a PyTorch state dict with the arrays of a Flax model."""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from bnjax.checkpoints.conversion.words import nearest, option

Rename = Mapping[str, str] | Callable[[str], str]

_PARAMETERS: Mapping[str, str] = dict.fromkeys(
    ("kernel", "scale", "embedding", "negative_slope"), "weight"
)
_STATISTICS: Mapping[str, str] = {
    "mean": "running_mean",
    "var": "running_var",
    "count": "num_batches_tracked",
}
COUNTER = _STATISTICS["count"]


class Name(NamedTuple):
    """The name of an array in a Flax model: its module, its own name, and its kind."""

    module: tuple[str, ...]
    leaf: str
    statistic: bool = False

    def __str__(self) -> str:  # noqa: D105 - the class says it
        return "/".join((*self.module, self.leaf))

    @property
    def in_torch(self) -> str:
        """The name in PyTorch's spelling."""
        names = _STATISTICS if self.statistic else _PARAMETERS
        return ".".join((*self.module, names.get(self.leaf, self.leaf)))

    @property
    def exported(self) -> str:
        """A name for PyTorch without a state dict to match: trailing numbers become modules."""
        module = "".join(re.sub(r"_(\d+)$", r".\1", name) + "." for name in self.module)
        return module + self.in_torch.rpartition(".")[2]


class Matching(NamedTuple):
    """PyTorch names with their counterparts in Flax, and those without on either side."""

    pairs: dict[str, Name]
    ambiguous: list[tuple[list[str], list[Name]]]
    torch_only: list[str]
    flax_only: list[Name]


def respelled(name: str) -> str:
    """The name of a recurrent layer's array with its number as a module: `rnn.l0.weight_ih`."""
    return re.sub(r"(weight|bias)_(ih|hh)_(l\d+(?:_reverse)?)$", r"\3.\1_\2", name)


def renamed(
    names: Sequence[str], rename: Rename | None, flax: Iterable[str] = ()
) -> dict[str, str]:
    """Each PyTorch name with the name to look for; in a mapping, the longest prefix wins."""
    if rename is None:
        return {name: name for name in names}
    if isinstance(rename, Mapping):
        _check_mapping(rename, names, [path.replace("/", ".") for path in flax])
        return {name: _by_prefix(name, rename) for name in names}
    if not callable(rename):
        raise TypeError(
            "`rename` must map PyTorch names to Flax names, such as "
            '{"backbone.stem": "encoder/conv1"}, or be a function from name to name, got '
            f"{type(rename).__name__}."
        )
    given = {name: rename(name) for name in names}
    for name, new in given.items():
        if not isinstance(new, str):
            raise TypeError(f"`rename` must return a str, got {type(new).__name__} for {name!r}.")
    return {name: new.replace("/", ".") for name, new in given.items()}


def modules(names: Iterable[str]) -> list[str]:
    """The names and the names of all modules around them, each once."""
    found: dict[str, None] = {}
    for name in names:
        parts = name.split(".")
        found |= dict.fromkeys(".".join(parts[:end]) for end in range(1, len(parts) + 1))
    return [*found]


def _check_mapping(rename: Mapping[Any, Any], names: Sequence[str], flax: Sequence[str]) -> None:
    """Raise if a name is not a str, or PyTorch has no such name."""
    there = {"", *modules(names), *modules(map(respelled, names))}
    for old, new in rename.items():
        if not isinstance(old, str) or not isinstance(new, str):
            raise TypeError(f"`rename` must map str to str, got {old!r}: {new!r}.")
        if old in there:
            continue
        swapped = new.replace("/", ".")
        if swapped in there and old.replace("/", ".") in {*modules(flax)}:
            raise ValueError(
                "`rename` must map PyTorch names to Flax names, not the reverse: write "
                f"{option('rename', {swapped: old})}."
            )
        raise ValueError(
            "`rename` must map PyTorch names to Flax names, but PyTorch has no "
            f"{old!r}{nearest(old, modules(names))}."
        )


def _by_prefix(name: str, rename: Mapping[str, str]) -> str:
    """The name, with the longest prefix in the mapping replaced."""
    forms = {form: modules([form]) for form in (respelled(name), name)}
    found = [(old, form) for form, olds in forms.items() for old in ("", *olds) if old in rename]
    if not found:
        return name
    old, form = max(found, key=lambda each: (len(each[0]), each[1] == name))
    rest = form.removeprefix(old).removeprefix(".")
    return ".".join(filter(None, (rename[old].replace("/", "."), rest)))


def match(
    wanted: Mapping[str, str], names: Iterable[Name], passes: Sequence[Any] | None = None
) -> Matching:
    """Pair each PyTorch name, replaced as in `wanted`, with a Flax name.

    The passes go from exact matches to looser ones, by default those of `_PASSES`.
    """
    torch, flax = list(wanted), list(names)
    pairs: dict[str, Name] = {}
    ambiguous = []
    for spelled, form in passes or _PASSES:
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


def match_modules(wanted: Sequence[str], paths: Iterable[tuple[str, ...]]) -> dict[str, tuple]:
    """Pair the names of recurrent and attention layers in PyTorch with their paths in Flax."""
    names = {name: name for name in wanted}
    found = match(names, [Name(path, "") for path in paths], _MODULE_PASSES)
    return {name: there.module for name, there in found.pairs.items()}


def _in_flax(name: Name) -> str:
    return str(name).replace("/", ".")


def _in_torch(name: Name) -> str:
    return name.in_torch


def _module(name: Name) -> str:
    return ".".join(name.module)


def _tokens(name: str) -> tuple[str, ...]:
    return tuple(re.split(r"[._]", name))


def _without_layers(name: str) -> tuple[str, ...]:
    return _tokens(re.sub(r"(^|[._])(?:layers[._])+(?=\d)", r"\1", name))


def _as_layers(name: str) -> tuple[str, ...]:
    """Tokens without `cell`; both `l1_reverse` and a second `backward_rnn` are (1, reverse)."""
    name = re.sub(r"(^|\.)l(\d+)(?=[._]|$)", r"\1\2", name)
    name = re.sub(r"(^|\.)forward_rnn(?=\.|$)", r"\1cell", name)
    name = re.sub(r"(^|\.)backward_rnn(?=\.|$)", r"\1reverse", name)
    return tuple(part for part in _without_layers(name) if part not in ("cell", ""))


def _as_one_layer(name: str) -> tuple[str, ...]:
    return _as_layers(re.sub(r"(^|\.)l0(?=[._]|$)", r"\1cell", name))


# Full Flax names, which `rename` may give; then `layer1.0.bn1` as `layer1/0/bn1`, or as
# `layer1_0/bn1`; and the `0` of a PyTorch `Sequential` as Flax's `layers_0`.
_PASSES: tuple[tuple[Callable[[Name], str], Callable[[str], Any]], ...] = (
    (_in_flax, str),
    (_in_torch, str),
    (_in_torch, _tokens),
    (_in_torch, _without_layers),
)
# PyTorch's `rnn.l0` is `rnn/0/cell`, or `rnn/cell` if it is the only layer.
_MODULE_PASSES = tuple((_module, form) for form in (str, _tokens, _as_layers, _as_one_layer))
