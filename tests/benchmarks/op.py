"""Time of one layer: evaluation, forward, forward and backward, in all cases."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from rich.console import Console
from rich.progress import track
from rich.table import Table

from tests.benchmarks import torch_layers
from tests.benchmarks.cases import (
    BACKWARD,
    DTYPES,
    EVAL,
    FAR,
    FLOOR,
    FORWARD,
    MASK,
    PASSES,
    PLAIN,
    RELU,
    RESIDUAL,
    Case,
    Inputs,
    compared,
    difference,
    floors,
    inputs,
    lowest,
    step,
)
from tests.benchmarks.contenders import MASKED, OURS, REFERENCE, available
from tests.benchmarks.environment import Options, page_faults
from tests.benchmarks.timing import compiled, geometric_mean, medians, turns

IMAGES = (
    (32, 56, 56, 64),
    (32, 28, 28, 128),
    (32, 14, 14, 256),
    (32, 7, 7, 512),
    (8, 112, 112, 64),
)
OTHERS = ((4096, 256), (32, 512, 256), (4, 16, 28, 28, 64))
VARIED = (32, 28, 28, 128)


def cases(quick: bool) -> Sequence[tuple[Case, tuple[str, ...]]]:
    """Every case with its passes."""
    if quick:
        varied = [Case((8, 4, 4, 8), variant=v) for v in (MASK, RESIDUAL)]
        plain = Case((2, 8, 4, 4), 1), Case((2, 4, 4, 8), dtype="bfloat16")
        return [(case, (BACKWARD,)) for case in (*plain, *varied)] + [(plain[0], (EVAL,))]
    layouts = [(shape, -1) for shape in IMAGES + OTHERS]
    layouts += [((n, c, *space), 1) for n, *space, c in IMAGES]
    plain = [Case(shape, axis, dtype) for dtype in DTYPES for shape, axis in layouts]
    varied = [
        Case(VARIED, dtype=dtype, variant=variant)
        for dtype in DTYPES
        for variant in (MASK, RELU, RESIDUAL, FAR)
    ]
    return [(case, PASSES) for case in plain] + [(case, (FORWARD, BACKWARD)) for case in varied]


def measure(options: Options) -> dict[str, Any]:
    """A row for each case and pass: medians by contender, and whose results differ."""
    rows = []
    console = Console(stderr=True)
    for case, passes in track(cases(options.quick), "layers", console=console, transient=True):
        given = inputs(case)
        expected = _expected(case, given)
        for which in passes:
            runs, differing = agreeing(case, given, which, expected)
            runs |= compiled(floors(case, which), given)
            faults = page_faults()
            times = lowest(medians(turns(runs, options.rounds)))
            rows.append(
                {
                    "case": case.name,
                    "dtype": case.dtype,
                    "variant": case.variant,
                    "pass": which,
                    "milliseconds": times,
                    "differ": differing,
                    "page faults": (page_faults() - faults) / options.rounds,
                }
            )
    return {"rows": rows}


def _expected(case: Case, given: Inputs) -> dict[str, Any]:
    """Flax's results in float32, for evaluation and training."""
    wide = jax.tree.map(lambda v: v if v.dtype == bool else v.astype("float32"), given)
    return {
        which: jax.jit(step(available()[REFERENCE], case, which))(*wide)
        for which in (EVAL, BACKWARD)
    }


def agreeing(
    case: Case, given: Inputs, which: str, expected: dict[str, Any]
) -> tuple[dict[str, Callable[[], Any]], dict[str, float]]:
    """The contenders with the expected results, and the differences of the others."""
    known = available() if case.variant == PLAIN else {n: available()[n] for n in _few(case)}
    runs = {
        **compiled({name: step(apply, case, which) for name, apply in known.items()}, given),
        **torch_layers.runs(case, given, which),
    }
    differing = {}
    for name in list(runs):
        result = runs[name]()
        if name in torch_layers.NAMES:
            result = torch_layers.as_jax(result, case)
        result = compared(result)
        target = expected[EVAL if which == EVAL else BACKWARD]
        found = float(difference(result, {key: target[key] for key in result}))
        if not found <= case.tolerance:
            differing[name] = found
            del runs[name]
    return runs, differing


def _few(case: Case) -> list[str]:
    """The contenders of a variant: those with a mask, or bnjax and Flax."""
    return [n for n in (MASKED if case.variant == MASK else (OURS, REFERENCE)) if n in available()]


def ratios(rows: list[dict[str, Any]], name: str, to: str) -> list[float]:
    """Of a contender's time to another's, wherever both are; "torch" is its better format."""

    def time(row: dict[str, Any], name: str) -> float | None:
        found = [ms for key, ms in row["milliseconds"].items() if key == name]
        if name == "torch":
            found = [ms for key, ms in row["milliseconds"].items() if key in torch_layers.NAMES]
        return min(found, default=None)

    pairs = [(time(row, name), time(row, to)) for row in rows]
    return [a / b for a, b in pairs if a is not None and b is not None]


GROUPS: dict[str, Callable[[dict[str, Any]], bool]] = {
    "NHWC": lambda row: row["case"].startswith("NHWC"),
    "NCHW": lambda row: row["case"].startswith("NCHW"),
    "all 4-d": lambda row: row["case"].startswith("N"),
    "1d, 3d": lambda row: not row["case"].startswith("N"),
}


def chosen(data: dict[str, Any], dtype: str, which: str) -> list[dict[str, Any]]:
    """The rows without variants of a dtype and pass."""
    rows = data["rows"]
    return [r for r in rows if (r["dtype"], r["pass"], r["variant"]) == (dtype, which, PLAIN)]


def tables(data: dict[str, Any]) -> Iterator[Table]:
    """Medians and ratios of every case, then the geometric means."""
    for which in PASSES:
        for dtype in DTYPES:
            rows = [r for r in data["rows"] if (r["dtype"], r["pass"]) == (dtype, which)]
            if rows:
                yield _times(rows, f"{which}, {dtype}: medians in milliseconds, and ratios")
    for to in (REFERENCE, FLOOR, "torch"):
        table = Table(title=f"geometric means of the ratios to {to}")
        contenders = [*available(), "torch", FLOOR]
        contenders = [OURS] if to == "torch" else [name for name in contenders if name != to]
        for column in ("pass", "dtype", "cases", *contenders):
            table.add_column(column, justify="right")
        for which in PASSES:
            for dtype in DTYPES:
                for group, belongs in GROUPS.items():
                    rows = list(filter(belongs, chosen(data, dtype, which)))
                    means = [geometric_mean(ratios(rows, name, to)) for name in contenders]
                    if any(means):
                        table.add_row(which, dtype, group, *map(_number, means))
        yield table


def _times(rows: list[dict[str, Any]], title: str) -> Table:
    names = list({name: None for row in rows for name in row["milliseconds"]})
    table = Table(title=title, caption=_caption(rows))
    short = {name: name.replace("torch channels_last", "torch last") for name in names}
    for column in ("", *(short[name] for name in names), "to flax", "to floor", "to torch"):
        table.add_column(column, justify="right")
    for row in rows:
        times = [_number(row["milliseconds"].get(name)) for name in names]
        to = [ratios([row], OURS, other) for other in (REFERENCE, FLOOR, "torch")]
        table.add_row(row["case"], *times, *(_number(r[0] if r else None) for r in to))
    return table


def _caption(rows: list[dict[str, Any]]) -> str:
    worst: dict[str, float] = {}
    for row in rows:
        for name, found in row["differ"].items():
            worst[name] = max(worst.get(name, 0), found)
    found = ", ".join(f"{name} (by {value:.1%})" for name, value in worst.items())
    faults = f"at most {max(row['page faults'] for row in rows):,.0f} page faults in a round"
    return f"not timed where its results differ: {found}; {faults}" if found else faults


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
