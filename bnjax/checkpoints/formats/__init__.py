"""The formats of checkpoints: which one a file is in, by its content, and what reads it."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from bnjax.checkpoints.contents import ContentError, Only
from bnjax.checkpoints.formats import msgpack, orbax, pytorch, safetensors, shards
from bnjax.checkpoints.formats.signatures import foreign, signature

WRITTEN = (
    "Formats are .safetensors, .pth and .pt (PyTorch), .msgpack (Flax), and a folder without a "
    "suffix (orbax)."
)


class Format(NamedTuple):
    """A format by the name that messages give it."""

    name: str
    read: Callable[[Path, Only], Any]
    write: Callable[[Path, dict[str, Any]], None]


_FORMATS = {
    "pytorch": Format("a PyTorch checkpoint", pytorch.read, pytorch.write),
    "safetensors": Format("safetensors", safetensors.read, safetensors.write),
    "msgpack": Format("Flax's msgpack", msgpack.read, msgpack.write),
    "orbax": Format("an orbax checkpoint", orbax.read, orbax.write),
    "shards": Format("an index of shards", shards.read, safetensors.write),
}
_SUFFIXES = {
    ".safetensors": "safetensors",
    ".pth": "pytorch",
    ".pt": "pytorch",
    ".msgpack": "msgpack",
    "": "orbax",
}
# What a file is called of which the content says nothing, as when its start is damaged.
_CALLED = re.compile(
    r".*(?:(?P<safetensors>\.safetensors)|(?P<pytorch>\.(?:pth|pt|bin|ckpt|tar)(?:[-_.]?\d+)?)"
    r"|(?P<msgpack>\.msgpack|checkpoint_\d+)|(?P<shards>\.index\.json))",
    re.IGNORECASE | re.DOTALL,
)


def format_of(path: Path) -> Format:
    """The format of a file, by its content, or of a folder that orbax has saved.

    Raises:
        ContentError: it is in none of them.
    """
    if path.is_dir():
        return _FORMATS["orbax"]
    if not path.is_file():
        raise ContentError("it is neither a file nor a folder.")
    if kind := signature(path):
        return _FORMATS[kind]
    if what := foreign(path):
        raise ContentError(f"it is {what}.")
    if called := _CALLED.fullmatch(path.name):
        return _FORMATS[called.lastgroup or ""]
    raise ContentError("its content is that of no format that is read here, or it is damaged.")


def is_read(path: Path) -> bool:
    """Whether a file has the content of a checkpoint, and not of another archive or pickle."""
    try:
        kind = signature(path) if path.is_file() else None
        return kind is not None and (kind != "pytorch" or pytorch.is_saved(path))
    except OSError:  # what may not be read is no checkpoint for this user
        return False


def format_to_write(path: Path) -> tuple[str, Format]:
    """The format that a suffix chooses, with its suffix.

    Raises:
        ValueError: it chooses none.
    """
    suffix = path.suffix.lower()
    if suffix not in _SUFFIXES:
        raise ValueError(
            f"Cannot save to {path}: {suffix!r} is the suffix of no format that is written here. "
            f"{WRITTEN}"
        )
    return suffix, _FORMATS[_SUFFIXES[suffix]]
