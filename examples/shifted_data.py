"""Test data that differ from the training data: which statistics should normalize them?

A network trained on clean digits has to read noisy, blurred, pale and inverted ones. Its running
statistics come from clean digits (source). Statistics of the test batch fit better if it is large
enough (prediction-time); a blend with the running ones also works for small batches; `recalibrate`
measures a set of such digits once; and TENT also adapts scales and biases, without labels.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import typer
from digits import Data, ResNet, Splits, batches, load, loss_fn
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table
from scipy.ndimage import gaussian_filter

import bnjax
from bnjax.policies import Batch, Blend
from bnjax.training import init_state, train_step

PRIOR = 16
SIZES = (1, 2, 4, 8, 32, 128)
EPOCHS, SEEDS, RATE = 12, 2, 5e-3
WIDTHS = (16, 32, 64)
WAYS = {
    "source": "statistics from training",
    "prediction-time": "statistics of the test batch",
    "blend": f"a blend of both, training weighted like {PRIOR} images",
    "recalibrated": "statistics of 1,259 images with the same corruption",
    "TENT": "like prediction-time, and adapts scales and biases without labels",
}
console = Console()


def noise(x: np.ndarray) -> np.ndarray:
    """Gaussian noise, as strong as the digits."""
    return x + np.random.default_rng(0).normal(0, 1, x.shape)


def blur(x: np.ndarray) -> np.ndarray:
    """A blur of one pixel."""
    return gaussian_filter(x, (0, 1, 1, 0))


def contrast(x: np.ndarray) -> np.ndarray:
    """A quarter of the contrast, and more brightness."""
    return 0.25 * x + 1


def inversion(x: np.ndarray) -> np.ndarray:
    """Light and dark swapped."""
    return x.max() + x.min() - x


CORRUPTIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "none": lambda x: x,
    "noise": noise,
    "blur": blur,
    "contrast": contrast,
    "inversion": inversion,
}


def corrupted(data: Data, name: str) -> Data:
    """The data with a corruption."""
    return Data(CORRUPTIONS[name](data.x).astype(np.float32), data.y)


def stream(apply: Callable[..., Any], using: Any) -> Callable[..., jax.Array]:
    """A function that evaluates batches (batches, N, H, W, C) in turn, with a policy."""

    @jax.jit
    def run(variables: Any, xs: jax.Array) -> jax.Array:
        with bnjax.override("**", using=using):
            return jax.lax.map(lambda x: apply(variables, x), xs)

    return run


def tent(apply: Callable[..., Any], lr: float) -> Callable[..., jax.Array]:
    """Likewise, but adapt scales and biases to minimize the entropy (Wang et al. 2021)."""

    def entropy(params: Any, rest: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        with bnjax.override("**", using=Batch()):
            logits = apply({**rest, "params": params}, x)
        p = jax.nn.softmax(logits)
        return -jnp.mean(jnp.sum(p * jax.nn.log_softmax(logits), -1)), logits

    @jax.jit
    def run(variables: Any, xs: jax.Array) -> jax.Array:
        labels = bnjax.trainable_labels(variables["params"], frozen=("**/Conv_*", "**/Dense_*"))
        adam: Any = {"trainable": optax.adam(lr), "frozen": optax.set_to_zero()}
        tx = optax.multi_transform(adam, labels)

        def step(state: Any, x: jax.Array) -> tuple[Any, jax.Array]:
            params, held = state
            grads, logits = jax.grad(entropy, has_aux=True)(params, variables, x)
            updates, held = tx.update(grads, held, params)
            return (optax.apply_updates(params, updates), held), logits

        return jax.lax.scan(step, (variables["params"], tx.init(variables["params"])), xs)[1]

    return run


class Network:
    """A network to train, and all ways to evaluate it, each compiled once per batch size.

    Attributes:
        ways: for each, whether its result depends on the batch size, and a function that runs it.
    """

    def __init__(self, splits: Splits, epochs: int, lr: float) -> None:
        self.splits, self.epochs = splits, epochs
        self.model = ResNet(splits.classes, WIDTHS)
        steps = epochs * (len(splits.train) // 64)
        self.tx = optax.adamw(optax.cosine_decay_schedule(3e-3, steps), mask=bnjax.decay_mask)
        self.step = train_step(loss_fn)
        source, apply = stream(self.model.apply, None), self.model.apply
        self.ways = {
            "source": (False, source),
            "prediction-time": (True, stream(apply, Batch())),
            "blend": (True, stream(apply, Blend(prior=PRIOR))),
            "recalibrated": (False, source),
            "TENT": (True, tent(apply, lr)),
        }

    def train(self, seed: int) -> Any:
        """The variables after training on clean digits only."""
        x = self.splits.train.x[:2]
        state = init_state(self.model, self.tx, jax.random.PRNGKey(seed), x)
        for epoch in range(self.epochs):
            for batch in batches(self.splits.train, 64, seed=1000 * seed + epoch):
                state, _ = self.step(state, batch)
        return state.variables

    def accuracies(
        self, variables: Any, seen: Data, test: Data, sizes: Sequence[int]
    ) -> dict[str, list[float]]:
        """Accuracies on test data, by way, for each batch size; `seen` is for recalibration."""
        found = {}
        for way, (by_size, run) in self.ways.items():
            of = variables
            if way == "recalibrated":
                of = bnjax.recalibrate(self.model, variables, [seen.x])
            right = []
            for size in sizes if by_size else sizes[-1:]:
                logits = run(of, test.x.reshape(-1, size, *test.x.shape[1:]))
                digits = np.asarray(logits).reshape(len(test), -1).argmax(-1)
                right.append(float((digits == test.y).mean()))
            found[way] = right if by_size else right * len(sizes)
        return found


Results = dict[str, Any]  # "sizes", and by corruption: "digits", and accuracies by way and network


def shown(data: Data, name: str) -> list[list[float]]:
    """Three digits with a corruption, side by side."""
    index = [int(np.argmax(data.y == digit)) for digit in (2, 5, 8)]
    images = corrupted(Data(data.x[index], data.y[index]), name).x[..., 0]
    return np.concatenate(list(images), 1).tolist()


def measure(
    splits: Splits,
    sizes: Sequence[int] = SIZES,
    epochs: int = EPOCHS,
    seeds: int = SEEDS,
    lr: float = RATE,
) -> Results:
    """Accuracies for each corruption, way, network and batch size."""
    network, unseen = Network(splits, epochs, lr), (splits.test, splits.validation)
    x, y = (np.concatenate([getattr(d, name) for d in unseen]) for name in ("x", "y"))
    whole = len(y) // max(sizes) * max(sizes)  # so that all batches are full
    test = Data(x[:whole], y[:whole])
    found: Results = {"sizes": list(sizes)}
    for name in CORRUPTIONS:
        found[name] = {"digits": shown(test, name), **{way: [] for way in WAYS}}
    for seed in range(seeds):
        variables = network.train(seed)
        for name in track(CORRUPTIONS, f"network {seed + 1} of {seeds}", console=console):
            seen, unlike = corrupted(splits.train, name), corrupted(test, name)
            for way, accuracies in network.accuracies(variables, seen, unlike, sizes).items():
                found[name][way].append(accuracies)
    return found


def show(results: Results) -> None:
    """Print a table for small batches and one for large batches."""
    sizes = results["sizes"]
    for index in dict.fromkeys((min(2, len(sizes) - 1), len(sizes) - 1)):
        table = Table("corruption", *WAYS, title=f"Accuracy, batches of {sizes[index]}")
        for name in CORRUPTIONS:
            means = (np.mean(results[name][way], 0)[index] for way in WAYS)
            table.add_row(name, *(f"{mean:.3f}" for mean in means))
        console.print(table)


def draw(results: Results, path: Path) -> None:
    """Plot some digits with each corruption, and accuracies over the batch size."""
    figure = Figure(figsize=(10.6, 5.2), dpi=120, layout="constrained")
    digits, panels = figure.subplots(2, len(CORRUPTIONS), height_ratios=[1, 3], sharey="row")
    styles = dict(zip(WAYS, ("k-", "C0o-", "C2s-", "C1--", "C3^-"), strict=True))
    sizes = results["sizes"]
    for top, axis, name in zip(digits, panels, CORRUPTIONS, strict=True):
        top.imshow(results[name]["digits"], cmap="gray", vmin=-1, vmax=2.5)
        top.set_title("clean, as in training" if name == "none" else name)
        top.set_axis_off()
        for way in WAYS:
            means = np.mean(results[name][way], 0)
            axis.plot(sizes, means, styles[way], label=way, markersize=4)
        axis.set_xscale("log", base=2)
        axis.set_xticks(sizes, map(str, sizes))
        axis.set(xlabel="test images in a batch", ylim=(0, 1.03))
        axis.grid(alpha=0.3)
    panels[0].set_ylabel("accuracy on test digits")
    lines, _ = panels[0].get_legend_handles_labels()
    labels = [f"{way}: {what}" for way, what in WAYS.items()]
    figure.legend(lines, labels, loc="outside lower center", ncols=2, title="normalized with")
    figure.savefig(path)


def main(
    out: Annotated[Path, typer.Option(help="The folder for the picture.")] = Path("runs/shifted"),
    epochs: Annotated[int, typer.Option(min=1, help="Epochs of each run.")] = EPOCHS,
    seeds: Annotated[int, typer.Option(min=1, help="The number of networks.")] = SEEDS,
    lr: Annotated[float, typer.Option(min=0, help="Learning rate of Adam in TENT.")] = RATE,
    size: Annotated[
        list[int] | None, typer.Option(min=1, help="A batch size to try. Repeatable.")
    ] = None,
) -> None:
    """Train on clean digits, and classify corrupted ones in five ways."""
    results = measure(load(), size or SIZES, epochs, seeds, lr)
    show(results)
    out.mkdir(parents=True, exist_ok=True)
    draw(results, out / "shifted_data.png")
    console.print(f"picture: {out / 'shifted_data.png'}", soft_wrap=True)


if __name__ == "__main__":
    typer.run(main)
