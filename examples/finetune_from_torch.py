"""Fine-tune a PyTorch network in Flax with frozen statistics, and convert it back.

PyTorch trains a small network on the digits 0 to 4. Flax loads it, first unchanged and with the
same outputs, then with a new last layer for all ten digits, which is fine-tuned with the running
statistics from PyTorch. The result is converted back to PyTorch. Needs torch.
"""

from collections import OrderedDict
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import optax
import typer
from digits import Data, batches, load, loss_fn
from flax import linen as nn
from rich.console import Console
from rich.progress import track

import bnjax
from bnjax.training import init_state, train_step

FLATTEN = {"fc": (32, 4, 4)}  # the shape that PyTorch flattens before the layer `fc`
console = Console()


class Net(nn.Module):
    """The network of `torch_net`, with the same layer names."""

    classes: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(N, 8, 8, 1) to (N, classes)."""
        x = nn.Conv(16, (3, 3), padding=1, use_bias=False, name="conv1")(x)
        x = nn.relu(bnjax.BatchNorm2d(16, name="bn1")(x))
        x = nn.Conv(32, (3, 3), 2, padding=1, use_bias=False, name="conv2")(x)
        x = nn.relu(bnjax.BatchNorm2d(32, name="bn2")(x))
        return nn.Dense(self.classes, name="fc")(x.reshape(len(x), -1))


def torch_net(classes: int) -> Any:
    """The network in PyTorch: (N, 1, 8, 8) to (N, classes)."""
    from torch import nn

    layers: Any = OrderedDict(
        conv1=nn.Conv2d(1, 16, 3, padding=1, bias=False),
        bn1=nn.BatchNorm2d(16),
        relu1=nn.ReLU(),
        conv2=nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False),
        bn2=nn.BatchNorm2d(32),
        relu2=nn.ReLU(),
        flat=nn.Flatten(),
        fc=nn.Linear(32 * 4 * 4, classes),
    )
    return nn.Sequential(layers)


def torch_logits(net: Any, x: np.ndarray) -> np.ndarray:
    """The outputs of the PyTorch network in evaluation mode."""
    import torch

    with torch.no_grad():
        return net.eval()(torch.tensor(x).permute(0, 3, 1, 2)).numpy()


def pretrain(data: Data, epochs: int, seed: int) -> Any:
    """Train a network in PyTorch on the digits 0 to 4."""
    import torch

    torch.manual_seed(seed)
    net = torch_net(5)
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for epoch in track(range(epochs), "training in PyTorch", console=console):
        for batch in batches(data, 64, seed=seed + epoch):
            x, y = torch.tensor(batch["x"]).permute(0, 3, 1, 2), torch.tensor(batch["y"])
            loss = torch.nn.functional.cross_entropy(net.train()(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return net


def finetune(variables: Any, data: Data, epochs: int, seed: int) -> Any:
    """Train with frozen running statistics, and return the variables."""
    state = init_state(Net(10), optax.adam(1e-3), jax.random.PRNGKey(seed), data.x[:2])
    state = state.replace(**variables)
    step = train_step(loss_fn)
    for epoch in track(range(epochs), "fine-tuning in Flax", console=console):
        for batch in batches(data, 64, seed=seed + epoch):
            with bnjax.freeze("**"):
                state, _ = step(state, batch)
    return {**state.variables}


def accuracy(logits: np.ndarray, data: Data) -> str:
    """The fraction of correct digits."""
    return f"{(logits.argmax(-1) == data.y).mean():.3f}"


def main(
    out: Annotated[Path, typer.Option(help="The folder for checkpoints.")] = Path("runs/finetune"),
    epochs: Annotated[int, typer.Option(min=1, help="Epochs of each run.")] = 8,
    seed: int = 0,
) -> None:
    """Load a network from PyTorch, fine-tune it, and convert it back."""
    out.mkdir(parents=True, exist_ok=True)
    splits = load(seed=seed)
    few = splits.train.y < 5
    trained = pretrain(Data(splits.train.x[few], splits.train.y[few]), epochs, seed)
    bnjax.save(out / "pretrained.pth", trained.state_dict())

    x = splits.test.x
    state_dict = bnjax.load(out / "pretrained.pth")
    template = jax.eval_shape(Net(5).init, jax.random.PRNGKey(seed), x[:1])
    variables = bnjax.from_torch(state_dict, Net(5), template, flatten=FLATTEN)
    gap = np.abs(Net(5).apply(variables, x) - torch_logits(trained, x)).max()
    console.print(f"the same network in Flax: logits differ by {gap:.1e}")

    fresh = Net(10).init(jax.random.PRNGKey(seed), x[:1])
    variables = bnjax.from_torch(state_dict, Net(10), fresh, ignore="fc/*")
    tuned = finetune(variables, splits.train, epochs, seed)
    logits = np.asarray(Net(10).apply(tuned, x))
    console.print(
        f"accuracy on all ten digits, fine-tuned in Flax: {accuracy(logits, splits.test)}"
    )

    back = torch_net(10)
    counters = {name: n for name, n in state_dict.items() if name.endswith("num_batches_tracked")}
    exported = bnjax.to_torch(tuned, back.state_dict() | counters, flatten=FLATTEN)
    back.load_state_dict(exported, strict=True)
    bnjax.save(out / "finetuned.pth", exported)
    logits, ours = torch_logits(back, x), logits
    console.print(f"accuracy back in PyTorch: {accuracy(logits, splits.test)}")
    console.print(f"logits differ by {np.abs(logits - ours).max():.1e}")
    same = all(
        (back.state_dict()[name] == tensor).all()
        for name, tensor in trained.state_dict().items()
        if "running" in name
    )
    console.print(f"running statistics: {'unchanged, bit for bit' if same else 'CHANGED'}")
    console.print(f"checkpoints: {out}", soft_wrap=True)
    if not same:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
