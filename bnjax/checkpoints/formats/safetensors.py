"""safetensors: flat names, with "/" between those of nested dicts."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from bnjax._files import appearing
from bnjax.checkpoints.contents import ContentError, Only, is_path
from bnjax.checkpoints.formats.needs import needed

_EMPTY = "bnjax.empty"  # metadata key for the names of empty dicts


def read(path: Path, wanted: Only) -> dict[str, Any]:
    """The wanted arrays, in nested dicts."""
    safetensors = needed("safetensors", "'bnjax[tools]'")
    tree: dict[str, Any] = {}
    with safetensors.safe_open(path, framework="numpy") as file:
        for name in file.keys():
            there = file.get_slice(name)
            if wanted(name, tuple(there.get_shape())):
                if there.get_dtype().startswith("F8_"):
                    raise ContentError(
                        f"{name!r} has dtype {there.get_dtype()}, which NumPy does not support. "
                        "Load it with `safetensors.torch`, or leave it out with `only`."
                    )
                parent, last = _place(tree, name)
                parent[last] = file.get_tensor(name)
        for name in json.loads((file.metadata() or {}).get(_EMPTY, "[]")):
            parent, last = _place(tree, name)
            parent[last] = {}
    return tree


def write(path: Path, tree: dict[str, Any]) -> None:
    """Save nested dicts of arrays."""
    safetensors = needed("safetensors.numpy", "'bnjax[tools]'")
    arrays = {}
    for names, value in _flat(tree):
        name = "/".join(names)
        if any("/" in part for part in names):
            raise ValueError(
                f"Cannot save to {path}: the name {name!r} contains '/', which separates the names "
                f"of nested dicts. Rename it, or save as .msgpack."
            )
        arrays[name] = value
    metadata = {"format": "flax" if any(isinstance(v, dict) for v in tree.values()) else "pt"}
    if empty := [name for name, value in arrays.items() if isinstance(value, dict)]:
        metadata[_EMPTY] = json.dumps(empty)
    held = {name: np.asarray(x, order="C") for name, x in arrays.items() if name not in empty}
    with appearing(path) as temporary:
        safetensors.save_file(held, temporary, metadata=metadata)


def _flat(tree: dict[str, Any], above: tuple[str, ...] = ()) -> Any:
    """The arrays and the empty dicts in nested dicts, by path."""
    for name, part in tree.items():
        if isinstance(part, dict) and part:
            yield from _flat(part, (*above, name))
        else:
            yield (*above, name), part


def _place(tree: dict[str, Any], name: str) -> tuple[dict[str, Any], str]:
    """The dict that a name belongs in, and its key there."""
    if not is_path(name):
        raise ContentError(f"the name {name!r} is not a valid path.")
    *parents, last = name.split("/")
    for parent in parents:
        tree = tree.setdefault(parent, {})
        if not isinstance(tree, dict):
            break
    if not isinstance(tree, dict) or last in tree:
        raise ContentError(f"{name!r} is below or above another array.")
    return tree, last
