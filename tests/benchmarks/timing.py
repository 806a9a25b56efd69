"""Times of several functions, taken in turns, and the averages of their ratios."""

import random
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax

Runs = Mapping[str, Callable[[], Any]]
_WARM_UP = 2  # rounds that warm caches and memory up
_REST = 1e-3  # seconds: the last contender's threads wait busily for a while


def compiled(functions: Mapping[str, Callable[..., Any]], arguments: tuple) -> Runs:
    """Each function under jit, ready to run."""
    programs = {name: jax.jit(f).lower(*arguments).compile() for name, f in functions.items()}
    return {
        name: lambda program=program: jax.block_until_ready(program(*arguments))
        for name, program in programs.items()
    }


def turns(runs: Runs, rounds: int) -> dict[str, list[float]]:
    """Times in milliseconds, each round in another order: what else goes on hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    order, chance = list(runs), random.Random(0)
    for number in range(-_WARM_UP, rounds):
        chance.shuffle(order)
        for name in order:
            time.sleep(_REST)
            start = time.perf_counter()
            runs[name]()
            if number >= 0:
                times[name].append((time.perf_counter() - start) * 1e3)
    return times


def medians(times: Mapping[str, list[float]]) -> dict[str, float]:
    """The median of each."""
    return {name: statistics.median(values) for name, values in times.items()}


def measure(
    functions: Mapping[str, Callable[..., Any]], arguments: tuple, rounds: int
) -> dict[str, float]:
    """Median time of each function in milliseconds, compiled and taken in turns."""
    return medians(turns(compiled(functions, arguments), rounds))


def ratio(times: list[float], others: list[float]) -> float:
    """The median of the ratios within each round: what lasts a while hits both alike."""
    return statistics.median(a / b for a, b in zip(times, others, strict=True))


def geometric_mean(ratios: Iterable[float]) -> float | None:
    """Their geometric mean; None if there are none."""
    values = list(ratios)
    return statistics.geometric_mean(values) if values else None
