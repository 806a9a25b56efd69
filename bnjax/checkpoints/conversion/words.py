"""Names in messages: the nearest or the first few, never all."""

import difflib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence

NEAREST = 3


def near(name: str, there: Iterable[str], cutoff: float = 0.5) -> list[str]:
    """The most similar names, at most three."""
    return difflib.get_close_matches(name, [*dict.fromkeys(there)], NEAREST, cutoff)


def check_known(argument: str, given: str, known: bool, there: Collection[str], what: str) -> None:
    """Raise unless a name or pattern in an argument is known."""
    if not known:
        raise ValueError(
            f"`{argument}` has {given!r}, which matches no {what}{nearest(given, there)}."
        )


def nearest(name: str, there: Collection[str]) -> str:
    """The nearest names, as the end of a sentence."""
    found = near(name.replace("*", ""), sorted(there), 0.0)
    if not found:
        return "; there are none"
    return f"; {'the only one is' if len(found) == 1 else 'nearest:'} {', '.join(map(repr, found))}"


def few(names: Sequence[str], shown: int = NEAREST) -> str:
    """The first few names, and the number of others."""
    more = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {more} more" if more > 0 else "")


def option(name: str, value: Mapping[str, str] | Sequence[str]) -> str:
    """An argument, as in code."""
    return f"{name}={json.dumps(value)}"
