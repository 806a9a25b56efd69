"""Averaged weights (SWA, EMA) with the statistics that belong to them.

The average of the weights of many steps is often better than the last weights. But no running
statistics belong to it: those of the last weights, and the average of all, are somebody else's.
`bnjax.recalibrate` measures its own.
"""

from typing import Annotated, Any

import jax
import optax
import typer
from digits import ResNet, batches, load, loss_fn
from rich.console import Console
from rich.progress import track
from rich.table import Table

import bnjax
from bnjax.training import TrainState, eval_step, evaluate, init_state, train_step

console = Console()


def mean_of(trees: list[Any]) -> Any:
    """The average of trees, leaf by leaf."""
    return jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *trees)


def main(
    epochs: Annotated[int, typer.Option(min=2, help="The second half is averaged.")] = 12,
    lr: Annotated[float, typer.Option(min=0, help="Constant, and high.")] = 0.05,
    seed: int = 0,
) -> None:
    """Train at a high constant learning rate, average the weights, and evaluate the average."""
    splits = load(seed=seed)
    model = ResNet(splits.classes)
    state = init_state(model, optax.adam(lr), jax.random.PRNGKey(seed), splits.train.x[:2])
    step, kept = train_step(loss_fn), []
    for epoch in track(range(epochs), "training", console=console):
        for batch in batches(splits.train, 64, seed=seed + epoch):
            state, _ = step(state, batch)
        if epoch >= epochs // 2:
            kept.append(jax.device_get((state.params, state.batch_stats)))
    params, stats = mean_of([params for params, _ in kept]), mean_of([stats for _, stats in kept])
    clean = list(batches(splits.train, 256))
    exact = bnjax.recalibrate(model, {"params": params, "batch_stats": stats}, clean)
    table = Table("weights", "statistics", "test accuracy", "test loss", title="Averaged weights")

    def row(weights: str, which: str, tested: TrainState) -> None:
        result = evaluate(eval_step(loss_fn), tested, batches(splits.test, 256))
        table.add_row(weights, which, f"{result['accuracy']:.3f}", f"{result['loss']:.3f}")

    averaged = state.replace(params=params)
    row("of the last step", "its own", state)
    row("averaged", "of the last step", averaged)
    row("averaged", "averaged", averaged.replace(batch_stats=stats))
    row("averaged", "recalibrated", averaged.replace(batch_stats=exact["batch_stats"]))
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
