"""What a policy costs beside the same layer without one: time, bytes and memory."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from rich.table import Table

import bnjax
from bnjax.policies import Blend, Example, Policy, Renorm, Running
from tests.benchmarks.cases import BACKWARD, DTYPES, FORWARD, Case, Inputs, inputs
from tests.benchmarks.contenders import linen
from tests.benchmarks.environment import Options
from tests.benchmarks.steps import step
from tests.benchmarks.timing import geometric_mean, medians, ratio, turns

PLAIN = "no policy"
POLICIES: dict[str, Policy | None] = {
    PLAIN: None,
    "Renorm": Renorm(),
    "Blend": Blend(prior=16),
    "Running(updated)": Running(updated=True),
    "Example": Example(0.1),
}
SHAPES = (
    ((32, 56, 56, 64), -1),
    ((32, 14, 14, 256), -1),
    ((32, 64, 56, 56), 1),
    ((4096, 256), -1),
)


def _layer(using: Policy | None) -> Any:
    def make(*args: Any, **fields: Any) -> bnjax.linen.BatchNorm:
        return bnjax.linen.BatchNorm(*args, using=using, **fields)

    return linen(make)


def cases(quick: bool) -> Sequence[Case]:
    """The shapes in each dtype."""
    shapes = [((2, 4, 4, 8), -1)] if quick else SHAPES
    return [Case(shape, axis, dtype) for dtype in DTYPES for shape, axis in shapes]


def measure(options: Options) -> dict[str, Any]:
    """A row for each case and pass: rounds of times, and what XLA counts, by policy."""
    rows = []
    for case in cases(options.quick):
        given = inputs(case)
        for which in (FORWARD, BACKWARD):
            compiled = programs(case, which, given, POLICIES)
            runs = {
                name: lambda program=program, given=given: jax.block_until_ready(program(*given))
                for name, program in compiled.items()
            }
            rounds = turns(runs, options.rounds)
            rows.append(
                {
                    "case": case.name,
                    "dtype": case.dtype,
                    "pass": which,
                    "rounds": rounds,
                    "milliseconds": medians(rounds),
                    "counted": {name: counted(each) for name, each in compiled.items()},
                }
            )
    return {"rows": rows}


def programs(
    case: Case, which: str, given: Inputs, policies: Mapping[str, Policy | None]
) -> dict[str, Any]:
    """A pass with each policy, compiled."""
    return {
        name: jax.jit(step(_layer(using), case, which)).lower(*given).compile()
        for name, using in policies.items()
    }


def counted(program: Any) -> dict[str, float]:
    """The bytes that it reads and writes and its operations, as XLA counts, and its memory."""
    costs = program.cost_analysis()
    needs = program.memory_analysis().temp_size_in_bytes
    return {"bytes": costs["bytes accessed"], "operations": costs["flops"], "memory": needs}


def tables(data: dict[str, Any]) -> Iterator[Table]:
    """The ratios to the layer without a policy, and their geometric means."""
    names = [name for name in POLICIES if name != PLAIN]
    title = "ratio to no policy: time, bytes read and written"
    table = Table("pass", "dtype", "case", f"{PLAIN}, ms", *names, title=title)
    for which in (FORWARD, BACKWARD):
        for dtype in DTYPES:
            rows = [row for row in data["rows"] if (row["pass"], row["dtype"]) == (which, dtype)]
            for row in rows:
                cells = (f"{_time(row, name):.2f}, {_bytes(row, name):.3f}" for name in names)
                own = f"{row['milliseconds'][PLAIN]:.2f}"
                table.add_row(which, dtype, row["case"], own, *cells)
            means = (geometric_mean(_time(row, name) for row in rows) for name in names)
            table.add_row(which, dtype, "all", "", *(f"{mean:.2f}" for mean in means))
    yield table


def _bytes(row: dict[str, Any], name: str) -> float:
    return row["counted"][name]["bytes"] / row["counted"][PLAIN]["bytes"]


def _time(row: dict[str, Any], name: str) -> float:
    return ratio(row["rounds"][name], row["rounds"][PLAIN])
