"""Train a small residual CNN with batch norm on scanned digits, and check what it learned.

Checkpoints are written after each epoch. After a kill at any moment, the same command with
--resume goes on from the last one, to the same final numbers as an uninterrupted run.
"""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
import typer
from digits import ResNet, Splits, batches, load, loss_fn
from jax.sharding import Mesh
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from bnjax import decay_mask
from bnjax.plotting import plot_curves, plot_statistics
from bnjax.training import TrainState, eval_step, evaluate, history, init_state, train_step

SAVED = ("step", "params", "opt_state", "batch_stats", "rng", "rejected")
SHOWN = ("BatchNorm2d_0", "Block_2/BatchNorm2d_2")  # the first and the last batch norm
console = Console()


@dataclasses.dataclass
class Run:
    """All that a run has to remember: the state of the training, and its records."""

    state: TrainState
    epochs: list[dict[str, float]]
    statistics: dict[str, Any]


def start(splits: Splits, lr: float, epochs: int, batch_size: int, seed: int) -> Run:
    """A new run, with AdamW on a warmed-up cosine schedule."""
    steps = epochs * (len(splits.train) // batch_size)
    schedule = optax.warmup_cosine_decay_schedule(0.0, lr, steps // 10, steps)
    tx = optax.adamw(schedule, weight_decay=0.02, mask=decay_mask)
    model = ResNet(splits.classes)
    state = init_state(model, tx, jax.random.PRNGKey(seed), splits.train.x[:2])
    return Run(state, [], {})


def save(manager: ocp.CheckpointManager, run: Run) -> None:
    """Write a checkpoint; it appears under its final name only when it is whole."""
    tree = {name: getattr(run.state, name) for name in SAVED}
    records = {"epochs": run.epochs, "statistics": run.statistics, "weights": weights(run)}
    items = ocp.args.Composite(
        state=ocp.args.StandardSave(tree), records=ocp.args.JsonSave(records)
    )
    manager.save(len(run.epochs), args=items)


def restore(manager: ocp.CheckpointManager, run: Run) -> Run:
    """The run as the last whole checkpoint has it; `run` gives the shapes."""
    step, tree = manager.latest_step(), {name: getattr(run.state, name) for name in SAVED}
    found = manager.restore(step, args=ocp.args.Composite(records=ocp.args.JsonRestore()))
    records = dict(found["records"])
    if records.pop("weights") != weights(run):
        message = f"{manager.directory} is of another network: other data have other classes"
        raise typer.BadParameter(message, param_hint="--out")
    wanted = ocp.args.Composite(state=ocp.args.StandardRestore(tree))
    return Run(run.state.replace(**manager.restore(step, args=wanted)["state"]), **records)


def weights(run: Run) -> int:
    """How many the network has."""
    return sum(leaf.size for leaf in jax.tree.leaves(run.state.params))


def train(
    run: Run,
    manager: ocp.CheckpointManager,
    splits: Splits,
    epochs: int,
    batch_size: int,
    seed: int,
    mesh: Mesh | None = None,
) -> Run:
    """The epochs that are left, each with a checkpoint at its end."""
    step, test = train_step(loss_fn, mesh=mesh), eval_step(loss_fn, mesh=mesh)
    step = history(step, run.statistics, paths=SHOWN, channels=1)
    part = jax.process_index(), jax.process_count()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=part[0] > 0) as progress:
        bar = progress.add_task("training", total=epochs, completed=len(run.epochs))
        for epoch in range(len(run.epochs), epochs):
            measured = []
            for batch in batches(splits.train, batch_size, seed * 100_003 + epoch, part):
                run.state, metrics = step(run.state, batch)
                measured.append(metrics)
            means = jax.tree.map(lambda *values: float(np.mean(values)), *measured)
            validation = evaluate(test, run.state, batches(splits.validation, 256, part=part))
            names = ("loss", "accuracy")
            run.epochs.append(
                {f"train_{name}": means[name] for name in names}
                | {f"validation_{name}": validation[name] for name in names}
            )
            save(manager, run)
            text = f"loss {means['loss']:.4f}  validation accuracy {validation['accuracy']:.4f}"
            progress.update(bar, advance=1, description=text)
    manager.wait_until_finished()
    return run


def check_restored(run: Run, restored: Run, splits: Splits) -> list[tuple[str, bool]]:
    """What a user may expect of a reloaded model, each with whether it holds."""
    forward = jax.jit(run.state.apply_fn)

    def logits(state: TrainState, x: np.ndarray, size: int) -> np.ndarray:
        parts = [forward(state.variables, x[i : i + size]) for i in range(0, len(x), size)]
        return np.concatenate(jax.device_get(parts))

    x = splits.test.x
    ours, theirs = logits(run.state, x, 128), logits(restored.state, x, 128)
    order = np.random.default_rng(0).permutation(len(x))
    digits = ours.argmax(-1)
    same = [np.array_equal(logits(restored.state, x, n).argmax(-1), digits) for n in (1, 7, len(x))]
    shuffled = logits(restored.state, x[order], 128).argmax(-1)
    return [
        ("restored checkpoint: bit-identical logits for the same batches", (ours == theirs).all()),
        (f"same predictions at batch sizes 1, 7, 128 and {len(x)}", all(same)),
        ("same predictions in another order", np.array_equal(shuffled, digits[order])),
    ]


def main(
    data: Annotated[
        Path | None, typer.Option(help="Your own .npz with `images` and `labels`.")
    ] = None,
    out: Annotated[Path, typer.Option(help="The run's folder.")] = Path("runs/digits"),
    epochs: Annotated[int, typer.Option(min=1)] = 40,
    batch_size: Annotated[int, typer.Option(min=2)] = 64,
    lr: Annotated[float, typer.Option(min=0, help="The highest learning rate.")] = 3e-3,
    seed: Annotated[int, typer.Option(help="Of the split, the weights and the order.")] = 0,
    resume: Annotated[bool, typer.Option(help="Go on from the last checkpoint in OUT.")] = False,
) -> None:
    """Train a small residual CNN with batch norm on scanned digits (or your own images)."""
    try:
        splits = load(data, seed)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--data") from error
    if len(splits.train) < batch_size:
        message = f"the training split has {len(splits.train)} images, fewer than one batch"
        raise typer.BadParameter(message, param_hint="--batch-size")
    out = out.resolve()
    if out.exists() and not out.is_dir():
        raise typer.BadParameter(f"{out} is a file, not a folder", param_hint="--out")
    options = ocp.CheckpointManagerOptions(max_to_keep=2, create=True)
    with ocp.CheckpointManager(out / "checkpoints", options=options) as manager:
        run = start(splits, lr, epochs, batch_size, seed)
        if manager.latest_step() is not None:
            if not resume:
                message = f"{out} holds a run already: add --resume, or choose another folder"
                raise typer.BadParameter(message, param_hint="--out")
            run = restore(manager, run)
            console.print(f"Resumed after epoch {len(run.epochs)} of {epochs}.")
        elif resume:
            console.print(f"There is no checkpoint in {out} yet: a new run.", soft_wrap=True)
        run = train(run, manager, splits, epochs, batch_size, seed)
        restored = restore(manager, start(splits, lr, epochs, batch_size, seed))
    result = evaluate(eval_step(loss_fn), restored.state, batches(splits.test, 256))
    console.print(
        f"test accuracy {result['accuracy']:.4f} in eval mode, loss {result['loss']:.6f} "
        f"({len(splits.test)} images, {int(run.state.rejected)} steps rejected)"
    )
    checks = check_restored(run, restored, splits)
    for text, holds in checks:
        console.print(f"[green]yes[/]  {text}" if holds else f"[red]NO[/]   {text}")
    plot_curves(run.epochs, out / "curves.png")
    plot_statistics(run.statistics["layers"], out / "statistics.png")
    console.print(f"pictures and checkpoints: {out}", soft_wrap=True)
    if not all(holds for _, holds in checks):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
