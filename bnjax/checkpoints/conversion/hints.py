"""Suggest how to make names match: remove prefixes or parametrizations, skip other networks."""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from bnjax.checkpoints.conversion.names import COUNTER, Name, Rename, match
from bnjax.checkpoints.conversion.order import by_order
from bnjax.checkpoints.conversion.words import few, option

# Modules that only wrap another: DataParallel, torch.compile, FSDP, checkpointing, DeepSpeed.
_WRAPPERS = frozenset(
    ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module")
)
_TRIED = 12  # the most prefixes to try
_WRITTEN = 12  # the most entries of a mapping to write out
_NETWORKS = 3  # the most networks to suggest
_DEPTH = 4  # the most modules in a prefix

_TORCH = "torch.nn.utils"
# Parametrizations: the suffixes of two of their arrays, their name, and the call that removes them.
_PARAMETRIZED = (
    ("_g", "_v", "weight norm", f"{_TORCH}.remove_weight_norm(module)"),
    ("_orig", "_u", "spectral norm", f"{_TORCH}.remove_spectral_norm(module)"),
    ("_orig", "_mask", "pruning", f"{_TORCH}.prune.remove(module, 'weight')"),
)
_NEW = re.compile(r"((?:.*\.)?)parametrizations\.([^.]+)\.(.*)")
_REMOVE = f"{_TORCH}.parametrize.remove_parametrizations(module, 'weight')"


def parametrized(found: Any) -> tuple[list[str], set[str], set[Name]]:
    """A line for each kind of parametrization, their arrays in PyTorch, and the weights in Flax."""
    if any("/" in name.leaf for name in found.flax_only):  # Flax's own WeightNorm or SpectralNorm
        return [], set(), set()
    modules: dict[tuple[str, str], dict[str, list[str]]] = {}
    weights: dict[str, str] = {}
    names = {*found.torch_only.values()}
    for key, name in found.torch_only.items():
        computed = _computed(name, names)
        if computed is not None:
            kind, call, weight = computed
            modules.setdefault((kind, call), {}).setdefault(weight, []).append(key)
            weights[key] = weight
    there = match({weight: weight for weight in weights.values()}, found.flax_only).pairs
    lines = [
        f"{kind} of {few(list(each))}: this parametrization computes the weight instead of saving "
        f"it. Remove it before `state_dict()`: {call}"
        for (kind, call), each in modules.items()
    ]
    return lines, {*weights}, {*there.values()}


def _computed(name: str, names: set[str]) -> tuple[str, str, str] | None:
    """The kind, the removing call and the weight, if an array is part of a parametrization."""
    if new := _NEW.fullmatch(name):
        inside = {other for other in names if other.startswith(name.removesuffix(new[3]))}
        kind = "parametrization"
        if any(other.endswith("original0") for other in inside):
            kind = "weight norm"
        elif any(other.endswith("._u") for other in inside):
            kind = "spectral norm"
        return kind, _REMOVE.replace("weight", new[2]), f"{new[1]}{new[2]}"
    for one, other, kind, call in _PARAMETRIZED:
        for weight in re.findall(rf"^(.*)(?:{one}|{other}|_v)$", name):
            if {f"{weight}{one}", f"{weight}{other}"} <= names:
                leaf = weight.rpartition(".")[2]
                return kind, call.replace("'weight'", repr(leaf)), weight
    return None


def renames(
    found: Any,
    torch: Mapping[str, np.ndarray],
    leaves: Mapping[Name, Any],
    ruled: Any,
    rename: Rename | None,
    attempt: Callable[..., Any],
) -> Iterator[str]:
    """Lines with a `rename` that gives every array of the Flax model a counterpart."""
    if not found.torch_only or not found.flax_only or found.ambiguous or callable(rename):
        return
    if rename is None:
        lines = list(_prefixes(found, attempt))
        if lines:
            yield from lines
            return
    for front in ("", *dict.fromkeys(name.partition(".")[0] for name in found.torch_only)):
        inside = {k: v for k, v in found.torch_only.items() if not front or _in(k, front)}
        proposed = by_order(found._replace(torch_only=inside), torch, leaves, ruled)
        mapping, ways = proposed or ({}, 0)
        after = attempt({**(rename or {}), **mapping}) if mapping else None
        if after is not None:
            several = ", but another order matches too" if ways > 1 else ""
            others = _ignored([*after.torch_only], [*found.torch_only])
            options = _options(option("rename", {**(rename or {}), **mapping}), others)
            yield f"by order and shape, names match with {options}{several}. Verify it with `check`"
            return


def _prefixes(found: Any, attempt: Callable[..., Any]) -> Iterator[str]:
    """Try to remove wrappers, to start below a PyTorch module, and to add modules of Flax."""
    lost = [name for name in found.torch_only if not name.endswith(COUNTER)]
    plain = [_plain(name) for name in lost]
    fronts = Counter(
        ".".join(parts[:end]) for parts in plain for end in range(min(len(parts), _DEPTH))
    )
    backs = _common([name.module for name in found.flax_only])
    size = len(found.flax_only)
    nearly = sorted(fronts, key=lambda front: (front != "", abs(fronts[front] - size)))
    for back in backs:
        suggested = 0
        for front in nearly[:_TRIED]:
            mapping = _without(lost, front, back)
            if not mapping:
                continue
            after = attempt(mapping)
            if after is None:
                continue
            others = _ignored([*after.torch_only], [*found.torch_only])
            yield _suggestion(mapping, front, others)
            suggested += 1
            if suggested == _NETWORKS or not others:
                return
        if suggested:
            return


def _suggestion(mapping: Mapping[str, str], front: str, others: Sequence[str]) -> str:
    """A line with the options to pass."""
    rename = option("rename", mapping)
    if (len(mapping) > _WRITTEN and "" not in mapping.values()) or len(mapping) > 2 * _WRITTEN:
        wrappers = "|".join(sorted(_WRAPPERS))
        removed = f'.removeprefix("{front}.")' if front else ""
        rename = f'rename=lambda name: re.sub(r"\\b({wrappers})\\.", "", name){removed}'
    if [*mapping.values()] == [""] and not others:
        (prefix,) = mapping
        return f"extra prefix {prefix!r}: remove it with {rename}"
    return f"names match with {_options(rename, others)}"


def _options(rename: str, ignored: Sequence[str]) -> str:
    return rename + (f", {option('ignore', ignored)}" if ignored else "")


def _in(name: str, module: str) -> bool:
    return name.startswith(f"{module}.")


def _plain(name: str) -> list[str]:
    """The parts of a name, without wrappers."""
    return [part for part in name.split(".") if part not in _WRAPPERS]


def _common(paths: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """The common prefixes of all paths, shortest first."""
    first, last = min(paths), max(paths)
    length = next(
        (i for i, pair in enumerate(zip(first, last, strict=False)) if len({*pair}) > 1), 0
    )
    length = min(length, len(first), len(last)) if first != last else len(first)
    return [first[:end] for end in range(min(length, _DEPTH) + 1)]


def _without(names: Sequence[str], front: str, back: tuple[str, ...]) -> dict[str, str]:
    """A mapping that removes wrappers and a prefix, and prepends a Flax path."""
    taken = front.split(".") if front else []
    mapping: dict[str, str] = {}
    for name in names:
        parts = name.split(".")
        if _plain(name)[: len(taken)] != taken:
            continue
        last, left = 0, len(taken)
        for number, part in enumerate(parts[:-1], 1):
            if part in _WRAPPERS:
                last = number
            elif left:
                last, left = number, left - 1
        if last or back:
            kept = _plain(".".join(parts[:last]))[len(taken) :] if last else []
            mapping[".".join(parts[:last])] = "/".join((*back, *kept))
    return mapping


def _ignored(names: Sequence[str], lost: Sequence[str]) -> list[str]:
    """Globs for these names; a whole top-level module where all its lost names are among them."""
    tops = dict.fromkeys(name.partition(".")[0] for name in names)
    globs: list[str] = []
    for top in tops:
        inside = [name for name in names if name.partition(".")[0] == top]
        all_of_it = len(inside) == sum(name.partition(".")[0] == top for name in lost)
        globs += [f"{top}/**" if inside != [top] else top] if all_of_it else inside
    return [name.replace(".", "/") for name in globs]
