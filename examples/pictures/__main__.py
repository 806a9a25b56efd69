"""Draw all pictures of the README and the guides: `python -m examples.pictures`.

Each is drawn in seconds from the numbers in the JSON file beside it, and carries a fingerprint of
these numbers and of the drawing code. `--measure` measures the numbers again first, in minutes.
Those of the benchmark come from a file by `python -m tests.benchmarks --json run.json`.
"""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]  # the examples import each other by name

import drawing  # noqa: E402 - needs the path above
import measuring  # noqa: E402


def main(
    measure: Annotated[
        bool, typer.Option(help="Train the models again, and measure the numbers.")
    ] = False,
    only: Annotated[
        list[str] | None, typer.Option(help="Draw only this picture. Repeatable.")
    ] = None,
    benchmark: Annotated[
        Path | None, typer.Option(help="The JSON file from tests.benchmarks.")
    ] = None,
) -> None:
    """Draw the pictures of the README and the guides."""
    if unknown := {*(only or ())} - {*drawing.PICTURES}:
        message = f"{min(unknown)} is not one of {', '.join(drawing.PICTURES)}"
        raise typer.BadParameter(message, param_hint="--only")
    names = only or list(drawing.PICTURES)
    if benchmark is not None:
        _write("benchmark", drawing.summary(json.loads(benchmark.read_text())))
    for name in names:
        if measure and name in measuring.MEASURED:
            _write(name, measuring.MEASURED[name]())
        drawing.draw(name)
        print(drawing.picture(name).relative_to(Path.cwd()))


def _write(name: str, data: dict[str, Any]) -> None:
    drawing.source(name).write_text(json.dumps(drawing.rounded(data)) + "\n")


if __name__ == "__main__":
    typer.run(main)
