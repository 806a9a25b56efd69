"""Sharded checkpoints, as Hugging Face saves large models: an index maps names to files."""

import json
import re
from pathlib import Path
from typing import Any

from bnjax.checkpoints.contents import ContentError, Only, leaves
from bnjax.checkpoints.formats import msgpack, pytorch, safetensors

_READ = {".safetensors": safetensors.read, ".msgpack": msgpack.read}
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.\w+)")


def shard(path: Path) -> tuple[int, int] | None:
    """The number of a shard and how many there are, from its name; None for other files."""
    found = _SHARD.fullmatch(path.name)
    return (int(found[2]), int(found[3])) if found else None


def read(path: Path, wanted: Only) -> dict[str, Any]:
    """The wanted arrays of all shards that an index names."""
    places = _weight_map(path)
    files = sorted({*places.values()})
    if missing := [file for file in files if not (path.parent / file).is_file()]:
        raise ContentError(
            f"these shards are missing: {', '.join(missing)}. Copy them to its folder."
        )
    found: dict[str, Any] = {}
    for file in files:
        here = {name for name, place in places.items() if place == file}
        _merge(found, _read_one(path.parent / file, here, wanted))
    return found


def _read_one(path: Path, names: set[str], wanted: Only) -> Any:
    """The wanted arrays of one shard; raises if it lacks a name that it should hold."""
    seen = set()

    def mine(name: str, shape: tuple[int, ...]) -> bool:
        seen.add(name)
        return name in names and wanted(name, shape)

    read_file = _READ.get(path.suffix, pytorch.read)
    try:
        tree = read_file(path, mine)
    except ContentError as error:
        raise ContentError(f"its shard {path.name} can't be read: {error}") from error
    seen |= {name for name, _ in leaves(tree)}
    if lost := sorted(names - seen):
        raise ContentError(f"its shard {path.name} does not hold {', '.join(lost[:3])}.")
    return tree


def _weight_map(path: Path) -> dict[str, str]:
    """The file of each name; files outside the folder of the index are refused."""
    try:
        places = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        there = {file: Path(file).name for file in places.values()}
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        raise ContentError("its `weight_map` does not give a file for each name.") from error
    if elsewhere := sorted(file for file, name in there.items() if file != name or not name):
        raise ContentError(f"its shards must be in its folder, got {', '.join(elsewhere[:3])}.")
    return places


def _merge(tree: dict[str, Any], other: Any) -> None:
    if not isinstance(other, dict):
        raise ContentError("one of its shards is not a dict of arrays.")
    for name, part in other.items():
        if isinstance(part, dict) and isinstance(tree.get(name), dict):
            _merge(tree[name], part)
        else:
            tree[name] = part
