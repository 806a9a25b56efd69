"""Checks of what is written to disk."""

from pathlib import Path


def folder_of(path: Path) -> None:
    """What is written goes into a folder that is there."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f"There is no folder {path.parent} to save {path.name} in.")
