"""Two domains in every batch: one batch norm for both, or banks with one set of statistics each.

Clean digits are one domain, inverted and noisy ones the other. With `banks`, each example is
normalized with the statistics of its own domain, given by the entry `bank` of the batch, while the
weights learn from both. The model's code needs no extra argument. A third variant also has a scale
and bias for each domain.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import optax
import typer
from digits import Batch, Data, Splits, batches, load, loss_fn
from flax import linen as nn
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table

import bnjax
from bnjax.training import TrainState, eval_step, evaluate, init_state, train_step

DOMAINS = ("digits", "inverted")
NOISE = 1.0
KINDS: dict[str, dict[str, Any]] = {
    "one batch norm": {},
    "banks": {"banks": DOMAINS},
    "banks, own scale and bias": {"banks": DOMAINS, "affine": "own"},
}
console = Console()


class Net(nn.Module):
    """A small convolutional network; `norm` holds the settings of its batch norms."""

    classes: int
    norm: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(N, H, W, C) to logits (N, classes)."""
        for width, strides in ((16, 1), (32, 2), (32, 2)):
            x = nn.Conv(width, (3, 3), strides, use_bias=False)(x)
            x = nn.relu(bnjax.BatchNorm2d(**self.norm)(x))
        return nn.Dense(self.classes)(x.mean((1, 2)))


def in_domain(batch: Batch, bank: np.ndarray, rng: np.random.Generator) -> Batch:
    """The batch with its bank numbers, and with inverted and noisy images in bank 1."""
    x = batch["x"]
    other = 1 - x + rng.normal(0, NOISE, x.shape).astype(np.float32)
    return batch | {"x": np.where(bank.reshape(-1, 1, 1, 1), other, x), "bank": bank}


def mixed(source: Iterator[Batch], seed: int) -> Iterator[Batch]:
    """Batches with about equally many examples from both domains."""
    rng = np.random.default_rng(seed)
    for batch in source:
        bank = rng.integers(0, 2, len(batch["x"])).astype(np.int32)
        yield in_domain(batch, bank, rng)


def train(splits: Splits, norm: dict[str, Any], epochs: int, seed: int, label: str) -> TrainState:
    """Train on mixed batches."""
    steps = epochs * (len(splits.train) // 64)
    tx = optax.adam(optax.cosine_decay_schedule(5e-3, steps))
    net = Net(splits.classes, norm)
    state = init_state(net, tx, jax.random.PRNGKey(seed), splits.train.x[:2])
    step = train_step(loss_fn)
    for epoch in track(range(epochs), label, console=console):
        for batch in mixed(batches(splits.train, 64, seed=seed + epoch), seed + epoch):
            state, _ = step(state, batch)
    return state


def accuracy(state: TrainState, data: Data, domain: int, bank: int) -> float:
    """The accuracy on images of one domain, normalized with the statistics of a bank."""
    rng = np.random.default_rng(7)
    made = []
    for batch in batches(data, 256):
        number = np.full(len(batch["x"]), domain, np.int32)
        made.append(in_domain(batch, number, rng) | {"bank": np.full_like(number, bank)})
    return evaluate(eval_step(loss_fn), state, made)["accuracy"]


def main(
    out: Annotated[Path, typer.Option(help="The run's folder.")] = Path("runs/domains"),
    epochs: Annotated[int, typer.Option(min=1, help="Epochs of each run.")] = 12,
    seeds: Annotated[int, typer.Option(min=1, help="Runs to average over.")] = 3,
) -> None:
    """Train on two domains in three ways, and compare accuracy and statistics."""
    table = Table(title="Test accuracy by domain", caption=f"mean over {seeds} runs")
    table.add_column("normalized with")
    for name in DOMAINS:
        table.add_column(name, justify="right")
    states: dict[str, TrainState] = {}
    for kind, norm in KINDS.items():
        rows = {kind: (0, 1)} | ({f"{kind}, wrong domain": (1, 0)} if norm else {})
        found = {row: np.zeros(2) for row in rows}
        for seed in range(seeds):
            splits = load(seed=seed)
            label = f"{kind}, run {seed + 1} of {seeds}"
            states[kind] = state = train(splits, norm, epochs, seed, label)
            for row, used in rows.items():
                found[row] += [accuracy(state, splits.test, n, used[n]) for n in (0, 1)]
        for row, total in found.items():
            table.add_row(row, *(f"{value:.3f}" for value in total / seeds))
    console.print(table)
    out.mkdir(parents=True, exist_ok=True)
    draw(statistics(states), out / "domains.png")
    console.print(f"picture: {out / 'domains.png'}", soft_wrap=True)


def statistics(states: dict[str, TrainState]) -> dict[str, Any]:
    """Mean and variance of each channel of the first layer, with a row for each bank."""
    layers = {kind: state.batch_stats["BatchNorm2d_0"] for kind, state in states.items()}
    return {
        kind: {name: np.atleast_2d(stats[name]).tolist() for name in ("mean", "var")}
        for kind, stats in layers.items()
    }


def draw(found: dict[str, Any], path: Path) -> None:
    """Plot mean and deviation of each channel of the first layer, with and without banks."""
    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axes = figure.subplots(2, 1, sharex=True, sharey=True)
    pairs = (("one batch norm", ("both domains",)), ("banks", DOMAINS))
    for axis, (kind, names) in zip(axes, pairs, strict=True):
        colors = ["0.45"] if len(names) == 1 else ["C0", "C1"]
        for number, (name, color) in enumerate(zip(names, colors, strict=True)):
            mean, var = (np.array(found[kind][key][number]) for key in ("mean", "var"))
            place = np.arange(len(mean)) + 0.24 * (number - (len(names) - 1) / 2)
            look = {"fmt": "o", "ms": 4, "lw": 2, "color": color}
            axis.errorbar(place, mean, np.sqrt(var), label=name, **look)
        axis.axhline(0, color="0.85", lw=1, zorder=0)
        axis.set(title=kind, ylabel="mean ± deviation")
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, ncols=2, loc="lower right", bbox_to_anchor=(1, 0.95))
    axes[1].set_xlabel("channel of the first batch norm")
    figure.savefig(path)


if __name__ == "__main__":
    typer.run(main)
