"""What is measured: whole on an accelerator, smaller on a CPU, tiny to try everything."""

from collections.abc import Iterator
from typing import NamedTuple

import jax

from tests.benchmarks.cases import BACKWARD, COLD, DTYPES, EVAL, FORWARD, MASK, Case
from tests.benchmarks.environment import Options

Place = tuple[tuple[int, ...], int]
LAYERS: tuple[Place, ...] = (
    ((128, 56, 56, 64), -1),
    ((128, 28, 28, 128), -1),
    ((128, 14, 14, 256), -1),
    ((128, 7, 7, 512), -1),
    ((4096, 512), -1),
    ((128, 64, 56, 56), 1),
    ((128, 512, 7, 7), 1),
)
_MOST_ARRAYS = {EVAL: 32, FORWARD: 16, BACKWARD: 8}  # what compiling a longer program is worth


class Plan(NamedTuple):
    """Sizes, and how long things may take."""

    name: str
    layers: tuple[Place, ...] = LAYERS
    masked: tuple[Place, ...] = LAYERS[1:2]
    cold: tuple[Place, ...] = LAYERS[1:4:2]
    network: tuple[int, ...] = (128, 56, 56, 64)
    copies: tuple[int, ...] = (2**28, 2**29)  # bytes
    footprint: int = 2**29  # bytes that are used in turn, more than a cache holds
    seconds: float = 0.03  # of launches that are queued at once
    rounds: int = 15
    budget: float = 440  # seconds: with the start of the process less than 8 minutes

    def works(self) -> Iterator[tuple[Case, str]]:
        """Cases and passes, what says most first."""
        training = BACKWARD, FORWARD
        for which in (*training, EVAL):
            yield from ((case, which) for case in _cases(self.layers))
        for which in training:
            yield from ((c._replace(variant=MASK), which) for c in _cases(self.masked))
            yield from ((c._replace(state=COLD), which) for c in _cases(self.cold))

    def arrays(self, size: int, which: str) -> int:
        """How many inputs of so many bytes a program works through, one after the other."""
        return max(2, min(_MOST_ARRAYS[which], -(-self.footprint // (2 * size))))


def _cases(places: tuple[Place, ...]) -> Iterator[Case]:
    yield from (Case(shape, axis, dtype) for shape, axis in places for dtype in DTYPES)


def plan(options: Options) -> Plan:
    """The plan for the device that there is."""
    whole = Plan("whole", rounds=options.rounds)
    if options.quick:
        tiny: tuple[Place, ...] = ((4, 4, 4, 8), -1), ((4, 8, 4, 4), 1)
        whole = whole._replace(
            name="tiny, to try everything", layers=tiny, masked=tiny[:1], cold=tiny[:1]
        )
        return whole._replace(network=(2, 8, 8, 4), copies=(2**16,), footprint=0, seconds=0)
    if jax.default_backend() == "cpu":
        layers, masked, cold = map(_sixteenth, (whole.layers, whole.masked, whole.cold))
        whole = whole._replace(
            name="a sixteenth, to try: times mean nothing", layers=layers, masked=masked, cold=cold
        )
        whole = whole._replace(network=(8, 56, 56, 64), copies=(2**25, 2**26), footprint=0)
        return whole._replace(seconds=0, rounds=min(5, options.rounds))
    return whole


def _sixteenth(places: tuple[Place, ...]) -> tuple[Place, ...]:
    return tuple(((shape[0] // 16, *shape[1:]), axis) for shape, axis in places)
