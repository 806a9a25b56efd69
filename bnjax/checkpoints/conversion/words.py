"""Names and numbers in messages: the nearest few, never all."""

import difflib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence

NEAREST = 3


def near(name: str, there: Iterable[str], cutoff: float = 0.5) -> list[str]:
    """The three names, at most, that are most like this one."""
    return difflib.get_close_matches(name, [*dict.fromkeys(there)], NEAREST, cutoff)


def check_fits(argument: str, given: str, fits: bool, there: Collection[str], what: str) -> None:
    """Raise unless what an argument names is there."""
    if not fits:
        raise ValueError(
            f"`{argument}` names {given!r}, which fits no {what}{nearest(given, there)}."
        )


def nearest(name: str, there: Collection[str]) -> str:
    """The nearest names as the end of a sentence."""
    found = near(name.replace("*", ""), sorted(there), 0.0)
    if not found:
        return ": there is none"
    return f"{': there is' if len(found) == 1 else '; nearest:'} {', '.join(map(repr, found))}"


def few(names: Sequence[str], shown: int = NEAREST) -> str:
    """The first few names, and how many more there are."""
    more = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {more} more" if more > 0 else "")


def option(name: str, value: Mapping[str, str] | Sequence[str]) -> str:
    """An argument as one would type it."""
    return f"{name}={json.dumps(value)}"
