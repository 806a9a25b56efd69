"""Train a small residual CNN with batch norm on scanned digits, and check what it learned.

A checkpoint is written after each epoch. If the run is killed at any moment, the same command with
--resume continues from the last one, to the same final numbers as an uninterrupted run.
"""

import sys
from pathlib import Path
from typing import Annotated

import jax
import numpy as np
import orbax.checkpoint as ocp
import typer
from digits import Splits, batches, load
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from runs import Library, Run, folder_of, restore, save, start

from bnjax.plotting import plot_curves, plot_statistics

console = Console()


def train(
    run: Run,
    manager: ocp.CheckpointManager,
    splits: Splits,
    epochs: int,
    batch_size: int,
    seed: int,
) -> None:
    """Train for the remaining epochs, and save a checkpoint after each."""
    part = jax.process_index(), jax.process_count()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    hidden = part[0] > 0 or not console.is_terminal  # each epoch prints a line instead
    with Progress(*columns, console=console, disable=hidden) as progress:
        bar = progress.add_task("training", total=epochs, completed=len(run.epochs))
        for epoch in range(len(run.epochs), epochs):
            measured = []
            for batch in batches(splits.train, batch_size, seed * 100_003 + epoch, part):
                measured.append(run.step(batch))
            means = jax.tree.map(lambda *values: float(np.mean(values)), *measured)
            validation = run.evaluate(batches(splits.validation, 256, part=part))
            names = ("loss", "accuracy")
            run.epochs.append(
                {f"train_{name}": means[name] for name in names}
                | {f"validation_{name}": validation[name] for name in names}
            )
            save(manager, run)
            text = f"loss {means['loss']:.4f}  validation accuracy {validation['accuracy']:.4f}"
            progress.update(bar, advance=1, description=text)
            if not console.is_terminal and part[0] == 0:  # there is no bar
                console.print(f"epoch {epoch + 1}/{epochs}  {text}", highlight=False)
                sys.stdout.flush()
    manager.wait_until_finished()


def check_restored(run: Run, restored: Run, splits: Splits) -> list[tuple[str, bool]]:
    """What users expect of a reloaded model, and whether it holds."""

    def logits(run: Run, x: np.ndarray, size: int) -> np.ndarray:
        parts = [run.logits(x[i : i + size]) for i in range(0, len(x), size)]
        return np.concatenate(jax.device_get(parts))

    x = splits.test.x
    ours, theirs = logits(run, x, 128), logits(restored, x, 128)
    order = np.random.default_rng(0).permutation(len(x))
    digits = ours.argmax(-1)
    same = [np.array_equal(logits(restored, x, n).argmax(-1), digits) for n in (1, 7, len(x))]
    shuffled = logits(restored, x[order], 128).argmax(-1)
    return [
        ("restored checkpoint: bit-identical logits for the same batches", (ours == theirs).all()),
        (f"same predictions at batch sizes 1, 7, 128 and {len(x)}", all(same)),
        ("same predictions in another order", np.array_equal(shuffled, digits[order])),
    ]


def next_command(run: Run, out: Path) -> str:
    """A command to try next: diagnose the batch norms of the network."""

    def shown(path: Path) -> Path:
        return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path

    folder = shown(Path(__file__).resolve().parent)
    python = shown(Path(sys.executable))
    model = "ResNet" if run.library == "linen" else "NnxResNet"
    return (
        f"PYTHONPATH={folder} {python} -m bnjax diagnose digits:{model} "
        f"--variables {shown(out / 'checkpoints')} --data {shown(out / 'inputs.npy')}"
    )


def report(run: Run, splits: Splits, out: Path, is_default: bool) -> None:
    """Plot the run, and print where everything is and what to try next."""
    plot_curves(run.epochs, out / "curves.png")
    plot_statistics(run.statistics["layers"], out / "statistics.png")
    console.print(f"pictures and checkpoints: {out}", soft_wrap=True)
    if is_default:  # other images may need another network than `digits:ResNet()`
        np.save(out / "inputs.npy", splits.train.x)
        console.print(f"next: {next_command(run, out)}", soft_wrap=True, highlight=False)


def main(
    data: Annotated[
        Path | None, typer.Option(help="Your own .npz with `images` and `labels`.")
    ] = None,
    out: Annotated[
        Path, typer.Option(help="The run's folder; OUT-2 and so on if OUT already holds a run.")
    ] = Path("runs/digits"),
    library: Annotated[Library, typer.Option(help="Flax's linen or nnx.")] = "linen",
    epochs: Annotated[int, typer.Option(min=1)] = 40,
    batch_size: Annotated[int, typer.Option(min=2)] = 64,
    lr: Annotated[float, typer.Option(min=0, help="The peak learning rate.")] = 3e-3,
    seed: Annotated[int, typer.Option(help="Seed for splits, weights and data order.")] = 0,
    resume: Annotated[
        bool, typer.Option(help="Continue from the last checkpoint of the last run.")
    ] = False,
) -> None:
    """Train a small residual CNN with batch norm on scanned digits (or your own images)."""
    try:
        splits = load(data, seed)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--data") from error
    if len(splits.train) < batch_size:
        message = f"the training split has {len(splits.train)} images, fewer than one batch"
        raise typer.BadParameter(message, param_hint="--batch-size")
    out = folder_of(out.resolve(), resume)
    if out.exists() and not out.is_dir():
        raise typer.BadParameter(f"{out} is a file, not a folder", param_hint="--out")
    new = lambda: start(splits, lr, epochs, batch_size, seed, library)  # noqa: E731 - twice
    options = ocp.CheckpointManagerOptions(max_to_keep=2, create=True)
    with ocp.CheckpointManager(out / "checkpoints", options=options) as manager:
        run = new()
        if manager.latest_step() is not None:
            run = restore(manager, run)
            console.print(f"Resumed after epoch {len(run.epochs)} of {epochs}.")
        elif resume:
            console.print(f"No checkpoint in {out} yet: starting a new run.", soft_wrap=True)
        train(run, manager, splits, epochs, batch_size, seed)
        restored = restore(manager, new())
    result = restored.evaluate(batches(splits.test, 256))
    console.print(
        f"test accuracy {result['accuracy']:.4f} in eval mode, loss {result['loss']:.6f} "
        f"({len(splits.test)} images, {run.rejected} steps rejected)"
    )
    checks = check_restored(run, restored, splits)
    for text, holds in checks:
        console.print(f"[green]yes[/]  {text}" if holds else f"[red]NO[/]   {text}")
    report(run, splits, out, data is None)
    if not all(holds for _, holds in checks):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
