"""Average weights (EMA, SWA, schedule-free), and recompute the running statistics for the average.

An average of the weights over many steps is often better than the last weights. But the running
statistics from training belong to other weights. `Average.recalibrated` recomputes them for the
average, and `bnjax.recalibrate` does the same for weights that an optimizer averages.
"""

from typing import Annotated, Any

import jax
import optax
import typer
from digits import ResNet, Splits, batches, load, loss_fn
from rich.console import Console
from rich.progress import track
from rich.table import Table

import bnjax
from bnjax.training import Average, TrainState, eval_step, evaluate, init_state, train_step

console = Console()


def train(
    tx: optax.GradientTransformation, splits: Splits, epochs: int, seed: int, label: str
) -> tuple[TrainState, dict[str, Average]]:
    """Train; return the last state, an EMA over all steps, and SWA over the later epochs."""
    model = ResNet(splits.classes)
    state = init_state(model, tx, jax.random.PRNGKey(seed), splits.train.x[:2])
    step = train_step(loss_fn)
    averages = {"EMA": Average.start(state, 0.98), "SWA": Average.start(state, None)}
    for epoch in track(range(epochs), label, console=console):
        for batch in batches(splits.train, 64, seed=seed + epoch):
            state, _ = step(state, batch)
            averages["EMA"] = averages["EMA"].update(state)
        if epoch >= epochs // 2:
            averages["SWA"] = averages["SWA"].update(state)
    return state, averages


def main(
    epochs: Annotated[int, typer.Option(min=2, help="SWA averages the second half.")] = 12,
    lr: Annotated[
        float, typer.Option(min=0, help="The constant, high learning rate of Adam.")
    ] = 0.05,
    seed: int = 0,
) -> None:
    """Train at a high constant learning rate, average the weights, and evaluate the average."""
    splits = load(seed=seed)
    model, test = ResNet(splits.classes), eval_step(loss_fn)
    clean = list(batches(splits.train, 256))
    table = Table("weights", "statistics", "test accuracy", "test loss", title="Averaged weights")

    def row(weights: str, statistics: str, state: TrainState) -> None:
        result = evaluate(test, state, batches(splits.test, 256))
        numbers = (f"{result[name]:.3f}" for name in ("accuracy", "loss"))
        table.add_row(weights, statistics, *numbers)

    def recalibrated(state: TrainState) -> TrainState:
        return state.replace(**bnjax.recalibrate(model, state.variables, clean))

    state, averages = train(optax.adam(lr), splits, epochs, seed, "Adam")
    row("Adam, last step", "from training", state)
    row("Adam, last step", "recalibrated", recalibrated(state))
    for name, average in averages.items():
        params: Any = average.params
        row(f"Adam, {name}", "from training", state.replace(params=params))
        row(f"Adam, {name}", "recalibrated", average.recalibrated(model, state, clean))
    tx = optax.contrib.schedule_free_adamw(lr / 5, warmup_steps=20)
    state, _ = train(tx, splits, epochs, seed, "schedule-free")
    averaged = optax.contrib.schedule_free_eval_params(state.opt_state, state.params)
    state = state.replace(params=averaged)
    row("schedule-free", "from training", state)
    row("schedule-free", "recalibrated", recalibrated(state))
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
