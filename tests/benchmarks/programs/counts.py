"""Kernels, readings and writings, memory and collectives of compiled programs, beside Flax's."""

import itertools
from collections.abc import Iterator
from typing import Any

from rich.table import Table

from tests.benchmarks.cases import (
    BACKWARD,
    DTYPES,
    EVAL,
    FORWARD,
    IDEAL,
    MASK,
    PASSES,
    PLAIN,
    Case,
)
from tests.benchmarks.contenders import OURS, REFERENCE
from tests.benchmarks.environment import Options
from tests.benchmarks.programs import away
from tests.benchmarks.programs.targets import (
    IDEAL_NET,
    LAYER,
    NET,
    PARALLEL,
    PARALLEL_NET,
    Target,
    targets,
)
from tests.benchmarks.programs.topologies import CHIPS, Chip, Platform

Row = dict[str, Any]
SHAPES = (
    ((128, 56, 56, 64), -1),
    ((128, 28, 28, 128), -1),
    ((128, 7, 7, 512), -1),
    ((64, 7, 7, 512), -1),
    ((4096, 512), -1),
    ((128, 64, 56, 56), 1),
    ((128, 512, 7, 7), 1),
)
FEW = (
    Case(SHAPES[0][0], dtype="bfloat16"),
    Case(SHAPES[0][0], variant=MASK),
    Case(SHAPES[3][0]),
    Case(SHAPES[4][0], dtype="bfloat16"),
    Case(*SHAPES[5], variant=MASK),
)
SPLIT = SHAPES[1], SHAPES[4]  # over devices


def measure(options: Options) -> dict[str, Any]:
    """For each platform rows of four kinds, each for bnjax and for Flax."""
    return away.measure("counts", options)


def rows(platform: Platform, quick: bool) -> Iterator[Row]:
    """Those of one platform; where quick, few layers on its first chip, and one network."""
    first, *others = CHIPS[platform]
    yield from _of_chip(first, quick)
    yield from _over_devices(first, quick)
    for chip in () if quick else others:
        yield from _of_chip(chip, quick)


def _of_chip(chip: Chip, quick: bool) -> Iterator[Row]:
    from tests.benchmarks.programs import layers, nets

    for case, which in _cases(quick):
        for name in layers.CONTENDERS:
            yield _row(LAYER, chip, name, case, which, layers.alone(case, which, name, chip))
    for dtype in list(DTYPES)[1 if quick else 0 :]:
        case = Case(nets.SHAPE, dtype=dtype)
        for name in layers.CONTENDERS:
            yield _row(NET, chip, name, case, "", nets.alone(dtype, name, chip))


def _over_devices(chip: Chip, quick: bool) -> Iterator[Row]:
    from tests.benchmarks.programs import layers, nets

    for way, name in itertools.product(layers.WAYS, layers.CONTENDERS):
        for case, which in _split(quick):
            found = layers.parallel(case, which, name, way, chip)
            yield _row(PARALLEL, chip, name, case, which, {"way": way, **_said(found)})
        if not quick:
            case = Case(nets.SHAPE, dtype="bfloat16")
            found = nets.parallel(case.dtype, name, way, chip)
            yield _row(PARALLEL_NET, chip, name, case, "", {"way": way, **_said(found)})


def _cases(quick: bool) -> Iterator[tuple[Case, str]]:
    """Layers, each with a pass; an evaluation knows no mask."""
    every = [Case(*shape, dtype, PLAIN) for dtype in DTYPES for shape in SHAPES]
    masked = [case._replace(variant=MASK) for case in every]
    for which in (FORWARD, BACKWARD) if quick else PASSES:
        yield from ((case, which) for case in (FEW if quick else every))
        if not quick and which != EVAL:
            yield from ((case, which) for case in masked)


def _split(quick: bool) -> Iterator[tuple[Case, str]]:
    """Layers, each with a pass, over several devices."""
    for which in (FORWARD, BACKWARD) if quick else PASSES:
        for shape, axis in SPLIT[: 1 if quick else None]:
            for variant in (PLAIN,) if which == EVAL else (PLAIN, MASK):
                yield Case(shape, axis, "float32", variant), which


def _row(kind: str, chip: Chip, name: str, case: Case, which: str, found: Row) -> Row:
    row = {"kind": kind, "chip": chip.name, "contender": name, "pass": which}
    return {**row, "case": case.name, "dtype": case.dtype, "way": "", **found}


def _said(found: list[Any]) -> Row:
    """Kind and numbers of each collective, those of a branch apart."""
    every = [(each.kind, each.numbers, each.conditional) for each in found]
    return {
        "sent": [list(each[:2]) for each in every if not each[2]],
        "sent in a branch": [list(each[:2]) for each in every if each[2]],
    }


def pairs(rows: list[Row]) -> Iterator[tuple[Row, Row]]:
    """Each row of bnjax's, and Flax's of the same program."""

    def program(row: Row) -> tuple[str, ...]:
        return tuple(row[key] for key in ("kind", "chip", "pass", "case", "dtype", "way"))

    theirs = {program(row): row for row in rows if row["contender"] == REFERENCE}
    yield from ((row, theirs[program(row)]) for row in rows if row["contender"] == OURS)


def tables(data: dict[str, Any]) -> Iterator[Table | str]:
    """What was compiled by whom; then each kind, chip and pass."""
    yield from away.headings(data)
    for platform, rows in away.measured(data):
        for chip in dict.fromkeys(row["chip"] for row in rows):
            every = [pair for pair in pairs(rows) if pair[0]["chip"] == chip]
            for which in PASSES:
                layer = (LAYER, which)
                title = f"{chip}, one layer, {which}, ideal {'+'.join(map(str, IDEAL[which]))}"
                found = [pair for pair in every if (pair[0]["kind"], pair[0]["pass"]) == layer]
                if found:
                    yield _moved(platform, title, found)
            ideal = f", ideal {'+'.join(map(str, IDEAL_NET))}" if platform is Platform.tpu else ""
            title = f"{chip}, a training step of three blocks conv+BN+relu{ideal}"
            yield _moved(platform, title, [pair for pair in every if pair[0]["kind"] == NET])
            split = [pair for pair in every if "sent" in pair[0]]
            if split:
                yield _talk(platform, f"{chip}, data parallel over 8", split)


def _moved(platform: Platform, title: str, pairs: list[tuple[Row, Row]]) -> Table:
    table = Table(title=title, caption="flax.linen / bnjax; x: readings + writings of x's size")
    columns = ["case", "dtype", "kernels", "x", "MB", "temp MB", "bnjax in a branch"]
    columns += ["kcycles"] if platform is Platform.tpu else []
    for column in (*columns, "target missed"):
        table.add_column(column, justify="right")
    for ours, theirs in pairs:
        both = theirs, ours
        cycles = " / ".join(f"{row['cycles'] / 1e3:,.0f}" for row in both)
        branch = ours["in a branch"]
        table.add_row(
            ours["case"],
            ours["dtype"],
            " / ".join(str(row["kernels"]) for row in both),
            " / ".join(f"{row['reads']:.3g}+{row['writes']:.3g}" for row in both),
            " / ".join(f"{row['bytes'] / 1e6:,.1f}" for row in both),
            " / ".join(f"{row['temp'] / 1e6:,.1f}" for row in both),
            f"{branch['kernels']} {branch['reads']:.3g}+{branch['writes']:.3g}",
            *([cycles] if platform is Platform.tpu else []),
            _missed(targets(platform, ours, theirs)),
        )
    return table


def _talk(platform: Platform, title: str, pairs: list[tuple[Row, Row]]) -> Table:
    table = Table(title=title, caption="numbers that each device gives")
    columns = ("program", "pass", "way", "flax.linen", "bnjax", "in a branch", "target missed")
    for column in columns:
        table.add_column(column, justify="right")
    for ours, theirs in pairs:
        found = (_words(each) for each in (theirs["sent"], ours["sent"], ours["sent in a branch"]))
        name = "net" if ours["kind"] == PARALLEL_NET else ours["case"]
        missed = _missed(targets(platform, ours, theirs))
        table.add_row(name, ours["pass"], ours["way"], *found, missed)
    return table


def _words(sent: list[tuple[str, int]]) -> str:
    """Such as `all-reduce 128, 256`."""
    kinds = dict.fromkeys(kind for kind, _ in sent)
    numbers = {k: ", ".join(str(n) for kind, n in sent if kind == k) for k in kinds}
    return "; ".join(f"{kind} {found}" for kind, found in numbers.items())


def _missed(found: list[Target]) -> str:
    return "; ".join(str(each) for each in found if not each.met)
