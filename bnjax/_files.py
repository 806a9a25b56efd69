"""Atomic writes to disk."""

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path


def folder_of(path: Path) -> None:
    """Check that the folder to write into exists."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f"There is no folder {path.parent} to save {path.name} in.")


def hidden_beside(path: Path) -> Path:
    """A unique hidden name next to a path, short however long the path's own name is."""
    return path.with_name(f".{uuid.uuid4().hex}.tmp")


@contextlib.contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """A temporary file that replaces the path once it is written and synced to disk."""
    path = path.resolve()  # so that a symlink stays one
    temporary = hidden_beside(path)
    try:
        temporary.touch()
        permissions = (path if path.exists() else temporary).stat().st_mode
        yield temporary
        temporary.chmod(permissions)  # safetensors sets its own
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
