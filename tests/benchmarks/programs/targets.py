"""What bnjax's programs are held to, beside the ideal and beside Flax's."""

from typing import Any, NamedTuple

from tests.benchmarks.cases import BACKWARD, EVAL, FORWARD, IDEAL
from tests.benchmarks.programs.topologies import Platform

# By three blocks on a TPU, where the sums of a layer are the epilogue of its convolution.
IDEAL_NET = (16, 5)
LAYER, NET, PARALLEL, PARALLEL_NET = KINDS = "layer", "net", "parallel", "parallel net"
QUICK = LAYER, NET, PARALLEL
_CLOSE, _EXACT = 1.05, 1.01  # an array of half of x's size is seen


class Target(NamedTuple):
    """A number that was found, and the largest that it should be."""

    name: str
    found: float
    limit: float

    @property
    def met(self) -> bool:
        """Whether it is no larger, but for rounding."""
        return self.found <= self.limit * (1 + 1e-6)

    def __str__(self) -> str:
        """Both, as a table shows them."""
        return f"{self.name} {self.found:,.4g} > {self.limit:,.4g}"


def targets(platform: Platform, row: dict[str, Any], reference: dict[str, Any]) -> list[Target]:
    """Those of a row of bnjax's, of which Flax's is the reference."""
    if row["kind"] == LAYER:
        return _of_layer(platform, row, reference)
    if row["kind"] == NET:
        return _of_net(platform, row, reference)
    if row["kind"] == PARALLEL:
        limit = {EVAL: 0, FORWARD: 1, BACKWARD: 2}[row["pass"]]
        return [Target("collectives", len(row["sent"]), limit)]
    return [Target("collectives", len(row["sent"]), len(reference["sent"]))]


def _of_layer(platform: Platform, row: dict[str, Any], reference: dict[str, Any]) -> list[Target]:
    if platform is Platform.tpu:
        return [Target("passes", _passes(row), _passes(reference))]
    reads, writes = IDEAL[row["pass"]]
    return [
        Target("kernels", row["kernels"], reference["kernels"]),
        Target("reads", row["reads"], reads * _CLOSE),
        Target("writes", row["writes"], writes * _CLOSE),
    ]


def _of_net(platform: Platform, row: dict[str, Any], reference: dict[str, Any]) -> list[Target]:
    if platform is Platform.tpu:
        cycles = row["cycles"] / reference["cycles"]
        passes = Target("passes", _passes(row), sum(IDEAL_NET) * _EXACT)
        return [passes, Target("cycles to Flax's", cycles, 1.02)]
    names = ("temp", "bytes") if row["dtype"] == "bfloat16" else ()
    return [Target(f"{name} to Flax's", row[name] / reference[name], 0.9) for name in names]


def _passes(row: dict[str, Any]) -> float:
    return row["reads"] + row["writes"]
