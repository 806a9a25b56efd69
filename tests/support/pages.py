"""Pages of Markdown: run their blocks in order, and see what they print.

`python -m tests.support.pages` runs the README and all guides, and writes what they print into
them.
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
    """The page with what its blocks print now.

    A block of `python` is run, and one of `text` right after it has what it prints. In one of
    `console` each line `$ bnjax ...` is run, and the lines after it are what that prints. Text
    after commands that take minutes is a record.
    """
    names: dict[str, object] = {"__name__": name}
    printed: str | None = None
    pieces, position = [], 0
    for block in BLOCK.finditer(text):
        kind, body = block.groups()
        if kind == "python":
            code = "\n" * text[: block.start(2)].count("\n") + body  # so that errors name the line
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
    """The commands in a block of `console`."""
    return [line.removeprefix("$ ") for line in body.splitlines() if line.startswith("$ ")]


def shell(command: str) -> str:
    """What a command of bnjax prints, without the spaces at the ends of lines."""
    from typer.testing import CliRunner

    from bnjax.cli import app

    program, *arguments = shlex.split(command)
    assert program == "bnjax", f"only commands of bnjax are run, got {command}"
    result = CliRunner().invoke(app, arguments)
    lines = result.output.strip("\n").splitlines()
    return "".join(f"{line.rstrip()}\n" for line in lines)


def commands(text: str) -> Iterator[list[str]]:
    """The words of each command in the blocks of `bash` and `console`."""
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
    """Write into each page what its blocks print."""
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
