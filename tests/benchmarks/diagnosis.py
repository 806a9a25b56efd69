"""Time of `bnjax.diagnose` beside the forward passes that it looks at: ResNet-50, interleaved.

Run it as `python -m tests.benchmarks.diagnosis`. Both are measured over many batches and over few,
and the difference is the time without compilation; the time with it is given as well.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import typer
from rich.console import Console
from rich.table import Table

import bnjax

sys.path.append(str(Path(__file__).parents[2] / "examples"))
from resnet import ResNet50


def forward_passes(model: Any, variables: Any, batches: list[Any]) -> None:
    """Each batch once in evaluation and once in training, compiled together."""

    @jax.jit
    def both(variables: Any, x: Any) -> Any:
        return model.apply(variables, x), model.apply(variables, x, mutable=["batch_stats"])

    for x in batches:
        jax.block_until_ready(both(variables, x))


def main(
    size: Annotated[int, typer.Option(help="Height and width of the images.")] = 64,
    examples: Annotated[int, typer.Option(help="Images in a batch.")] = 16,
    number: Annotated[int, typer.Option(help="Batches.")] = 8,
    rounds: Annotated[int, typer.Option(help="Timings of each.")] = 3,
) -> None:
    """Time the diagnosis of a ResNet-50."""
    model = ResNet50()
    x = np.random.default_rng(0).normal(size=(examples, size, size, 3)).astype(np.float32)
    variables = jax.jit(model.init)(jax.random.key(0), x)
    contenders: dict[str, Callable[[list[Any]], Any]] = {
        "forward passes": lambda batches: forward_passes(model, variables, batches),
        "diagnose": lambda batches: bnjax.diagnose(model, variables, batches),
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            pair = []
            for count in (1, number + 1):
                jax.clear_caches()
                start = time.perf_counter()
                run([x] * count)
                pair.append(time.perf_counter() - start)
            # The diagnosis looks at one batch once more, among other batch mates.
            looks = number + (name == "diagnose")
            times[name].append(((pair[1] - pair[0]) * looks / number, pair[1]))
    table = Table(title=f"ResNet-50, {size}x{size}, {number} batches of {examples}, seconds")
    for column in ("", "without compilation", "with it"):
        table.add_column(column, justify="right")
    medians = {name: np.median(pairs, 0) for name, pairs in times.items()}
    for name, pair in medians.items():
        table.add_row(name, *(f"{seconds:.2f}" for seconds in pair))
    ratios = medians["diagnose"] / medians["forward passes"]
    table.add_row("ratio", *(f"{ratio:.2f}" for ratio in ratios))
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
