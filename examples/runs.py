"""Training runs of the digits network in linen or nnx, with a common interface."""

import abc
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import jax
import optax
import orbax.checkpoint as ocp
import typer
from digits import Batch, NnxResNet, ResNet, Splits, as_linen, loss_fn
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

import bnjax
from bnjax import decay_mask
from bnjax.training import eval_step, evaluate, history, init_state, train_step


class Run(abc.ABC):
    """A training run: the network, its optimizer and its records.

    Attributes:
        epochs: losses and accuracies after each epoch.
        statistics: the record of `bnjax.training.history`.
    """

    library: str

    def __init__(self) -> None:
        self.epochs: list[dict[str, float]] = []
        self.statistics: dict[str, Any] = {}

    @abc.abstractmethod
    def step(self, batch: Batch) -> dict[str, Any]:
        """Train on a batch and return the metrics."""

    @abc.abstractmethod
    def evaluate(self, batches: Iterable[Batch]) -> dict[str, float]:
        """Loss and accuracy in evaluation."""

    @abc.abstractmethod
    def logits(self, x: Any) -> jax.Array:
        """The network's outputs for images, in evaluation mode."""

    @property
    @abc.abstractmethod
    def saved(self) -> dict[str, Any]:
        """The tree to save in a checkpoint; assign it to restore the run."""

    @saved.setter
    @abc.abstractmethod
    def saved(self, tree: dict[str, Any]) -> None: ...

    @property
    @abc.abstractmethod
    def rejected(self) -> int:
        """How many steps were rejected."""

    @property
    @abc.abstractmethod
    def params(self) -> Any:
        """The parameters."""

    @property
    def weights(self) -> int:
        """How many parameters the network has."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.params))


class LinenRun(Run):
    """A run with a `TrainState`, replaced by each step."""

    library = "linen"
    shown = ("BatchNorm2d_0", "Block_2/BatchNorm2d_2")  # the first and the last batch norm
    fields = ("step", "params", "opt_state", "batch_stats", "rng", "rejected")

    def __init__(
        self, splits: Splits, tx: optax.GradientTransformation, seed: int, mesh: Mesh | None
    ) -> None:
        super().__init__()
        model, key = ResNet(splits.classes), jax.random.PRNGKey(seed)
        self.state = init_state(model, tx, key, splits.train.x[:2])
        step = train_step(loss_fn, mesh=mesh)
        self._step = history(step, self.statistics, paths=self.shown, channels=1)
        self._test = eval_step(loss_fn, mesh=mesh)
        self._forward = jax.jit(model.apply)

    def step(self, batch: Batch) -> dict[str, Any]:
        """Replace the state."""
        self.state, metrics = self._step(self.state, batch)
        return metrics

    def evaluate(self, batches: Iterable[Batch]) -> dict[str, float]:
        """Evaluate the current state."""
        return evaluate(self._test, self.state, batches)

    def logits(self, x: Any) -> jax.Array:
        """Normalize with the running statistics."""
        return self._forward(self.state.variables, x)

    @property
    def saved(self) -> dict[str, Any]:
        """Fields of the state."""
        return {name: getattr(self.state, name) for name in self.fields}

    @saved.setter
    def saved(self, tree: dict[str, Any]) -> None:
        self.state = self.state.replace(**tree)

    @property
    def rejected(self) -> int:
        """Counted by the state."""
        return int(self.state.rejected)

    @property
    def params(self) -> Any:
        """The parameters of the state."""
        return self.state.params


class NnxRun(Run):
    """A run with a model and an optimizer, updated in place by each step."""

    library = "nnx"
    shown = ("norms/0", "blocks/2/norms/2")

    def __init__(
        self, splits: Splits, tx: optax.GradientTransformation, seed: int, mesh: Mesh | None
    ) -> None:
        super().__init__()
        x = splits.train.x[:2]
        self.model = NnxResNet(splits.classes, channels=x.shape[-1])
        linen = init_state(ResNet(splits.classes), tx, jax.random.PRNGKey(seed), x)
        as_linen(self.model, linen.variables)
        self.optimizer = nnx.Optimizer(self.model, tx, wrt=nnx.Param)
        self._steps = bnjax.nnx.train_step(loss_fn, mesh=mesh)
        self._step = history(self._steps, self.statistics, paths=self.shown, channels=1)
        self._test = bnjax.nnx.eval_step(loss_fn, mesh=mesh)
        self._forward = nnx.jit(lambda model, x: model(x))

    def step(self, batch: Batch) -> dict[str, Any]:
        """Update model and optimizer."""
        return self._step(self.model, self.optimizer, batch)

    def evaluate(self, batches: Iterable[Batch]) -> dict[str, float]:
        """Evaluate the current model."""
        return bnjax.nnx.evaluate(self._test, self.model, batches)

    def logits(self, x: Any) -> jax.Array:
        """Normalize with the running statistics."""
        self.model.eval()
        y = self._forward(self.model, x)
        self.model.train()
        return y

    @property
    def saved(self) -> dict[str, Any]:
        """The states of model and optimizer."""

        def plain(part: Any) -> dict[str, Any]:
            flat = nnx.to_flat_state(nnx.state(part))
            return unflatten_dict({_names(keys): leaf.get_value() for keys, leaf in flat})

        trained = {"model": plain(self.model), "optimizer": plain(self.optimizer)}
        return {**trained, "rejected": self._steps.rejected}

    @saved.setter
    def saved(self, tree: dict[str, Any]) -> None:
        for name, part in (("model", self.model), ("optimizer", self.optimizer)):
            arrays, flat = flatten_dict(tree[name]), nnx.to_flat_state(nnx.state(part))
            new = ((keys, leaf.replace(arrays[_names(keys)])) for keys, leaf in flat)
            nnx.update(part, nnx.from_flat_state(new))
        self._steps.rejected = tree["rejected"]

    @property
    def rejected(self) -> int:
        """Counted by the step."""
        return int(self._steps.rejected)

    @property
    def params(self) -> Any:
        """The parameters of the model."""
        return nnx.state(self.model, nnx.Param)


def _names(keys: tuple[Any, ...]) -> tuple[str, ...]:
    return tuple(map(str, keys))


Library = Literal["linen", "nnx"]
RUNS: dict[str, Any] = {"linen": LinenRun, "nnx": NnxRun}


def start(
    splits: Splits,
    lr: float,
    epochs: int,
    batch_size: int,
    seed: int,
    library: Library = "linen",
    mesh: Mesh | None = None,
) -> Any:
    """A new run, with AdamW on a warmed-up cosine schedule."""
    steps = epochs * (len(splits.train) // batch_size)
    schedule = optax.warmup_cosine_decay_schedule(0.0, lr, steps // 10, steps)
    tx = optax.adamw(schedule, weight_decay=0.02, mask=decay_mask)
    return RUNS[library](splits, tx, seed, mesh)


def save(manager: ocp.CheckpointManager, run: Run) -> None:
    """Write a checkpoint, which gets its final name only when complete."""
    records = {"epochs": run.epochs, "statistics": run.statistics, "weights": run.weights}
    items = ocp.args.Composite(
        state=ocp.args.StandardSave(run.saved),
        records=ocp.args.JsonSave(records | {"library": run.library}),
    )
    manager.save(len(run.epochs), args=items)


def restore(manager: ocp.CheckpointManager, run: Any) -> Any:
    """Restore a new run from the last complete checkpoint."""
    step = manager.latest_step()
    found = manager.restore(step, args=ocp.args.Composite(records=ocp.args.JsonRestore()))
    records = dict(found["records"])
    library = records.get("library", "linen")
    if library != run.library:
        message = f"{manager.directory} holds a run in {library}: add --library {library}"
        raise typer.BadParameter(message, param_hint="--out")
    if records["weights"] != run.weights:
        message = f"{manager.directory} holds another network: its data had different classes"
        raise typer.BadParameter(message, param_hint="--out")
    wanted = ocp.args.Composite(state=ocp.args.StandardRestore(run.saved))
    run.saved = manager.restore(step, args=wanted)["state"]
    run.epochs = records["epochs"]
    run.statistics.update(records["statistics"])
    return run


def folder_of(out: Path, resume: bool) -> Path:
    """The run's folder: OUT, or OUT-2 and so on if OUT holds a run; the last one to resume."""

    def named(number: int) -> Path:
        return out if number == 1 else out.with_name(f"{out.name}-{number}")

    number = 1
    while resume and (named(number + 1) / "checkpoints").is_dir():
        number += 1
    while not resume and _holds_a_run(named(number)):
        number += 1
    return named(number)


def _holds_a_run(folder: Path) -> bool:
    steps = folder / "checkpoints"
    return steps.is_dir() and any(each.name.isdecimal() for each in steps.iterdir())
