"""What is written to disk, as a whole or not at all."""

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path


def folder_of(path: Path) -> None:
    """What is written goes into a folder that is there."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f"There is no folder {path.parent} to save {path.name} in.")


def hidden_beside(path: Path) -> Path:
    """A name beside a path that nothing else has, however long the path's own is."""
    return path.with_name(f".{uuid.uuid4().hex}.tmp")


@contextlib.contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """A file beside the path that takes its place when it is written and on the disk."""
    path = path.resolve()  # a link stays one
    temporary = hidden_beside(path)
    try:
        temporary.touch()
        permissions = (path if path.exists() else temporary).stat().st_mode
        yield temporary
        temporary.chmod(permissions)  # safetensors has its own
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
