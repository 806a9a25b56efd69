"""Globs over module paths, as in "encoder/**" or "**/bn*"."""

import re
from collections.abc import Callable, Iterable, Sequence

Paths = str | Sequence[str]


def as_tuple(paths: Paths) -> tuple[str, ...]:
    """One pattern or several, as a tuple of patterns."""
    several = (paths,) if isinstance(paths, str) else paths
    if not isinstance(several, Iterable) or not all(isinstance(one, str) for one in several):
        raise TypeError(
            f"A path is given by a glob, or several, such as 'encoder/**', got {paths!r}."
        )
    return tuple(several)


def matcher(pattern: str) -> Callable[[str], bool]:
    """Whether a path, its names joined by "/", fits the pattern.

    `*` is any part of one name, `**` any number of names (none too), `?` one character.

    >>> fits = matcher("encoder/**")
    >>> [fits(path) for path in ("encoder", "encoder/block/bn", "decoder/bn")]
    [True, True, False]
    """
    parts = {"/**": "(/.*)?", "**/": "(.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    tokens = re.split(r"(/\*\*(?=/|$)|^\*\*/|\*\*|\*|\?)", pattern)
    compiled = re.compile("".join(parts.get(token, re.escape(token)) for token in tokens))
    return lambda path: compiled.fullmatch(path) is not None
