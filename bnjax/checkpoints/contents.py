"""Contents of checkpoints as nested dicts of arrays; plain containers need no JAX."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

Leaf = Callable[[Any, str], Any]
# Whether to load an array, by its name and shape.
Only = Callable[[str, tuple[int, ...]], bool]
UNWANTED = object()  # returned for a leaf to leave out


class ContentError(Exception):
    """The contents are invalid; the message says how, to follow "Cannot read ... as ...:"."""


class Node(NamedTuple):
    """One level of a tree: its parts by name, and a function that rebuilds it from new parts."""

    parts: Mapping[Any, Any]
    made: Callable[[list[Any]], Any]
    is_box: bool = False  # it wraps a single part without adding a name


Opened = Callable[[Any], Node | None]


def plain(value: Any) -> Node | None:
    """A mapping or a sequence, opened by one level; None for a leaf."""
    if isinstance(value, Mapping):
        return Node(value, lambda new: dict(zip(value, new, strict=True)))
    if isinstance(value, (list, tuple)):
        return Node(dict(enumerate(value)), list)
    return None


def as_dicts(
    value: Any, leaf: Leaf, *, paths: bool = False, opened: Opened = plain
) -> dict[str, Any]:
    """Convert a tree to nested dicts, and each leaf to `leaf(value, name)`.

    Sequences become dicts with the keys "0", "1" and so on.

    Args:
        value: the tree.
        leaf: converts a leaf; return `UNWANTED` to leave it out.
        paths: require every name to be a valid part of a path, as files need it, not only the names
            above arrays. Otherwise, a vocabulary or a table of scores by file may have any keys.
        opened: opens one level of the tree.
    """
    found = _dicts(value, leaf, "", paths, opened)
    if not isinstance(found, dict):
        raise ContentError(
            f"it must hold a dict of arrays by name, got {type(value).__name__}. Save the "
            "`state_dict()`, the variables or the training state of a model."
        )
    return found


def joined(parent: str, name: Any) -> str:
    """The full name of a part."""
    return f"{parent}/{name}" if parent else str(name)


def is_path(name: Any) -> bool:
    """Whether a name is a valid path: "a" and "a/b" are, ".." and "/a" are not."""
    return isinstance(name, (str, int)) and not set(str(name).split("/")) & {"", ".", ".."}


def leaves(tree: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested dicts, with their full names."""
    if not isinstance(tree, Mapping):
        yield name, tree
        return
    for key, part in tree.items():
        yield from leaves(part, joined(name, key))


def part_of(tree: Any, key: str) -> Any:
    """The part of nested dicts under a name, with "/" between levels.

    Raises:
        ContentError: there is none, or it is not a dict.
    """
    part, above = tree, ""
    for name in key.split("/"):
        if not isinstance(part, Mapping) or name not in part:
            there = [k for k, v in part.items() if isinstance(v, Mapping)] if part is tree else part
            names = (
                ", ".join(map(repr, list(there)[:12])) if isinstance(there, (list, dict)) else ""
            )
            raise ContentError(
                f"`key` is {key!r}, but {above or 'it'} has no part {name!r}. "
                f"{f'Its parts are {names}.' if names else 'It has no parts.'}"
            )
        part, above = part[name], joined(above, name)
    if not isinstance(part, Mapping):
        raise ContentError(f"`key` is {key!r}, which is not a dict of arrays.")
    return part


def _dicts(value: Any, leaf: Leaf, name: str, paths: bool, opened: Opened) -> Any:
    node = opened(value)
    if node is None:
        return leaf(value, name)
    if node.is_box:
        (inside,) = node.parts.values()
        return _dicts(inside, leaf, name, paths, opened)
    items = {
        str(key): _dicts(part, leaf, joined(name, key), paths, opened)
        for key, part in node.parts.items()
    }
    for key in node.parts:
        if not is_path(key) and (paths or any(np.ndim(x) for _, x in leaves(items[str(key)]))):
            raise ContentError(f"the name {key!r} in {name or 'it'} is not a valid path.")
    if len(items) < len(node.parts):
        raise ContentError(f"two names in {name or 'it'} differ only in type.")
    return {key: item for key, item in items.items() if item is not UNWANTED}
