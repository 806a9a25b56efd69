"""Train model_B through a pre-trained, frozen model_A.

model_A reads digits. model_B learns to clean noisy images so that model_A can read them: its loss
goes through model_A, which must not change. Without `bnjax.freeze` it does: even if the optimizer
skips its parameters, the forward pass still updates its running statistics.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import optax
import typer
from digits import Batch, Data, ResNet, Splits, batches, load, loss_fn
from flax import linen as nn
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table

import bnjax
from bnjax.training import TrainState, eval_step, evaluate, init_state, train_step

NOISE = 1.0
A = "model_a/**"
console = Console()


class Cleaner(nn.Module):
    """model_B: image in, cleaner image out."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(N, H, W, C) to (N, H, W, C)."""
        h = x
        for _ in range(3):
            h = nn.relu(bnjax.BatchNorm2d()(nn.Conv(32, (3, 3), use_bias=False)(h)))
        return nn.Conv(x.shape[-1], (3, 3))(h)


class Joint(nn.Module):
    """model_A applied to the outputs of model_B."""

    classes: int

    def setup(self) -> None:
        """Create both models, with names that the patterns match."""
        self.model_a = ResNet(self.classes)
        self.model_b = Cleaner()

    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits (N, classes)."""
        return self.model_a(self.model_b(x))


def noisy(source: Iterator[Batch], seed: int) -> Iterator[Batch]:
    """Add noise to the images of all batches."""
    rng = np.random.default_rng(seed)
    for batch in source:
        noise = rng.normal(0, NOISE, batch["x"].shape).astype(np.float32)
        yield batch | {"x": batch["x"] + noise}


def pretrain(splits: Splits, epochs: int, seed: int) -> TrainState:
    """Train model_A on clean digits."""
    steps = epochs * (len(splits.train) // 64)
    tx = optax.adamw(optax.cosine_decay_schedule(3e-3, steps), mask=bnjax.decay_mask)
    state = init_state(ResNet(splits.classes), tx, jax.random.PRNGKey(seed), splits.train.x[:2])
    step = train_step(loss_fn)
    for epoch in track(range(epochs), "pre-training model_A", console=console):
        for batch in batches(splits.train, 64, seed=seed + epoch):
            state, _ = step(state, batch)
    return state


def joint_state(splits: Splits, a: TrainState, parameters_frozen: bool, seed: int) -> TrainState:
    """The joint model with the trained model_A, and an optimizer that may skip its parameters."""
    model = Joint(splits.classes)
    state = init_state(model, optax.identity(), jax.random.PRNGKey(seed), splits.train.x[:2])
    params = {**state.params, "model_a": a.params}
    stats = {**state.batch_stats, "model_a": a.batch_stats}
    tx = optax.adam(3e-3)
    if parameters_frozen:
        labels = bnjax.trainable_labels(params, frozen=A)
        tx = optax.multi_transform({"trainable": tx, "frozen": optax.set_to_zero()}, labels)
    return state.replace(params=params, batch_stats=stats, tx=tx, opt_state=tx.init(params))


def accuracy(state: TrainState, data: Data) -> float:
    """The accuracy in evaluation mode."""
    return evaluate(eval_step(loss_fn), state, batches(data, 256))["accuracy"]


def inner_a(joint: TrainState, a: TrainState) -> TrainState:
    """model_A with its current arrays in the joint model."""
    params, stats = joint.params["model_a"], joint.batch_stats["model_a"]
    return a.replace(params=params, batch_stats=stats)


def train_b(
    splits: Splits, a: TrainState, what: str, epochs: int, seed: int
) -> tuple[TrainState, list[float]]:
    """Train model_B, and track the accuracy of model_A on clean digits after each epoch."""
    state = joint_state(splits, a, what != "nothing", seed)
    step = train_step(loss_fn)
    history = [accuracy(inner_a(state, a), splits.test)]
    # The step donates its state, which includes the arrays of model_A.
    state = jax.tree.map(lambda x: x.copy() if isinstance(x, jax.Array) else x, state)
    for epoch in track(range(epochs), f"training model_B, frozen: {what}", console=console):
        with bnjax.freeze(A) if what == "everything" else nullcontext():
            for batch in noisy(batches(splits.train, 64, seed=seed + epoch), seed + epoch):
                state, _ = step(state, batch)
        history.append(accuracy(inner_a(state, a), splits.test))
    return state, history


def moved(a: Any, b: Any) -> str:
    """The largest difference between two trees."""
    gaps = jax.tree.map(lambda x, y: float(abs(x - y).max()), a, b)
    largest = max(jax.tree.leaves(gaps))
    return f"{largest:.2f}" if largest else "exactly 0"


def check_unchanged(joint: TrainState, a: TrainState, x: np.ndarray) -> None:
    """Check that model_A is unchanged, bit for bit: parameters, statistics and outputs."""
    now = inner_a(joint, a)
    assert moved(now.params, a.params) == "exactly 0", "model_A's parameters changed"
    assert moved(now.batch_stats, a.batch_stats) == "exactly 0", "model_A's statistics changed"
    before, after = (np.asarray(a.apply_fn(state.variables, x)) for state in (a, now))
    assert (before == after).all(), "model_A's outputs changed"
    console.print("model_A's parameters, statistics and outputs: unchanged, bit for bit")


def main(
    out: Annotated[Path, typer.Option(help="The run's folder.")] = Path("runs/joint"),
    epochs: Annotated[int, typer.Option(min=1, help="Epochs of each run.")] = 15,
    seed: int = 0,
) -> None:
    """Train model_B through a frozen model_A, and see what happens to model_A without freezing."""
    splits = load(seed=seed)
    a = pretrain(splits, epochs, seed)
    before = accuracy(a, splits.test)
    degraded = Data(next(noisy(batches(splits.test, len(splits.test)), 7))["x"], splits.test.y)
    table = Table(title="model_A after training model_B")
    table.caption = (
        "accuracy on clean digits before and after, and on noisy ones cleaned by model_B"
    )
    for column in ("frozen", "parameters change by", "statistics change by"):
        table.add_column(column)
    for column in ("before", "after", "cleaned"):
        table.add_column(column, justify="right")
    histories = {}
    for what in ("everything", "parameters only", "nothing"):
        state, histories[what] = train_b(splits, a, what, epochs, seed)
        if what == "everything":
            check_unchanged(state, a, splits.test.x)
        after, through = histories[what][-1], accuracy(state, degraded)
        gaps = [
            moved(getattr(inner_a(state, a), n), getattr(a, n)) for n in ("params", "batch_stats")
        ]
        table.add_row(what, *gaps, f"{before:.3f}", f"{after:.3f}", f"{through:.3f}")
    console.print(table)
    console.print(f"accuracy on noisy digits without model_B: {accuracy(a, degraded):.3f}")
    out.mkdir(parents=True, exist_ok=True)
    draw(histories, out / "joint_training.png")
    console.print(f"picture: {out / 'joint_training.png'}", soft_wrap=True)


def draw(histories: dict[str, list[float]], path: Path) -> None:
    """Plot model_A's accuracy on clean digits while model_B trains."""
    figure = Figure(figsize=(8, 3.6), dpi=120, layout="constrained")
    axis = figure.subplots()
    for what, values in histories.items():
        axis.plot(values, "o-", markersize=3, label=f"model_A frozen: {what}")
    axis.set(xlabel="epoch of training model_B", ylabel="accuracy of model_A\non clean digits")
    axis.set_ylim(0, 1.03)
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=len(histories), frameon=False)
    figure.savefig(path)


if __name__ == "__main__":
    typer.run(main)
