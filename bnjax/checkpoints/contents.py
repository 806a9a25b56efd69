"""What a checkpoint holds, as nested dicts of arrays; a file of plain containers needs no JAX."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

Leaf = Callable[[Any, str], Any]
# Whether an array is wanted, by its name and shape.
Only = Callable[[str, tuple[int, ...]], bool]
UNWANTED = object()  # what a leaf becomes that is left out


class ContentError(Exception):
    """What is wrong with the contents, in a sentence."""


class Node(NamedTuple):
    """One level of a tree: its parts by name, and what makes it of other parts."""

    parts: Mapping[Any, Any]
    made: Callable[[list[Any]], Any]
    is_box: bool = False  # its one part has no name of its own


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
    """Nested dicts with all leaves as `leaf(value, name)` gives them.

    Sequences are dicts by "0", "1" and so on.

    Args:
        value: the tree.
        leaf: what its leaves become; `UNWANTED` leaves one out.
        paths: whether all names must be those of paths, as what is written needs them; or those
            above arrays alone, and a vocabulary or a table of scores by file may have any.
        opened: what opens a level of the tree.
    """
    found = _dicts(value, leaf, "", paths, opened)
    if not isinstance(found, dict):
        raise ContentError(
            f"it holds a {type(value).__name__} where a dict of names and arrays is expected. Save "
            "the `state_dict()`, the variables or the training state of a model."
        )
    return found


def joined(parent: str, name: Any) -> str:
    """The name of a part."""
    return f"{parent}/{name}" if parent else str(name)


def is_path(name: Any) -> bool:
    """Whether a name is one of a path: "a" and "a/b" are, ".." and "/a" are not."""
    return isinstance(name, (str, int)) and not set(str(name).split("/")) & {"", ".", ".."}


def leaves(tree: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """What nested dicts hold, by name."""
    if not isinstance(tree, Mapping):
        yield name, tree
        return
    for key, part in tree.items():
        yield from leaves(part, joined(name, key))


def part_of(tree: Any, key: str) -> Any:
    """The part of nested dicts under a name, "/" between nested ones.

    Raises:
        ContentError: there is none, or it is no dict.
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
        raise ContentError(f"`key` is {key!r}, which is no dict of names and arrays.")
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
            raise ContentError(
                f"it has the name {key!r} in {name or 'it'}, and a name is no such path."
            )
    if len(items) < len(node.parts):
        raise ContentError(f"two names in {name or 'it'} differ by their type only.")
    return {key: item for key, item in items.items() if item is not UNWANTED}
