"""Check that every leaf of a tree survives a round trip through a file."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bnjax.checkpoints.contents import UNWANTED, ContentError
from bnjax.checkpoints.nested import as_dicts
from bnjax.checkpoints.tensors import SHARED, as_numpy

# Why arrays can't be saved, in the order in which they are reported.
_REASONS = {
    "wrong": "a checkpoint holds only arrays of numbers, but these are not: {}. Leave them out.",
    "elsewhere": "another process holds part of these arrays: {}. Use a `CheckpointManager` of "
    "orbax, whose folders `bnjax.load` reads.",
    "foreign": "this format does not support these dtypes: {}. Convert them, or save as .msgpack, "
    "which supports all.",
}


def writable(path: Path, suffix: str, tree: Any) -> dict[str, Any]:
    """Nested dicts of arrays, each of which a file with this suffix can hold."""
    refused: dict[str, list[str]] = {why: [] for why in _REASONS}

    def array(value: Any, name: str) -> Any:
        if value is None:  # such as the loss scale of a state without one
            return UNWANTED if suffix == ".safetensors" else None
        if isinstance(value, jax.Array) and not _is_here(value):
            refused["elsewhere"].append(name)
            return None
        found = as_numpy(np.asarray(value) if isinstance(value, (bool, int, float)) else value)
        dtype = type(value).__name__ if found is None else found.dtype
        if found is None or not any(jnp.issubdtype(dtype, kind) for kind in (np.number, np.bool_)):
            refused["wrong"].append(f"{name} ({dtype})")
            return None
        found = found.astype(found.dtype.newbyteorder("="), copy=False)  # msgpack has only this
        if not _holds(suffix, found.dtype):
            refused["foreign"].append(f"{name} ({found.dtype})")
        return found

    try:
        tree = as_dicts(tree, array, paths=True)
    except ContentError as error:
        raise ValueError(f"Cannot save to {path}: {error}") from error
    for why, names in refused.items():
        if names:
            raise ValueError(f"Cannot save to {path}: {_REASONS[why].format(', '.join(names))}")
    return tree


def _is_here(array: jax.Array) -> bool:
    """Whether this process holds all of an array."""
    return array.is_fully_addressable or array.is_fully_replicated


def _holds(suffix: str, dtype: np.dtype) -> bool:
    """Whether a format preserves this dtype."""
    if suffix == ".msgpack":
        return True
    own = dtype.type.__module__ == "numpy"
    if suffix == ".safetensors":
        return dtype.name == "bfloat16" or (own and dtype != np.complex128)
    return dtype.name in SHARED or own
