"""Rewrite the numbers in the guide to scale.

Run it as `python -m tests.benchmarks.programs.page RUN.json`, with the file that
`python -m tests.benchmarks --only scale --json RUN.json` wrote.
"""

import json
import sys
from pathlib import Path
from typing import Any

from tests.benchmarks.programs import away, scale

PAGE = Path(__file__).parents[3] / "examples" / "guides" / "scale.md"
BEGIN, END = "<!-- numbers -->\n", "<!-- end of the numbers -->\n"


def numbers(data: dict[str, Any]) -> str:
    """A run's tables in Markdown."""
    parts = ["\n\n".join(away.headings(data))]
    for chip, rows in scale.of_chips(data):
        lines = [list(rows[0]), ["---:"] * len(rows[0]), *(list(row.values()) for row in rows)]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        parts.append(f"**{chip}**\n\n{table}")
    return "\n\n".join(parts)


def rewritten(page: str, data: dict[str, Any]) -> str:
    """The page with these numbers in place of those between its marks."""
    before, _, rest = page.partition(BEGIN)
    _, mark, after = rest.partition(END)
    assert mark, f"the page has no {BEGIN}and {END}"
    return f"{before}{BEGIN}\n{numbers(data)}\n\n{END}{after}"


if __name__ == "__main__":
    run = json.loads(Path(sys.argv[1]).read_text())
    PAGE.write_text(rewritten(PAGE.read_text(), run["scale"]))
