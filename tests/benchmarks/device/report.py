"""What was measured on a device, as tables, and once more as Markdown to paste."""

from collections.abc import Iterable, Iterator
from typing import Any

from rich.table import Table

from tests.benchmarks import torch_layers
from tests.benchmarks.cases import DTYPES, IDEAL, PASSES, PLAIN, STEADY
from tests.benchmarks.contenders import OURS, REFERENCE
from tests.benchmarks.device import exactness
from tests.benchmarks.timing import geometric_mean

Row = dict[str, Any]


def tables(data: dict[str, Any]) -> Iterator[Table | str]:
    """Setting, exactness, network, layers, Markdown, and what was skipped."""
    yield setting(data)
    yield _exactness(data["exactness"])
    if data["network"]:
        yield _network(data["network"])
    for which in PASSES:
        rows = [row for row in data["layers"] if row["pass"] == which]
        if rows:
            yield _layers(rows, data["copy"], which)
    if data["layers"]:
        yield "\nTo paste:\n\n" + markdown(data)
    yield from (f"skipped: {what}" for what in (*_failed(data), *data["skipped"]))
    yield f"{data['seconds']:.0f} s of measuring"


def setting(data: dict[str, Any]) -> str:
    """Where and with what, and what a copy moves."""
    copy = data["copy"]
    cache = "unknown" if copy["cache"] is None else f"{copy['cache'] / 1e6:.0f} MB"
    return (
        f"{data['device']}, {', '.join(data['versions'])}; sizes: {data['sizes']}; "
        f"a copy moves {copy['bytes/s'] / 1e9:,.0f} GB/s, the last cache holds {cache}"
    )


def _failed(data: dict[str, Any]) -> Iterator[str]:
    for row in data["layers"]:
        where = f"{row['case']} {row['dtype']} {row['pass']}"
        for name, error in row["failed"].items():
            yield f"{name} of {where}: {error}"
        for name, value in row["differ"].items():
            yield f"{name} of {where}: its results differ by {value:.1e}"


def _table(title: str, columns: Iterable[str], caption: str | None = None) -> Table:
    table = Table(title=title, caption=caption)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _exactness(rows: list[Row]) -> Table:
    beside = {f"{REFERENCE} {part}": part for part in ("y", "dx")}
    columns = "x ~ N(mean, 1)", *exactness.PARTS, *beside, "verdict"
    title = f"largest errors of {OURS}, as parts of the largest value, against float64"
    table = _table(title, columns)
    for row in rows:
        ours, theirs = (row["errors"][name] for name in (OURS, REFERENCE))
        errors = *(ours[part] for part in exactness.PARTS), *(theirs[p] for p in beside.values())
        wrong = ", ".join(row["wrong"])
        verdict = f"[bold red]WRONG: {wrong}[/]" if wrong else "right"
        table.add_row(exactness.name(row), *(f"{error:.0e}" for error in errors), verdict)
    return table


def _network(rows: list[Row]) -> Table:
    shape = "x".join(map(str, rows[0]["shape"]))
    columns = "", "dtype", "ms", f"to {REFERENCE}", "temporary MB", "peak MB in use"
    caption = "no peak where the device tells none, or more was in use before"
    table = _table(f"training step of 3 conv+BN+relu, {shape}", columns, caption)
    for row in rows:
        sizes = (row[key] for key in ("temporary bytes", "peak bytes"))
        memory = ("" if size is None else f"{size / 1e6:,.1f}" for size in sizes)
        times = f"{row['milliseconds']:.3f}", f"{row['ratio']:.2f}"
        table.add_row(row["contender"], row["dtype"], *times, *memory)
    return table


def _layers(rows: list[Row], copy: dict[str, Any], which: str) -> Table:
    names = list(dict.fromkeys(name for row in rows for name in row["microseconds"]))
    title = f"{which}: microseconds of a step, of {sum(IDEAL[which])} times x at least"
    columns = "x", "dtype", *names, "to flax", "to torch", f"GB/s {OURS}", "of a copy's", "flax's"
    caption = (
        "bytes that must be moved, over time, and over those of a copy in that time; "
        "*: more than a copy moves, so a cache gave some of them"
    )
    table = _table(title, (*columns, "x in cache"), caption)
    for row in rows:
        times = (_number(row["microseconds"].get(name), ".1f") for name in names)
        ratios = (_number(_ratio(row, to), ".2f") for to in (REFERENCE, "torch"))
        speed = row["bytes/s"].get(OURS)
        speed = "" if speed is None else f"{speed / 1e9:,.0f}"
        parts = (_part(row, name, copy) for name in (OURS, REFERENCE))
        cache = {None: "?", True: "fits", False: ""}[_fits(row, copy)]
        table.add_row(row["case"], row["dtype"], *times, *ratios, speed, *parts, cache)
    return table


def _fits(row: Row, copy: dict[str, Any]) -> bool | None:
    return None if copy["cache"] is None else row["bytes of x"] <= copy["cache"]


def _ratio(row: Row, to: str) -> float | None:
    """Of our time to another's: "torch" is its better format, so the larger ratio."""
    names = torch_layers.NAMES if to == "torch" else (to,)
    return max((row["ratios"][name] for name in names if name in row["ratios"]), default=None)


def _part(row: Row, name: str, copy: dict[str, Any]) -> str:
    if name not in row["bytes/s"]:
        return ""
    part = row["bytes/s"][name] / copy["bytes/s"]
    return f"{part:.0%}{'*' if part > 1 else ''}"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def markdown(data: dict[str, Any]) -> str:
    """A line for each input, then the geometric means; a column for each pass."""
    lines = [
        f"{setting(data)}. Microseconds of {OURS} (ratio to {REFERENCE}; to torch's better format; "
        "part of a copy's bytes/s, * with a cache's help):",
        "",
        "| x | dtype | " + " | ".join(PASSES) + " |",
        "|" + "---|" * (2 + len(PASSES)),
    ]
    found = {(row["case"], row["dtype"], row["pass"]): row for row in data["layers"]}
    for case, dtype in dict.fromkeys((case, dtype) for case, dtype, _ in found):
        cells = (_cell(found.get((case, dtype, which)), data["copy"]) for which in PASSES)
        lines.append(f"| {case} | {dtype} | {' | '.join(cells)} |")
    for dtype in DTYPES:
        cells = (_means(data, dtype, which) for which in PASSES)
        lines.append(f"| geometric mean, steady | {dtype} | {' | '.join(cells)} |")
    lines += ["", *_network_lines(data["network"])]
    return "\n".join(lines)


def _cell(row: Row | None, copy: dict[str, Any]) -> str:
    if row is None or OURS not in row["microseconds"]:
        return ""
    ratios = (_number(_ratio(row, to), ".2f") or "-" for to in (REFERENCE, "torch"))
    return f"{row['microseconds'][OURS]:.1f} ({'; '.join(ratios)}; {_part(row, OURS, copy)})"


def _means(data: dict[str, Any], dtype: str, which: str) -> str:
    wanted = {"dtype": dtype, "pass": which, "variant": PLAIN, "state": STEADY}
    rows = [row for row in data["layers"] if wanted.items() <= row.items()]
    columns = [[_ratio(row, to) for row in rows] for to in (REFERENCE, "torch")]
    columns.append([row["bytes/s"].get(OURS, 0) / data["copy"]["bytes/s"] for row in rows])
    means = [geometric_mean(filter(None, column)) for column in columns]
    return "; ".join("-" if mean is None else f"{mean:.2f}" for mean in means)


def _network_lines(rows: list[Row]) -> Iterator[str]:
    if not rows:
        return
    shape = "x".join(map(str, rows[0]["shape"]))
    yield f"A training step of three conv+BN+relu, {shape}:"
    yield ""
    yield f"| | dtype | ms | to {REFERENCE} | temporary MB |"
    yield "|---|---|---|---|---|"
    for row in rows:
        memory = row["temporary bytes"]
        memory = "" if memory is None else f"{memory / 1e6:,.1f}"
        times = f"{row['milliseconds']:.3f} | {row['ratio']:.2f}"
        yield f"| {row['contender']} | {row['dtype']} | {times} | {memory} |"
