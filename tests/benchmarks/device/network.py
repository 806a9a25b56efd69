"""A training step of three convolutions, batch norms and relus: its time, and its memory."""

from collections.abc import Callable, Iterator
from typing import Any

import jax

from tests.benchmarks import blocks
from tests.benchmarks.cases import DTYPES
from tests.benchmarks.contenders import REFERENCE, affine, available
from tests.benchmarks.device.clock import Budget, Queue
from tests.benchmarks.device.plan import Plan
from tests.benchmarks.timing import medians, ratio

DEPTH = 3


def measure(plan: Plan, queue: Queue, budget: Budget) -> list[dict[str, Any]]:
    """A row for each dtype and contender; what needs less memory first, since peaks only rise."""
    dtypes = budget.within(reversed(DTYPES), lambda dtype: f"the network in {dtype}: no time")
    return [row for dtype in dtypes for row in _rows(dtype, plan, queue)]


def _rows(dtype: str, plan: Plan, queue: Queue) -> Iterator[dict[str, Any]]:
    x = blocks.images(plan.network, dtype)
    network = blocks.steady(blocks.variables(DEPTH, plan.network[-1]), x)
    programs = {
        name: jax.jit(blocks.training_step(apply)).lower(network, x).compile()
        for name, apply in {**available(True), blocks.AFFINE: affine}.items()
    }
    temporary = {name: _temporary(program) for name, program in programs.items()}
    runs: dict[str, Callable[[], Any]] = {
        name: lambda program=programs[name]: program(network, x)
        for name in sorted(programs, key=lambda name: temporary[name] or 0)
    }
    peaks = {name: _peak(run) for name, run in runs.items()}
    times = queue.turns(runs)
    for name, seconds in medians(times).items():
        yield {
            "dtype": dtype,
            "shape": plan.network,
            "contender": name,
            "milliseconds": seconds * 1e3,
            "ratio": ratio(times[name], times[REFERENCE]),
            "temporary bytes": temporary[name],
            "peak bytes": peaks[name],
        }


def _temporary(program: Any) -> int | None:
    analysis = program.memory_analysis()
    return None if analysis is None else analysis.temp_size_in_bytes


def _peak(run: Callable[[], Any]) -> int | None:
    """The most bytes in use during a run; None if the device doesn't say, or used more before."""
    before = _most_in_use()
    jax.block_until_ready(run())
    after = _most_in_use()
    return after if after is not None and before is not None and after > before else None


def _most_in_use() -> int | None:
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
