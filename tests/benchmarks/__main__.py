"""`python -m tests.benchmarks`: bnjax beside its peers and beside the floor that memory sets.

Times are medians of turns taken in one process, with the same allocator settings for all; every
contender is checked for equal results before it is timed. Needs the extra `bench` for all peers.
Whoever has an accelerator runs `--only device` there, and pastes what it prints.
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
    """The rooms: each has `measure(options) -> data`, and `tables(data)`, which may be text.

    What `data` calls "wrong" is said last, and makes the exit code 1.
    """

    op = "op"
    network = "network"
    memory = "memory"
    policies = "policies"
    banks = "banks"
    compile = "compile"
    numerics = "numerics"
    device = "device"
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


def everything() -> list[Kind]:
    """All kinds, of which that of accelerators is only where there is one."""
    import jax

    return [kind for kind in Kind if kind != Kind.device or jax.default_backend() != "cpu"]


def setting(options: Options, few: bool) -> dict[str, Any]:
    """Where and with what a measurement was made; a few libraries alone may have been in it."""
    from importlib.metadata import version

    import jax

    from tests.benchmarks.contenders import available, missing

    packages = {"flax.linen": "flax", "flax.nnx": "flax", "haiku": "dm-haiku"}
    packages = {packages.get(name, name) for name in available(few)} | {"jax"}
    absent = missing(few)
    packages |= {"torch"} - set(absent)
    return {
        "backend": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in sorted(packages)},
        "not installed": absent,
        **options._asdict(),
    }


def main(
    only: Annotated[
        list[Kind] | None, typer.Option(help="What to measure; if not given, all that can be.")
    ] = None,
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
    kinds = only or everything()
    if chosen and not all(kind.compiles_alone for kind in kinds):
        raise typer.BadParameter("--platform goes with `--only programs` and `--only scale`")
    alone = kinds == [Kind.device]  # where the host's memory does not matter
    if not alone:
        settle("tests.benchmarks")
    console = Console(width=None if sys.stdout.isatty() else 160)
    options = Options(1 if quick else rounds, quick, tuple(chosen or Platform))
    data: dict[str, Any] = {"setting": options._asdict()}
    if not all(kind.compiles_alone for kind in kinds):
        if not quick and not alone:
            touch_heap()
        data["setting"] = setting(options, alone)
        console.print(", ".join(f"{n} {v}" for n, v in data["setting"]["versions"].items()))
        for name in data["setting"]["not installed"]:
            console.print(f"skipped: {name} is not installed")
    wrong = []
    for kind in kinds:
        start = time.perf_counter()
        data[kind.value] = kind.room.measure(options)
        for table in kind.room.tables(data[kind.value]):
            print(table) if isinstance(table, str) else console.print(table, markup=False)
        console.print(f"{kind.value}: {time.perf_counter() - start:.0f} s\n")
        wrong += data[kind.value].get("wrong", [])
    if json_file is not None:
        json_file.write_text(json.dumps(data, indent=1) + "\n")
    if picture is not None:
        from tests.benchmarks.picture import draw

        draw(data, picture)
    for fault in wrong:
        console.print(f"[bold red]WRONG[/]: {fault}")
    if wrong:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
