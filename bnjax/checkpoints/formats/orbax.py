"""orbax: a folder with one tree, or with several as named items."""

import contextlib
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from bnjax._files import hidden_beside
from bnjax.checkpoints.contents import ContentError, Only

# Metadata key for arrays of size 0, which orbax does not write, as [path, shape, dtype].
_EMPTY = "bnjax.empty"


def is_orbax(path: Path) -> bool:
    """Whether a folder is a tree saved by orbax."""
    return (path / "_METADATA").is_file()


def is_step(path: Path) -> bool:
    """Whether a folder is a step saved by orbax, with items inside."""
    return (path / "_CHECKPOINT_METADATA").is_file() and not is_orbax(path)


def read(path: Path, _: Only) -> Any:
    """The saved tree as NumPy arrays; for a step, all items with arrays, by name."""
    if is_orbax(path):
        return _read(path)
    return {each.name: _read(each) for each in sorted(path.iterdir()) if is_orbax(each)}


def write(path: Path, tree: dict[str, Any]) -> None:
    """Save nested dicts of arrays."""
    if path.exists() or path.is_symlink():
        what = "folder" if path.is_dir() else "file"
        raise FileExistsError(
            f"There is a {what} at {path}, and a {what} can't be replaced atomically by a folder. "
            f"Choose another name, or remove it first."
        )
    _check_names(path, tree)
    temporary = hidden_beside(path.absolute())
    empty: list[Any] = []
    held = _without_empty(tree, (), empty) or {_EMPTY: np.zeros(1)}  # orbax refuses empty trees
    try:
        with _quiet():
            import orbax.checkpoint as ocp

            with ocp.PyTreeCheckpointer() as checkpointer:
                checkpointer.save(temporary, held, custom_metadata={_EMPTY: empty})
        temporary.rename(path)
    except BaseException:
        for unfinished in temporary.parent.glob(f"{temporary.name}*"):
            shutil.rmtree(unfinished, ignore_errors=True)
        raise


def _read(path: Path) -> Any:
    with _quiet():
        import jax
        import orbax.checkpoint as ocp

        as_array = ocp.RestoreArgs(restore_type=np.ndarray)
        with ocp.PyTreeCheckpointer() as checkpointer:
            found: Any = checkpointer.metadata(path.absolute())
            if found.item_metadata is None:
                raise ContentError("its metadata is damaged. Copy it again.")
            arguments = jax.tree.map(
                lambda leaf: as_array if hasattr(leaf, "shape") else ocp.RestoreArgs(),
                found.item_metadata.tree,
            )
            tree = checkpointer.restore(path.absolute(), restore_args=arguments)
    if isinstance(tree, dict):
        tree.pop(_EMPTY, None)
    for names, shape, dtype in (found.custom_metadata or {}).get(_EMPTY, ()):
        _fill(tree, names, tuple(shape), dtype)
    return tree


def _without_empty(tree: Any, path: tuple[str, ...], empty: list[Any]) -> Any:
    """Nested dicts without arrays of size 0, which are added to `empty`."""
    kept = {}
    for name, part in tree.items():
        if isinstance(part, dict):
            kept[name] = _without_empty(part, (*path, name), empty)
        elif isinstance(part, np.ndarray) and not part.size:
            empty.append([[*path, name], list(part.shape), part.dtype.name])
        else:
            kept[name] = part
    return kept


def _fill(tree: dict[str, Any], names: list[str], shape: tuple[int, ...], dtype: str) -> None:
    """Put an array of size 0 back in its place."""
    *parents, last = names
    for name in parents:
        tree = tree[name]
    if last in tree or 0 not in shape:
        raise ContentError(f"its metadata lists an array {'/'.join(names)} that is not empty.")
    tree[last] = np.zeros(shape, dtype)


def _check_names(path: Path, tree: dict[str, Any]) -> None:
    written: dict[str, tuple[str, ...]] = {}
    for names in _paths(tree):
        file = ".".join(names).replace("/", ".")
        if file in written:
            raise ValueError(
                f"Cannot save to {path}: orbax writes {written[file]} and {names} to the same "
                f"file, {file}. Rename one, or save as .msgpack."
            )
        written[file] = names


def _paths(tree: Any, above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    if not isinstance(tree, dict):
        yield above
        return
    for name, part in tree.items():
        yield from _paths(part, (*above, name))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """A context that silences orbax's log messages, which are hints for its own users."""
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
