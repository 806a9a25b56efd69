"""Run the code blocks of Markdown pages in order, and capture their output.

`python -m tests.support.pages` runs the README and all guides, and updates the output in them.
"""

import contextlib
import io
import os
import re
import shlex
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md", *sorted((ROOT / "examples" / "guides").glob("*.md")))
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def rerun(text: str, name: str) -> str:
    """The page with the current output of its blocks.

    Runs each `python` block; a `text` block right after it holds its output. In a `console` block,
    runs each line `$ bnjax ...`, followed by its output. Text after commands that take minutes is
    kept as it is.
    """
    names: dict[str, object] = {"__name__": name}
    printed: str | None = None
    pieces, position = [], 0
    for block in BLOCK.finditer(text):
        kind, body = block.groups()
        if kind == "python":
            code = (
                "\n" * text[: block.start(2)].count("\n") + body
            )  # so that errors have the right line number
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(compile(code, name, "exec"), names)
            printed = out.getvalue()
            continue
        if kind == "text" and printed is not None:
            body = printed
        elif kind == "console":
            body = "".join(f"$ {command}\n{shell(command)}" for command in sessions(body))
        pieces += [text[position : block.start(2)], body]
        position, printed = block.end(2), None
    return "".join([*pieces, text[position:]])


def sessions(body: str) -> list[str]:
    """The commands in a `console` block."""
    return [line.removeprefix("$ ") for line in body.splitlines() if line.startswith("$ ")]


def shell(command: str) -> str:
    """The output of a bnjax command, without trailing spaces."""
    from typer.testing import CliRunner

    from bnjax.cli import app

    program, *arguments = shlex.split(command)
    assert program == "bnjax", f"only bnjax commands are run, got {command}"
    result = CliRunner().invoke(app, arguments)
    lines = result.output.strip("\n").splitlines()
    return "".join(f"{line.rstrip()}\n" for line in lines)


def commands(text: str) -> Iterator[list[str]]:
    """The words of each command in `bash` and `console` blocks."""
    for block in BLOCK.finditer(text):
        kind, body = block.groups()
        lines = body.replace("\\\n", " ").splitlines()
        if kind == "console":
            lines = sessions(body)
        for line in lines if kind in ("bash", "console") else []:
            for part in line.split(" && "):
                if words := shlex.split(part, comments=True):
                    yield words


def main() -> None:
    """Update the output in all pages."""
    for page in PAGES:
        text = page.read_text()
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
            new = rerun(text, page.name)
        if new != text:
            page.write_text(new)
            print(f"changed {page.relative_to(ROOT)}")


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    main()
