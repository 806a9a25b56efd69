"""Batches of two: batch norm, batch renormalization and virtual batches on scanned digits.

The statistics of two or four images are noisy, and a network that has adapted to this noise finds
none in evaluation. `Renorm` trains with the statistics that evaluation uses. Virtual batches split
a batch of 64, which shows the effect of noisy statistics without noisier gradients.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import optax
import typer
from digits import Batch, Splits, batches, load, loss_fn
from flax import linen as nn
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table

import bnjax
from bnjax.policies import Debiased, Policy, Renorm

SIZES, LARGEST = (2, 4, 8), 64
EPOCHS, SEEDS, RATE = 6, 3, 1e-2
WAYS = ("batch norm", "batch norm, recalibrated", "renorm", "virtual batches")
State = tuple[Any, Any, Any]  # parameters, statistics, optimizer state
console = Console()


class Net(nn.Module):
    """Four convolutions with batch norm, and a linear classifier."""

    classes: int
    momentum: Debiased
    using: Policy | None = None
    virtual_batch_size: int | None = None
    widths: tuple[int, ...] = (16, 16, 32, 32)

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(N, H, W, C) to (N, classes)."""
        for number, width in enumerate(self.widths):
            stride = 2 if number == 2 else 1
            x = nn.Conv(width, (3, 3), (stride, stride), use_bias=False)(x)
            norm = bnjax.BatchNorm2d(
                momentum=self.momentum,
                using=self.using,
                virtual_batch_size=self.virtual_batch_size,
            )
            x = nn.relu(norm(x))
        return nn.Dense(self.classes)(x.mean((1, 2)))


def limits(steps: int) -> Renorm:
    """Batch norm for the first tenth of training, and limits of 3 and 5 from halfway on."""
    begin, ramp = steps // 10, max(1, steps * 4 // 10)
    return Renorm(
        optax.linear_schedule(1.0, 3.0, ramp, begin), optax.linear_schedule(0.0, 5.0, ramp, begin)
    )


def make(way: str, size: int, classes: int, steps: int) -> Net:
    """A network that trains in this way, with this many images sharing statistics.

    Its running statistics cover about the last 640 images, whatever the batch size.
    """
    if way == "virtual batches":
        return Net(classes, Debiased(0.1), virtual_batch_size=size)
    using = limits(steps) if way == "renorm" else None
    return Net(classes, Debiased(0.1 * size / LARGEST), using)


class Trainer:
    """One way and size, compiled once for all seeds, an epoch at a time."""

    def __init__(self, way: str, size: int, splits: Splits, epochs: int, lr: float) -> None:
        self.size = LARGEST if way == "virtual batches" else size
        steps = epochs * (len(splits.train) // self.size)
        self.splits, self.epochs = splits, epochs
        self.model = make(way, size, splits.classes, steps)
        # With Adam, the learning rate scales with the square root of the batch size.
        rate = lr * (self.size / LARGEST) ** 0.5
        self.tx = optax.adam(optax.cosine_decay_schedule(rate, steps))
        self.run = jax.jit(lambda state, epoch: jax.lax.scan(self.step, state, epoch)[0])

    def start(self, seed: int) -> State:
        """New variables and optimizer state."""
        new: Any = self.model.init(jax.random.PRNGKey(seed), self.splits.train.x[:2])
        return new["params"], new["batch_stats"], self.tx.init(new["params"])

    def step(self, state: State, batch: Batch) -> tuple[State, None]:
        """A training step; its forward pass updates the statistics."""
        params, batch_stats, opt_state = state

        def loss(params: Any) -> tuple[jax.Array, Any]:
            variables = {"params": params, "batch_stats": batch_stats}
            logits, updates = self.model.apply(variables, batch["x"], mutable=["batch_stats"])
            return loss_fn(logits, batch)[0].mean(), updates["batch_stats"]

        grads, batch_stats = jax.grad(loss, has_aux=True)(params)
        updates, opt_state = self.tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), batch_stats, opt_state), None

    def train(self, seed: int) -> Any:
        """The variables after all epochs."""
        state = self.start(seed)
        for epoch in range(self.epochs):
            shuffled = batches(self.splits.train, self.size, seed=1000 * seed + epoch)
            state = self.run(state, jax.tree.map(lambda *each: np.stack(each), *shuffled))
        return {"params": state[0], "batch_stats": state[1]}

    def evaluate(self, variables: Any) -> tuple[float, float]:
        """Accuracy and loss on the test digits, in evaluation mode."""
        test = self.splits.test
        logits: Any = self.model.apply(variables, test.x)
        loss, metrics = loss_fn(logits, {"x": test.x, "y": test.y})
        return float(metrics["accuracy"].mean()), float(loss.mean())

    def recalibrated(self, variables: Any) -> Any:
        """The same parameters with exact statistics of the training digits."""
        return bnjax.recalibrate(self.model, variables, list(batches(self.splits.train, 256)))


Results = dict[str, dict[str, list[tuple[float, float]]]]  # by way and size, one for each seed


def measure(
    splits: Splits,
    sizes: Sequence[int] = SIZES,
    epochs: int = EPOCHS,
    seeds: int = SEEDS,
    lr: float = RATE,
) -> Results:
    """Accuracy and loss in evaluation for each way, size and seed."""
    found: Results = {way: {str(size): [] for size in (*sizes, LARGEST)} for way in WAYS}
    pairs = [
        (way, size)
        for way in WAYS
        for size in (*sizes, LARGEST)
        if way != "batch norm, recalibrated" and (way, size) != ("virtual batches", LARGEST)
    ]
    for way, size in track(pairs, "training", console=console):
        trainer = Trainer(way, size, splits, epochs, lr)
        for seed in range(seeds):
            variables = trainer.train(seed)
            found[way][str(size)].append(trainer.evaluate(variables))
            if way == "batch norm":
                result = trainer.evaluate(trainer.recalibrated(variables))
                found["batch norm, recalibrated"][str(size)].append(result)
    # A single virtual batch of all images is batch norm.
    found["virtual batches"][str(LARGEST)] = found["batch norm"][str(LARGEST)]
    return found


def show(results: Results) -> None:
    """Print accuracies, with their spread over seeds, and losses."""
    table = Table("images", *WAYS, title="In evaluation: accuracy, loss")
    table.caption = "by the number of images that shared statistics in training; means over seeds"
    for size in results[WAYS[0]]:
        cells = []
        for way in WAYS:
            accuracy, loss = np.mean(results[way][size], 0)
            spread = np.std(results[way][size], 0)[0]
            cells.append(f"{accuracy:.3f} ± {spread:.3f}, {loss:.3f}")
        table.add_row(size, *cells)
    console.print(table)


def draw(results: Results, path: Path) -> None:
    """Plot errors and losses over the number of images that share statistics."""
    figure = Figure(figsize=(10, 4.2), dpi=120, layout="constrained")
    axes = figure.subplots(1, 2)
    sizes = [int(size) for size in results[WAYS[0]]]
    styles = dict(zip(WAYS, ("C3o-", "C1s--", "C0D-", "C7^:"), strict=True))
    for way in WAYS:
        values = np.array(list(results[way].values()))  # (sizes, seeds, 2)
        for axis, shown in zip(axes, (100 * (1 - values[..., 0]), values[..., 1]), strict=True):
            low, high, color = shown.min(1), shown.max(1), styles[way][:2]
            axis.plot(sizes, shown.mean(1), styles[way], label=way, markersize=5)
            axis.fill_between(sizes, low, high, color=color, alpha=0.12, linewidth=0)
    axes[0].set(title="Test error", ylabel="percent (bands: all seeds)")
    axes[1].set(title="Test loss", ylabel="cross entropy")
    for axis in axes:
        axis.set_ylim(bottom=0)
        axis.set_xscale("log", base=2)
        axis.set_xticks(sizes, map(str, sizes))
        axis.set_xlabel("images that shared statistics in training")
    axes[0].legend(title="trained with")
    figure.savefig(path)


def main(
    out: Annotated[Path, typer.Option(help="The folder for the picture.")] = Path("runs/small"),
    epochs: Annotated[int, typer.Option(min=1, help="Epochs of each run.")] = EPOCHS,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each kind.")] = SEEDS,
    lr: Annotated[
        float, typer.Option(min=0, help="Learning rate of Adam for batches of 64.")
    ] = RATE,
    size: Annotated[
        list[int] | None,
        typer.Option(min=2, help="A batch size to try, in addition to 64. Repeatable."),
    ] = None,
) -> None:
    """Train on batches of 2, 4, 8 and 64 digits in several ways, and evaluate."""
    results = measure(load(), size or SIZES, epochs, seeds, lr)
    show(results)
    out.mkdir(parents=True, exist_ok=True)
    draw(results, out / "small_batches.png")
    console.print(f"picture: {out / 'small_batches.png'}", soft_wrap=True)


if __name__ == "__main__":
    typer.run(main)
