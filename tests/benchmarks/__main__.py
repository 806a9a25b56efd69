"""`python -m tests.benchmarks`: bnjax beside its peers and beside the floor that memory sets.

Times are medians of turns taken in one process, with the same allocator settings for all; every
contender is checked for equal results before it is timed. Needs the extra `bench` for all peers.
Compiled programs are counted, not timed, and need no device but the extra `programs`.
"""

import importlib
import json
import platform
import sys
import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from tests.benchmarks.environment import Options, settle, touch_heap
from tests.benchmarks.programs.topologies import Platform


class Kind(StrEnum):
    """The rooms: each has `measure(options) -> data` and `tables(data)`."""

    op = "op"
    network = "network"
    memory = "memory"
    compile = "compile"
    numerics = "numerics"
    programs = "programs"
    scale = "scale"

    @property
    def room(self) -> Any:
        """The module, imported when the environment is settled."""
        names = {"compile": "compilation", "programs": "programs.counts"}
        names |= {"scale": "programs.scale"}
        return importlib.import_module(f"tests.benchmarks.{names.get(self.value, self.value)}")

    @property
    def compiles_alone(self) -> bool:
        """Whether nothing is run: compilers of devices that need not be here do it all."""
        return self in (Kind.programs, Kind.scale)


def setting(options: Options) -> dict[str, Any]:
    """Where and with what a measurement was made."""
    from importlib.metadata import version

    import jax

    from tests.benchmarks.contenders import available, missing

    packages = {"flax.linen": "flax", "flax.nnx": "flax", "haiku": "dm-haiku"}
    packages = {packages.get(name, name) for name in available()} | {"jax"}
    packages |= {"torch"} - set(missing())
    return {
        "backend": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in sorted(packages)},
        "not installed": missing(),
        **options._asdict(),
    }


def main(
    only: Annotated[list[Kind] | None, typer.Option(help="What to measure; all if not given.")] = (
        None
    ),
    chosen: Annotated[
        list[Platform] | None,
        typer.Option("--platform", help="Of programs and scale: compile for these alone."),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Timings of each contender.")] = 15,
    quick: Annotated[bool, typer.Option(help="Try everything on tiny inputs.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all numbers.")] = None,
    picture: Annotated[Path | None, typer.Option(help="Draw them (.png, .svg).")] = None,
) -> None:
    """Measure bnjax beside flax.linen, flax.nnx, haiku, equinox, keras, torch and the floor."""
    kinds = only or list(Kind)
    if chosen and not all(kind.compiles_alone for kind in kinds):
        raise typer.BadParameter("--platform goes with `--only programs` and `--only scale`")
    settle("tests.benchmarks")
    console = Console(width=None if sys.stdout.isatty() else 160)
    options = Options(1 if quick else rounds, quick, tuple(chosen or Platform))
    data: dict[str, Any] = {"setting": options._asdict()}
    if not all(kind.compiles_alone for kind in kinds):
        if not quick:
            touch_heap()
        data["setting"] = setting(options)
        console.print(", ".join(f"{n} {v}" for n, v in data["setting"]["versions"].items()))
        for name in data["setting"]["not installed"]:
            console.print(f"skipped: {name} is not installed")
    for kind in kinds:
        start = time.perf_counter()
        data[kind.value] = kind.room.measure(options)
        for table in kind.room.tables(data[kind.value]):
            console.print(table, markup=False)
        console.print(f"{kind.value}: {time.perf_counter() - start:.0f} s\n")
    if json_file is not None:
        json_file.write_text(json.dumps(data, indent=1) + "\n")
    if picture is not None:
        from tests.benchmarks.picture import draw

        draw(data, picture)


if __name__ == "__main__":
    typer.run(main)
