"""Globs over module paths, as in "encoder/**" or "**/bn*"."""

import difflib
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

Paths = str | Sequence[str]

BRIDGES = ("ToLinen", "ToNNX")  # their names, since this room does not import Flax
REPAIR = "use the tool on the wrapped module itself, with its own variables"
_MANY = 8  # paths in a message


def as_tuple(paths: Paths) -> tuple[str, ...]:
    """A pattern, or several, as a tuple."""
    several = (paths,) if isinstance(paths, str) else paths
    if not isinstance(several, Iterable) or not all(isinstance(one, str) for one in several):
        raise TypeError(f"Paths must be a glob or several, such as 'encoder/**', got {paths!r}.")
    return tuple(several)


def matcher(pattern: str) -> Callable[[str], bool]:
    """A test of whether a path, its names joined by "/", matches the pattern.

    `*` matches any part of one name, `**` any number of names (even none), `?` one character.

    >>> fits = matcher("encoder/**")
    >>> [fits(path) for path in ("encoder", "encoder/block/bn", "decoder/bn")]
    [True, True, False]
    """
    parts = {"/**": "(/.*)?", "**/": "(.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    tokens = re.split(r"(/\*\*(?=/|$)|^\*\*/|\*\*|\*|\?)", pattern)
    compiled = re.compile("".join(parts.get(token, re.escape(token)) for token in tokens))
    return lambda path: compiled.fullmatch(path) is not None


def any_of(paths: Paths) -> Callable[[str], bool]:
    """A test of whether a path matches at least one of the patterns."""
    matchers = [matcher(pattern) for pattern in as_tuple(paths)]
    return lambda path: any(fits(path) for fits in matchers)


def check_each(
    patterns: Paths,
    paths: Collection[str],
    what: str = "batch norm",
    unknown: Mapping[str, str] | None = None,
) -> None:
    """Raise, as `check_fits` does, unless each pattern matches one of the paths."""
    for pattern in as_tuple(patterns):
        check_fits(pattern, any(map(matcher(pattern), paths)), paths, what, unknown)


def check_fits(
    pattern: str,
    fits: bool,
    paths: Iterable[str],
    what: str = "batch norm",
    unknown: Mapping[str, str] | None = None,
) -> None:
    """Raise if a pattern does not fit any path, so that no typo goes unnoticed.

    `unknown` holds the classes, by path, of modules that keep statistics but are not known batch
    norms.
    """
    unseen = {path: kind for path, kind in (unknown or {}).items() if matcher(pattern)(path)}
    if unseen and what == "batch norm":
        what = "what can't be handled" if {*unseen.values()} <= {*BRIDGES} else "unknown classes"
        raise ValueError(f"The pattern {pattern!r} matches {what}: {strangers(unseen)}.")
    if fits:
        return
    there = sorted(paths)
    are = f"there are {_listed(pattern, there)}" if there else "none was called or given"
    if what == "batch norm" and not there:
        are += " (for an nnx model, use bnjax.nnx.freeze)"
    if unknown:
        are += f"; {strangers(unknown)}"
    hint = "`*` matches part of one name, `**` any number of names, as in 'encoder/**'."
    for meant in (f"{pattern}/**", f"**/{pattern}", f"**/{pattern}/**"):
        if any(map(matcher(meant), there)):
            hint = f"Did you mean {meant!r}?"
            break
    raise ValueError(f"The pattern {pattern!r} matches no {what}: {are}. {hint}")


def _listed(pattern: str, paths: Sequence[str]) -> str:
    """All paths, or if there are many, those most like the pattern."""
    if len(paths) <= _MANY:
        return f"{paths}" if [*paths] != [""] else "[''], the top of the model"
    near = difflib.get_close_matches(pattern, paths, n=3, cutoff=0) or paths[:3]
    return f"{len(paths)}, such as {near}"


def strangers(unknown: Mapping[str, str]) -> str:
    """Describe modules that keep statistics but are no known batch norms."""
    bridges = {path: kind for path, kind in unknown.items() if kind in BRIDGES}
    others = {path: kind for path, kind in unknown.items() if kind not in BRIDGES}
    found = []
    if others:
        found.append(
            f"{_named(others)} keep a mean and a variance, but are not batch norms of bnjax or "
            "Flax, or subclasses of these: make them known with "
            f"bnjax.register({min(others.values())}, ...)"
        )
    if bridges:
        found.append(f"{_named(bridges)} can't be reached through flax.nnx.bridge: {REPAIR}")
    return "; ".join(found)


def _named(unknown: Mapping[str, str]) -> str:
    return ", ".join(f"'{path}' ({kind})" for path, kind in sorted(unknown.items()))
