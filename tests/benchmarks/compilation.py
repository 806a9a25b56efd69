"""Time to trace, lower and compile the training step of a network of 50 layers, beside Flax's."""

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from rich.table import Table

import bnjax
from tests.benchmarks.contenders import OURS, REFERENCE
from tests.benchmarks.environment import Options
from tests.benchmarks.network import gradient
from tests.support.models import ResNet

NORMS: dict[str, Callable[..., nn.Module]] = {
    REFERENCE: nn.BatchNorm,
    OURS: bnjax.linen.BatchNorm,
}
STAGES = (4, 6, 9, 5)  # of two convolutions each; a stem and a head make 50
STEPS = "trace", "lower", "compile"
_ROUNDS = 3


def measure(options: Options) -> dict[str, Any]:
    """Median seconds, in turns, each from cold caches; tracing, which is short, more often."""
    stages, rounds = ((1,), 1) if options.quick else (STAGES, _ROUNDS)
    x = jnp.zeros((2, 8, 8, 3))
    times: dict[str, list[dict[str, float]]] = {name: [] for name in NORMS}
    for _ in range(rounds):
        for name, norm in NORMS.items():
            model = ResNet(stages, norm=norm)
            variables = jax.eval_shape(model.init, jax.random.key(0), x)
            jax.clear_caches()
            times[name].append(_timed(gradient(model), variables, x))
    rows = [
        {
            "contender": name,
            **{step: statistics.median(found[step] for found in times[name]) for step in STEPS},
        }
        for name in NORMS
    ]
    return {"layers": 2 * sum(stages) + 2, "rows": rows}


def _timed(step: Callable[..., Any], *arguments: Any) -> dict[str, float]:
    clock = [time.perf_counter()]
    traced = jax.jit(step).trace(*arguments)
    clock.append(time.perf_counter())
    lowered = traced.lower()
    clock.append(time.perf_counter())
    lowered.compile()
    clock.append(time.perf_counter())
    return {name: clock[i + 1] - clock[i] for i, name in enumerate(STEPS)}


def tables(data: dict[str, Any]) -> Iterator[Table]:
    """Seconds, and ratios to Flax."""
    table = Table(title=f"training step of a network of {data['layers']} layers: seconds")
    for column in ("", *STEPS, "all"):
        table.add_column(column, justify="right")
    seconds = {row["contender"]: [row[step] for step in STEPS] for row in data["rows"]}
    for found in seconds.values():
        found.append(sum(found))
    for name, found in seconds.items():
        table.add_row(name, *(f"{value:.2f}" for value in found))
    pairs = zip(seconds[OURS], seconds[REFERENCE], strict=True)
    table.add_row("ratio", *(f"{ours / theirs:.2f}" for ours, theirs in pairs))
    yield table
