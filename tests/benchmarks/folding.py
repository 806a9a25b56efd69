"""Time of a ResNet-18 in evaluation before and after `bnjax.fold`, interleaved in one process.

Run it as `python -m tests.benchmarks.folding`. Both are compiled, checked for equal outputs, and
timed in turns, so that what else the machine does hits both alike: the ratio is the result.
"""

from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import typer
from flax import linen as nn
from rich.console import Console
from rich.table import Table

import bnjax
from tests.benchmarks.environment import settle, touch_heap
from tests.benchmarks.timing import measure
from tests.support.models import ResNet


def random_variables(model: nn.Module, x: jax.Array) -> Any:
    """Variables of the model with positive variances, which is all that its speed asks for."""
    rng = np.random.default_rng(0)

    def draw(path: tuple, leaf: Any) -> jax.Array:
        spread = 1 / np.sqrt(leaf.size / leaf.shape[-1]) if path[-1].key == "kernel" else 0.1
        values = rng.normal(path[-1].key in ("scale", "var"), spread, leaf.shape)
        return jnp.asarray(np.abs(values) if path[-1].key == "var" else values, leaf.dtype)

    shapes = jax.eval_shape(model.init, jax.random.key(0), x)
    return jax.tree_util.tree_map_with_path(draw, shapes)


def main(
    rounds: Annotated[int, typer.Option(help="Timings of each contender.")] = 31,
    width: Annotated[int, typer.Option(help="Channels of the first stage.")] = 64,
    size: Annotated[int, typer.Option(help="Height and width of the images.")] = 32,
) -> None:
    """Time the evaluation at batch sizes 1 and 32, with Flax's layer and bnjax's drop-in."""
    settle("tests.benchmarks.folding")
    touch_heap()
    title = f"ResNet-18, width {width}, {size}x{size}: medians of {rounds} rounds, milliseconds"
    table = Table(title=title)
    for column in ("batch norm", "batch", "before", "folded", "ratio", "difference"):
        table.add_column(column, justify="right")
    for name, norm in (("flax", nn.BatchNorm), ("bnjax", bnjax.linen.BatchNorm)):
        for batch in (1, 32):
            shape = (batch, size, size, 3)
            x = jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.float32)
            model = ResNet(width=width, norm=norm)
            variables = random_variables(model, x)
            folded = bnjax.fold(model, variables, x)  # raises where the outputs differ
            functions = {
                "before": lambda v, new, x, model=model: model.apply(v, x),
                "folded": lambda v, new, x, folded=folded: folded.apply(new, x),
            }
            times = measure(functions, (variables, folded.variables, x), rounds)
            cells = (f"{value:.2f}" for value in times.values())
            ratio = f"{times['folded'] / times['before']:.2f}"
            relative = f"{folded.max_difference / folded.report.scale:.1e}"
            table.add_row(name, str(batch), *cells, ratio, relative)
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
