"""A process of its own for each platform: no device is looked for, and no compiler meets another.

`python -m tests.benchmarks.programs.away ROOM PLATFORM [quick]` prints what the room's
`rows(platform, quick)` gives, one line of JSON for each.
"""

import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.progress import track

from tests.benchmarks.environment import Options
from tests.benchmarks.programs.topologies import AWAY, Platform


def measure(room: str, options: Options) -> dict[str, Any]:
    """For each platform the room's rows, or why it is skipped."""
    return {name: _of_platform(room, Platform(name), options.quick) for name in options.platforms}


def _of_platform(room: str, platform: Platform, quick: bool) -> dict[str, Any]:
    if platform.missing:
        return {"skipped": platform.missing}
    program = [sys.executable, "-m", __name__, room, platform, *(["quick"] if quick else [])]
    with tempfile.TemporaryFile("w+") as errors:
        with subprocess.Popen(program, stdout=subprocess.PIPE, stderr=errors, text=True) as child:
            console = Console(stderr=True)
            lines = track(
                child.stdout or (), f"{room}, {platform}", console=console, transient=True
            )
            rows = [json.loads(line) for line in lines]
        if child.returncode:
            errors.seek(0)
            raise RuntimeError(f"{' '.join(program)} failed:\n{errors.read()}")
    return {"versions": platform.versions, "rows": rows}


def headings(data: dict[str, Any]) -> Iterator[str]:
    """A line for each platform: the versions of its compiler, or why it is not measured."""
    for platform, found in data.items():
        if "skipped" in found:
            yield f"skipped: {found['skipped']}"
        else:
            versions = (f"{name} {version}" for name, version in found["versions"].items())
            yield f"{platform}: compiled without a device by {', '.join(versions)}"


def measured(data: dict[str, Any]) -> Iterator[tuple[Platform, list[dict[str, Any]]]]:
    """The rows of each platform that is measured."""
    yield from ((Platform(name), each["rows"]) for name, each in data.items() if "rows" in each)


def main(room: str, platform: str, *rest: str) -> None:
    """Print the rows of one platform, and nothing else, to the standard output."""
    os.environ.pop("XLA_FLAGS", None)
    os.environ.update(AWAY)
    rows = importlib.import_module(f"tests.benchmarks.programs.{room}").rows
    for row in rows(Platform(platform), bool(rest)):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
