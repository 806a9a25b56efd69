"""Folders with checkpoints in them, and those that orbax reads and writes."""

import contextlib
import glob
import logging
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from bnjax.checkpoints.nested import ContentError

# A file that `flax.training.checkpoints` wrote in its old way: msgpack without a suffix.
LEGACY = re.compile(r"checkpoint_\d+")
# The usual names of what a manager of orbax saves beside records and data iterators.
_ITEMS = ("default", "state", "pytree")


def found_in(path: Path, suffixes: Sequence[str]) -> Path:
    """The checkpoint at a path: the path itself, or the only or the newest one inside.

    Raises:
        ContentError: there is none, or several that are not steps of one training.
    """
    if not path.is_dir() or _is_orbax(path):
        return path
    inside = [each for each in sorted(path.iterdir()) if _holds(each, suffixes)]
    steps = {int(m[1]): each for each in inside if (m := re.fullmatch(r"(?:.*_)?(\d+)", each.name))}
    if steps and len(steps) == len(inside):
        return found_in(steps[max(steps)], suffixes)
    items = [each for each in inside if each.name in _ITEMS]
    if len(inside) != 1 and len(items) != 1:
        there = f"These are some: {', '.join(map(str, inside))}." if inside else "None is inside."
        raise ContentError(f"the folder itself is no checkpoint. {there}")
    return found_in((items if len(inside) > 1 else inside)[0], suffixes)


def read_orbax(path: Path) -> Any:
    """What orbax has saved, as NumPy arrays."""
    with _quiet():
        import orbax.checkpoint as ocp

        as_array = ocp.RestoreArgs(restore_type=np.ndarray)
        with ocp.PyTreeCheckpointer() as checkpointer:
            found: Any = checkpointer.metadata(path.absolute())
            arguments = jax.tree.map(
                lambda leaf: as_array if hasattr(leaf, "shape") else ocp.RestoreArgs(),
                found.item_metadata.tree,
            )
            return checkpointer.restore(path.absolute(), restore_args=arguments)


def write_orbax(path: Path, tree: dict[str, Any]) -> None:
    """Save a tree with orbax."""
    if path.exists():
        raise FileExistsError(
            f"There is a folder at {path}, and a folder can't be replaced in one moment. Choose "
            "another name, or remove it first."
        )
    written: dict[str, tuple[str, ...]] = {}
    for names in traverse_util.flatten_dict(tree):
        file = ".".join(names).replace("/", ".")
        if file in written:
            raise ValueError(
                f"Cannot save to {path}: orbax writes {written[file]} and {names} to the same "
                f"file, {file}. Rename one, or save as .msgpack."
            )
        written[file] = names
    with _quiet():
        import orbax.checkpoint as ocp

        try:
            with ocp.PyTreeCheckpointer() as checkpointer:
                checkpointer.save(path.absolute(), tree)
        except Exception:
            for unfinished in path.parent.glob(f"{glob.escape(path.name)}.orbax-checkpoint-tmp*"):
                shutil.rmtree(unfinished, ignore_errors=True)
            raise


def _is_orbax(path: Path) -> bool:
    return (path / "_METADATA").is_file()


def _holds(path: Path, suffixes: Sequence[str]) -> bool:
    """Whether a file is a checkpoint, or a folder has one; what orbax has not finished is none."""
    if ".orbax-checkpoint-tmp" in path.name or path.name.startswith("."):
        return False
    if not path.is_dir():
        return path.suffix.lower() in suffixes or LEGACY.fullmatch(path.name) is not None
    return _is_orbax(path) or any(_holds(each, suffixes) for each in path.iterdir())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """A context in which orbax reports errors alone, as a user of bnjax can't follow its hints."""
    logger = logging.getLogger("absl")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
