"""All pictures of the README and the guides: `python -m examples.pictures` draws them again.

Each is drawn from the numbers in the JSON file beside it, in seconds, and carries a fingerprint of
them and of the code that drew it. `--measure` takes the numbers again first, in minutes; those of
the benchmark are given, as `python -m tests.benchmarks --json run.json` writes them.
"""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]  # the examples import each other by name

import drawing  # noqa: E402 - found there
import measuring  # noqa: E402


def main(
    measure: Annotated[
        bool, typer.Option(help="Train the models again, and measure what is drawn.")
    ] = False,
    only: Annotated[
        list[str] | None, typer.Option(help="Draw only this picture. Repeatable.")
    ] = None,
    benchmark: Annotated[
        Path | None, typer.Option(help="The JSON file of a run of tests.benchmarks.")
    ] = None,
) -> None:
    """Draw the pictures of the README and the guides."""
    if unknown := {*(only or ())} - {*drawing.PICTURES}:
        message = f"{min(unknown)} is none of {', '.join(drawing.PICTURES)}"
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
