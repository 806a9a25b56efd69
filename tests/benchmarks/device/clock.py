"""Time on a device that works through a queue, and how much of it there is for a whole run."""

import random
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, TypeVar

import jax

from tests.benchmarks.timing import Runs

Work = TypeVar("Work")
_MOST = 256  # launches that are queued at once


class Budget:
    """Seconds for everything, and the names of what did not fit."""

    def __init__(self, seconds: float) -> None:
        self._end = time.perf_counter() + seconds
        self.skipped: list[str] = []

    @property
    def left(self) -> float:
        """Seconds."""
        return self._end - time.perf_counter()

    def within(self, works: Iterable[Work], name: Callable[[Work], str]) -> Iterator[Work]:
        """Those that there is time for, if each takes as long as the longest so far."""
        longest = 0.0
        for work in works:
            if self.left <= longest:
                self.skipped.append(name(work))
                continue
            start = time.perf_counter()
            yield work
            longest = max(longest, time.perf_counter() - start)


class Queue(NamedTuple):
    """How runs are timed: rounds, and about how many seconds of launches are queued in each."""

    rounds: int
    seconds: float
    wait: Callable[[Any], Any] = jax.block_until_ready

    def turns(self, runs: Runs) -> dict[str, list[float]]:
        """Seconds of each launch, by round; each round is in another order."""
        launches = {name: self._enough(launch) for name, launch in runs.items()}
        times: dict[str, list[float]] = {name: [] for name in runs}
        order, chance = list(runs), random.Random(0)
        for _ in range(self.rounds):
            chance.shuffle(order)
            for name in order:
                times[name].append(self._timed(runs[name], launches[name]))
        return times

    def _enough(self, launch: Callable[[], Any]) -> int:
        self._timed(launch, 1)  # warms up
        return max(1, min(_MOST, int(self.seconds / self._timed(launch, 2))))

    def _timed(self, launch: Callable[[], Any], number: int) -> float:
        """One waits for the last alone: the queue keeps its order."""
        start = time.perf_counter()
        for _ in range(number - 1):
            launch()
        self.wait(launch())
        return (time.perf_counter() - start) / number
