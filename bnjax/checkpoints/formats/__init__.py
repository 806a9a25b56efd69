"""Detect the format of a checkpoint from its content, and choose its reader and writer."""

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
    """A format: its name in messages, how to read it and how to write it."""

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
# The usual names, for files whose content is not recognized, such as when their start is damaged.
_CALLED = re.compile(
    r".*(?:(?P<safetensors>\.safetensors)|(?P<pytorch>\.(?:pth|pt|bin|ckpt|tar)(?:[-_.]?\d+)?)"
    r"|(?P<msgpack>\.msgpack|checkpoint_\d+)|(?P<shards>\.index\.json))",
    re.IGNORECASE | re.DOTALL,
)


def format_of(path: Path) -> Format:
    """The format of a file, from its content; a folder is orbax.

    Raises:
        ContentError: the format is unknown.
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
    raise ContentError("it is in no known format, or damaged.")


def is_read(path: Path) -> bool:
    """Whether the content of a file is a checkpoint, rather than another archive or pickle."""
    try:
        kind = signature(path) if path.is_file() else None
        return kind is not None and (kind != "pytorch" or pytorch.is_saved(path))
    except OSError:  # this user may not read it
        return False


def format_to_write(path: Path) -> tuple[str, Format]:
    """The suffix of a path, and its format.

    Raises:
        ValueError: no format has this suffix.
    """
    suffix = path.suffix.lower()
    if suffix not in _SUFFIXES:
        raise ValueError(f"Cannot save to {path}: {suffix!r} is not a supported suffix. {WRITTEN}")
    return suffix, _FORMATS[_SUFFIXES[suffix]]
