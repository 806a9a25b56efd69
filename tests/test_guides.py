"""Every block of code in the guides runs, in order, and prints what the page says."""

import contextlib
import io
import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.quick_compile

PAGES = sorted((Path(__file__).parents[1] / "examples" / "guides").glob("*.md"))
BLOCK = re.compile(r"^```(python|text)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def run(text: str, name: str) -> None:
    """Run the blocks of a page; a block of text is what the one before it printed."""
    names: dict[str, object] = {"__name__": name}
    printed = ""
    for block in BLOCK.finditer(text):
        kind, body = block.groups()
        if kind == "text":
            assert printed == body, f"line {text[: block.start()].count(chr(10)) + 1} of {name}"
            continue
        code = "\n" * text[: block.start(2)].count("\n") + body  # so that errors name their line
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(compile(code, name, "exec"), names)
        printed = out.getvalue()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_guide_runs_as_it_stands(page):
    run(page.read_text(), page.name)


def test_a_wrong_guide_is_seen():
    with pytest.raises(AssertionError, match="line 4 of page"):
        run("```python\nprint(1)\n```\n```text\n2\n```\n", "page")
    with pytest.raises(NameError):
        run("```python\nmissing\n```\n", "page")
