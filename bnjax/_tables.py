"""Show reports as text, or as tables in a terminal or a notebook."""

import io
import re
from collections.abc import Iterator
from typing import Any

from rich.console import Console, ConsoleOptions
from rich.measure import Measurement
from rich.text import Text

# Where to break a sentence, a long name or a line of code, the best places first.
_JOINTS = tuple(
    map(
        re.compile,
        (
            "(?<= )(?=[^ ])",
            "(?<=/)(?=[^/])",
            r"(?<=[._,(\[])(?=[^._,(\[])",
            "(?<=[a-z0-9])(?=[A-Z])",
        ),
    )
)
_PAGE = '<pre style="font-family:monospace;white-space:pre;line-height:1.25">{code}</pre>'


class Name:
    """A path, a line of code or a sentence that contains them, never broken inside a word.

    >>> print(plain(Name("encoder/block_12/BatchNorm2d_0"), width=20))
    encoder/block_12/
    BatchNorm2d_0
    """

    def __init__(self, text: str, style: str = "") -> None:
        self._text, self._style = text, style

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        """At least its longest word, at most all of it on one line."""
        longest = max(len(word) for word in _pieces(self._text, 0))
        return Measurement(longest, len(self._text))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        """The text, over as many lines as it needs."""
        lines = "\n".join(_lines(self._text, options.max_width))
        yield Text(lines, self._style, overflow="fold")


def _lines(text: str, width: int) -> Iterator[str]:
    line = ""
    for piece in _pieces(text, width):
        if line and len((line + piece).rstrip()) > width:
            yield line.rstrip()
            line = ""
        line += piece
    yield line.rstrip()


def _pieces(text: str, width: int, level: int = 0) -> list[str]:
    """The fewest pieces that are at most `width` wide, where there are joints."""
    if level == len(_JOINTS) or (level and len(text.rstrip()) <= width):
        return [text]
    parts = _JOINTS[level].split(text)
    return [piece for part in parts for piece in _pieces(part, width, level + 1)]


def plain(shown: Any, width: int) -> str:
    """Rich output as plain text, at most `width` columns wide."""
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(shown)
    lines = console.file.getvalue().splitlines()  # pyright: ignore[reportAttributeAccessIssue]
    return "\n".join(line.rstrip() for line in lines)


class Shown:
    """A report that shows as a table: plain as text, coloured in a terminal or a notebook.

    Subclasses define `__rich__`, which returns the table, and may set `_width`, the text's width.
    """

    _width = 110

    def __str__(self) -> str:
        """The tables, as plain text."""
        return plain(self, self._width)

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        """For a notebook: the tables as HTML, with plain text as fallback."""
        console = Console(file=io.StringIO(), width=self._width, record=True, force_terminal=True)
        console.print(self)
        page = console.export_html(inline_styles=True, code_format=_PAGE)
        return {"text/plain": str(self), "text/html": page}
