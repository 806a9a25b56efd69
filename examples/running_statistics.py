"""Show what running statistics do, on the network from train_digits.py.

If RUN holds no finished run, train a short one first.
"""

from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import typer
from digits import ResNet, Splits, batches, load, loss_fn
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from runs import restore, start
from train_digits import train

from bnjax.training import TrainState, eval_step, evaluate, train_step

SIZES = (1, 2, 8, 32, 128)
MOMENTUM = 0.1
console = Console()


def trained(run_folder: Path, splits: Splits, epochs: int, seed: int) -> TrainState:
    """The state of a finished run, or of a short one trained on the spot."""
    folder = (run_folder / "checkpoints").resolve()
    fresh = start(splits, 3e-3, epochs, 64, seed)
    with ocp.CheckpointManager(
        folder, options=ocp.CheckpointManagerOptions(create=True)
    ) as manager:
        if manager.latest_step() is None:
            console.print(f"{run_folder} holds no run: training for {epochs} epochs first.")
            train(fresh, manager, splits, epochs, 64, seed)
            return fresh.state
        return restore(manager, fresh).state


def distance(a: Any, b: Any) -> float:
    """The largest difference between two trees."""
    return max(
        float(jnp.abs(x - y).max()) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True)
    )


def when_they_change(state: TrainState, splits: Splits) -> Table:
    """How much statistics and parameters change in an evaluation, a forward pass, and a step."""
    # At the end of training the learning rate is 0, so use a new optimizer.
    tx = optax.adam(1e-3)
    state = state.replace(tx=tx, opt_state=tx.init(state.params))
    batch = {"x": splits.train.x[:64], "y": splits.train.y[:64]}
    table = Table(
        "call",
        "statistics change by",
        "parameters change by",
        title="When running statistics change",
    )

    def row(what: str, batch_stats: Any, params: Any) -> None:
        moves = distance(batch_stats, state.batch_stats), distance(params, state.params)
        table.add_row(what, *(f"{move:.2e}" if move else "exactly 0" for move in moves))

    state.apply_fn(state.variables, batch["x"])
    row("model.apply(...)", state.batch_stats, state.params)
    _, updates = state.apply_fn(state.variables, batch["x"], mutable=["batch_stats"])
    row("model.apply(..., mutable=['batch_stats'])", updates["batch_stats"], state.params)
    optimized = state.apply_gradients(grads=jax.tree.map(jnp.ones_like, state.params))
    row("only the optimizer's update", optimized.batch_stats, optimized.params)
    after, _ = train_step(loss_fn, donate=False)(state, batch)
    row("a training step", after.batch_stats, after.params)
    return table


def among_batch_mates(state: TrainState, splits: Splits, draws: int = 50) -> list[dict[str, float]]:
    """How the output for one image varies with its batch mates, by batch size and tracking."""
    tracked = jax.jit(ResNet(splits.classes).apply)
    forward = jax.jit(lambda v, x: state.apply_fn(v, x, mutable=["batch_stats"])[1]["batch_stats"])
    test = eval_step(loss_fn)
    alone = state.replace(
        apply_fn=ResNet(splits.classes, track_running_stats=False).apply, batch_stats={}
    )
    untracked = jax.jit(alone.apply_fn)
    rng = np.random.default_rng(0)
    rows = []
    for size in SIZES:
        with_stats, without, gaps = [], [], []
        for _ in range(draws):
            mates = rng.choice(len(splits.test), size - 1, replace=False)
            index = np.concatenate([[0], mates])
            x = splits.test.x[index]
            with_stats.append(np.asarray(tracked(state.variables, x))[0])
            without.append(np.asarray(untracked(alone.variables, x))[0])
            gaps.append(_gap(state.batch_stats, forward(state.variables, x)))
        rows.append(
            {
                "size": size,
                "gap": float(np.mean(gaps)),
                "untracked": float(np.std(without, 0).mean()),
                "tracked": float(np.ptp(with_stats, 0).max()),
                "accuracy": evaluate(test, alone, batches(splits.test, size))["accuracy"],
            }
        )
    return rows


def _gap(running: Any, moved: Any) -> float:
    """Mean distance of the batch means from the running ones, in running standard deviations."""
    gaps = []

    def visit(old: dict[str, Any], new: dict[str, Any]) -> None:
        if "mean" in old:
            # moved - old = momentum * (batch - old)
            away = jnp.abs(new["mean"] - old["mean"]) / MOMENTUM
            gaps.append(float((away / jnp.sqrt(old["var"] + 1e-5)).mean()))
        else:
            for name in old:
                visit(old[name], new[name])

    visit(running, moved)
    return float(np.mean(gaps))


def draw(rows: list[dict[str, float]], path: Path) -> None:
    """Plot both results over the batch size."""
    figure = Figure(figsize=(10, 3.6), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2)
    sizes = [row["size"] for row in rows]
    left.plot(sizes, [row["gap"] for row in rows], "o-")
    left.set(title="Distance of batch means from running means", ylabel="standard deviations")
    right.plot(sizes, [row["untracked"] for row in rows], "o-", label="untracked: varies")
    right.plot(sizes, [row["tracked"] for row in rows], "s-", label="tracked: constant")
    right.set(title="Variation of one image's logits", ylabel="standard deviation of the logits")
    right.legend()
    for axis in (left, right):
        axis.set_xscale("log", base=2)
        axis.set_xticks(sizes, map(str, sizes))
        axis.set_xlabel("batch size")
        axis.set_ylim(bottom=0 if axis is left else None)
    figure.savefig(path)


def main(
    run: Annotated[Path, typer.Option(help="The folder of a run of train_digits.py.")] = Path(
        "runs/digits"
    ),
    epochs: Annotated[
        int, typer.Option(min=1, help="Epochs of the run, if one must be trained.")
    ] = 15,
    seed: Annotated[int, typer.Option(help="The seed of that run.")] = 0,
) -> None:
    """Show when running statistics change, and what they are for."""
    splits = load(seed=seed)
    state = trained(run, splits, epochs, seed)
    console.print(when_they_change(state, splits))
    rows = among_batch_mates(state, splits)
    accuracy = evaluate(eval_step(loss_fn), state, batches(splits.test, 128))["accuracy"]
    table = Table(
        title="One image in evaluation, with 50 random sets of batch mates",
        caption=f"accuracy, tracked: {accuracy:.3f} at every batch size",
    )
    for heading in (
        "batch size",
        "batch means off by",
        "logits vary, untracked",
        "accuracy, untracked",
        "logits vary, tracked",
    ):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            str(row["size"]),
            f"{row['gap']:.3f} std",
            f"{row['untracked']:.3f}",
            f"{row['accuracy']:.3f}",
            f"{row['tracked']:.1e}" if row["tracked"] else "exactly 0",
        )
    console.print(table)
    picture = run / "running_statistics.png"
    draw(rows, picture)
    console.print(f"picture: {picture}", soft_wrap=True)


if __name__ == "__main__":
    typer.run(main)
