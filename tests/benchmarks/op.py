"""Time of one layer: evaluation, forward, forward and backward, in all cases."""

import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from rich.console import Console
from rich.progress import track
from rich.table import Table

from tests.benchmarks import torch_layers
from tests.benchmarks.cases import (
    BACKWARD,
    CENTRED,
    COLD,
    DTYPES,
    EVAL,
    FAR,
    FORWARD,
    MASK,
    PASSES,
    PLAIN,
    RELU,
    RESIDUAL,
    STATES,
    STEADY,
    Case,
    Inputs,
    inputs,
)
from tests.benchmarks.contenders import MASKED, OURS, REFERENCE, available
from tests.benchmarks.environment import Options, page_faults
from tests.benchmarks.floor import FLOOR, floors, lowest
from tests.benchmarks.steps import compared, difference, step
from tests.benchmarks.timing import compiled, geometric_mean, medians, ratio, turns

IMAGES = (
    (32, 56, 56, 64),
    (32, 28, 28, 128),
    (32, 14, 14, 256),
    (32, 7, 7, 512),
    (8, 112, 112, 64),
)
OTHERS = ((4096, 256), (32, 512, 256), (4, 16, 28, 28, 64))
# Measured in every state: there with bnjax, Flax and the floor alone.
IN_EACH_STATE = (*((shape, -1) for shape in IMAGES[:4]), ((32, 64, 56, 56), 1))
VARIED = (32, 28, 28, 128)
TRAINING = FORWARD, BACKWARD


def cases(quick: bool) -> Sequence[tuple[Case, tuple[str, ...]]]:
    """Every case with its passes."""
    if quick:
        varied = [Case((8, 4, 4, 8), variant=v) for v in (MASK, RESIDUAL)]
        plain = Case((2, 8, 4, 4), 1), Case((2, 4, 4, 8), dtype="bfloat16")
        others = [plain[0]._replace(state=state) for state in (COLD, CENTRED)]
        return [(c, (BACKWARD,)) for c in (*plain, *varied, *others)] + [(plain[0], (EVAL,))]
    layouts = [(shape, -1) for shape in IMAGES + OTHERS]
    layouts += [((n, c, *space), 1) for n, *space, c in IMAGES]
    plain = [Case(shape, axis, dtype) for dtype in DTYPES for shape, axis in layouts]
    varied = [
        Case(VARIED, dtype=dtype, variant=variant)
        for dtype in DTYPES
        for variant in (MASK, RELU, RESIDUAL, FAR)
    ]
    others = [
        Case(shape, axis, dtype, state=state)
        for state in (COLD, CENTRED)
        for dtype in DTYPES
        for shape, axis in IN_EACH_STATE
    ]
    return [(case, PASSES) for case in plain] + [(case, TRAINING) for case in varied + others]


def measure(options: Options) -> dict[str, Any]:
    """A row for each case and pass: times by contender, and whose results differ."""
    rows = []
    console = Console(stderr=True)
    for case, passes in track(cases(options.quick), "layers", console=console, transient=True):
        given = inputs(case)
        expected = _expected(case, given)
        for which in passes:
            runs, differing = agreeing(case, given, which, expected)
            runs |= compiled(floors(case, which), given)
            faults = page_faults()
            rounds = lowest(turns(runs, options.rounds))
            rows.append(
                {
                    **case._asdict(),
                    "case": case.name,
                    "pass": which,
                    "milliseconds": medians(rounds),
                    "rounds": rounds,
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
    known = {name: available()[name] for name in _contenders(case)}
    runs = {
        **compiled({name: step(apply, case, which) for name, apply in known.items()}, given),
        **(torch_layers.runs(case, given, which) if case.state == STEADY else {}),
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


def _contenders(case: Case) -> list[str]:
    """All where nothing is special; those with a mask; otherwise bnjax and Flax."""
    if case.variant == PLAIN and case.state == STEADY:
        return list(available())
    return [n for n in (MASKED if case.variant == MASK else (OURS, REFERENCE)) if n in available()]


def ratios(rows: list[dict[str, Any]], name: str, to: str) -> list[float]:
    """Of a contender's times to another's, wherever both are; "torch" is its better format."""

    def times(row: dict[str, Any], name: str) -> list[float] | None:
        names = torch_layers.NAMES if name == "torch" else (name,)
        found = [row["rounds"][each] for each in names if each in row["rounds"]]
        return min(found, key=statistics.median, default=None)

    pairs = [(times(row, name), times(row, to)) for row in rows]
    return [ratio(a, b) for a, b in pairs if a is not None and b is not None]


GROUPS: dict[str, Callable[[dict[str, Any]], bool]] = {
    "NHWC": lambda row: row["case"].startswith("NHWC"),
    "NCHW": lambda row: row["case"].startswith("NCHW"),
    "all 4-d": lambda row: row["case"].startswith("N"),
    "1d, 3d": lambda row: not row["case"].startswith("N"),
}


def chosen(
    data: dict[str, Any], dtype: str, which: str, state: str = STEADY
) -> list[dict[str, Any]]:
    """The rows without variants of a dtype, pass and state."""
    wanted = {"dtype": dtype, "pass": which, "state": state, "variant": PLAIN}
    return [row for row in data["rows"] if wanted.items() <= row.items()]


def tables(data: dict[str, Any]) -> Iterator[Table]:
    """Medians and ratios of every case, then the geometric means: of all, and by state."""
    for which in PASSES:
        for dtype in DTYPES:
            rows = [r for r in data["rows"] if (r["dtype"], r["pass"]) == (dtype, which)]
            if rows:
                yield _times(rows, f"{which}, {dtype}: medians in milliseconds, and ratios")
    for to in (REFERENCE, FLOOR, "torch"):
        contenders = [*available(), "torch", FLOOR]
        contenders = [OURS] if to == "torch" else [name for name in contenders if name != to]
        table = _means_table(
            f"{STEADY}: geometric means of the ratios to {to}", "cases", contenders
        )
        for which in PASSES:
            for dtype in DTYPES:
                for group, belongs in GROUPS.items():
                    rows = list(filter(belongs, chosen(data, dtype, which)))
                    means = [geometric_mean(ratios(rows, name, to)) for name in contenders]
                    _add_means(table, which, dtype, group, means)
        yield table
    yield _by_state(data)


def _by_state(data: dict[str, Any]) -> Table:
    """The same shapes in each state."""
    pairs = (OURS, REFERENCE), (OURS, FLOOR), (FLOOR, REFERENCE)
    title = "geometric means over the shapes that are measured in every state"
    table = _means_table(title, "state", [f"{name} to {to}" for name, to in pairs])

    def place(row: dict[str, Any]) -> tuple[int, ...]:
        return (*row["shape"], row["axis"])

    everywhere = {place(row) for row in data["rows"] if row["state"] != STEADY}
    for which in TRAINING:
        for dtype in DTYPES:
            for state in STATES:
                rows = [r for r in chosen(data, dtype, which, state) if place(r) in everywhere]
                means = [geometric_mean(ratios(rows, *pair)) for pair in pairs]
                _add_means(table, which, dtype, state, means)
    return table


def _means_table(title: str, third: str, columns: Sequence[str]) -> Table:
    table = Table(title=title)
    for column in ("pass", "dtype", third, *columns):
        table.add_column(column, justify="right")
    return table


def _add_means(table: Table, *cells: Any) -> None:
    *names, means = cells
    if any(means):
        table.add_row(*names, *map(_number, means))


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
