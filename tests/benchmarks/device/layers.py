"""One layer: steps in a row, each on arrays of its own, so that nothing stays in a cache."""

from collections.abc import Callable
from typing import Any

import jax
from rich.console import Console
from rich.progress import track

from tests.benchmarks.cases import IDEAL, Case, Inputs, inputs
from tests.benchmarks.contenders import OURS, REFERENCE, Apply, available
from tests.benchmarks.device import cuda
from tests.benchmarks.device.clock import Budget, Queue
from tests.benchmarks.device.plan import Plan
from tests.benchmarks.steps import compared, difference, step
from tests.benchmarks.timing import medians, ratio

Launch = Callable[[], list[dict[str, Any]]]


def measure(plan: Plan, queue: Queue, budget: Budget) -> list[dict[str, Any]]:
    """A row for each case and pass that there is time for."""
    works = list(plan.works())
    shown = track(
        budget.within(works, lambda work: f"{_name(*work)}: no time"),
        "layers",
        total=len(works),
        console=Console(stderr=True),
        transient=True,
    )
    rows = []
    for case, which in shown:
        try:
            rows.append(row(case, which, plan, queue))
        except Exception as error:  # what this device cannot do must not cost the rest
            budget.skipped.append(f"{_name(case, which)}: {error}")
    return rows


def _name(case: Case, which: str) -> str:
    return f"{case.name} {case.dtype} {which}"


def row(case: Case, which: str, plan: Plan, queue: Queue) -> dict[str, Any]:
    """Times of a step, bytes a second, ratios to ours, and who is not in it for what."""
    first = inputs(case)
    number = plan.arrays(first.x.nbytes, which)
    given = [first, *(inputs(case, i)._replace(values=first.values) for i in range(1, number))]
    runs, differing, failed = _agreeing(case, which, given)
    rounds = {
        name: [seconds / number for seconds in found] for name, found in queue.turns(runs).items()
    }
    seconds = medians(rounds)
    return {
        **case._asdict(),
        "case": case.name,
        "pass": which,
        "arrays": number,
        "bytes of x": first.x.nbytes,
        "microseconds": {name: value * 1e6 for name, value in seconds.items()},
        "bytes/s": {name: sum(IDEAL[which]) * first.x.nbytes / s for name, s in seconds.items()},
        "ratios": {
            name: ratio(rounds[OURS], found)
            for name, found in rounds.items()
            if OURS in rounds and name != OURS
        },
        "differ": differing,
        "failed": failed,
    }


def _agreeing(
    case: Case, which: str, given: list[Inputs]
) -> tuple[dict[str, Launch], dict[str, float], dict[str, str]]:
    """Contenders with Flax's results in float32, the differences of others, and what failed."""
    wide = jax.tree.map(lambda v: v if v.dtype == bool else v.astype("float32"), given[0])
    expected = compared(jax.jit(step(available(True)[REFERENCE], case, which))(*wide))
    runs, differing, failed = {}, {}, {}
    makers = {
        **{name: _maker(apply, case, which, given) for name, apply in available(True).items()},
        **cuda.makers(case, which, given),
    }
    for name, make in makers.items():
        try:
            launch, first = make()
            found = float(difference(compared(first(launch())), expected))
        except Exception as error:  # the others are measured all the same
            failed[name] = str(error).strip().splitlines()[0]
            continue
        if found <= case.tolerance:
            runs[name] = launch
        else:
            differing[name] = found
    return runs, differing, failed


def _maker(apply: Apply, case: Case, which: str, given: list[Inputs]) -> Callable[[], Any]:
    def make() -> tuple[Launch, Callable[[Any], Any]]:
        program = jax.jit(in_a_row(apply, case, which)).lower(given).compile()
        return lambda: program(given), lambda results: results[0]

    return make


def in_a_row(apply: Apply, case: Case, which: str) -> Callable[[list[Inputs]], list[Any]]:
    """A program that takes steps one after the other: launching it takes no longer than they do."""
    one = step(apply, case, which, waits=True)

    def run(given: list[Inputs]) -> list[Any]:
        results: list[Any] = []
        for each in given:
            if results:
                each, results[-1] = jax.lax.optimization_barrier((each, results[-1]))
            results.append(one(*each))
        return results

    return run


def faults(rows: list[dict[str, Any]]) -> list[str]:
    """Where bnjax failed, or had other results than Flax."""
    found = []
    for row in rows:
        where = f"{row['case']}, {row['dtype']}, {row['pass']}"
        if OURS in row["differ"]:
            found.append(f"{where}: off Flax's results by {row['differ'][OURS]:.1e}")
        if OURS in row["failed"]:
            found.append(f"{where}: failed: {row['failed'][OURS]}")
    return found
