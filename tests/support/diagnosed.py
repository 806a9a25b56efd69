"""Train small networks, well or with a fault, and diagnose them."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax import nnx

import bnjax
from bnjax.diagnosis import Report
from bnjax.training import Step, TrainState, init_state, train_step
from tests.support.compilers import quickly

CLASSES, SIZE, STEPS = 4, 8, 80


class Net(nn.Module):
    """Two convolutions and a hidden layer, with bnjax's batch norm by default."""

    conv_norm: Callable[..., Any] = bnjax.BatchNorm2d
    norm: Callable[..., Any] = bnjax.BatchNorm1d

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for width in (8, 16):
            x = nn.Conv(width, (3, 3), 2, use_bias=False)(x)
            x = nn.relu(self.conv_norm()(x))
        x = nn.Dense(32)(x.mean((1, 2)))
        return nn.Dense(CLASSES)(nn.relu(self.norm()(x)))


class FlaxNet(nn.Module):
    """The same network with Flax's batch norm."""

    momentum: float = 0.9
    settings: tuple[tuple[str, Any], ...] = ()

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        norm = functools.partial(nn.BatchNorm, not train, momentum=self.momentum)
        norm = functools.partial(norm, **dict(self.settings))
        for width in (8, 16):
            x = nn.relu(norm()(nn.Conv(width, (3, 3), 2, use_bias=False)(x)))
        x = nn.relu(norm()(nn.Dense(32)(x.mean((1, 2)))))
        return nn.Dense(CLASSES)(x)


class NnxNet(nnx.Module):
    """The same network in nnx."""

    def __init__(self, rngs: nnx.Rngs, norm: Any = nnx.BatchNorm, momentum: float = 0.9) -> None:
        widths = ((1, 8), (8, 16))
        self.convs = nnx.List(
            [nnx.Conv(a, b, (3, 3), 2, use_bias=False, rngs=rngs) for a, b in widths]
        )
        self.norms = nnx.List([norm(n, momentum=momentum, rngs=rngs) for n in (8, 16, 32)])
        self.hidden = nnx.Linear(16, 32, rngs=rngs)
        self.head = nnx.Linear(32, CLASSES, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        for conv, norm in zip(self.convs, self.norms, strict=False):
            x = nnx.relu(norm(conv(x)))
        return self.head(nnx.relu(self.norms[2](self.hidden(x.mean((1, 2))))))


def batches(count: int, size: int = 64, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Images of four kinds of stripes with mean 0 and deviation 1, and their classes."""
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(np.arange(SIZE), np.arange(SIZE)), -1) / SIZE
    waves = np.array([[1, 0], [0, 1], [1, 1], [2, 0]])
    for _ in range(count):
        y = rng.integers(0, CLASSES, size)
        phase = rng.uniform(0, 1, (size, 1, 1))
        clean = np.sin(2 * np.pi * (np.einsum("hwd,nd->nhw", grid, waves[y]) + phase))
        x = clean * rng.uniform(0.8, 1.6, (size, 1, 1)) + rng.normal(0, 0.5, clean.shape)
        yield {"x": x[..., None].astype(np.float32), "y": y}


def loss_fn(logits: jax.Array, batch: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Cross entropy and accuracy per example."""
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])
    return loss, {"accuracy": logits.argmax(-1) == batch["y"]}


@functools.cache
def optimizer(lr: float, steps: int) -> optax.GradientTransformation:
    """Adam with a learning rate that decays to zero."""
    return optax.adam(optax.cosine_decay_schedule(lr, steps))


@functools.cache
def compiled(**apply_kwargs: Any) -> Step:
    """A step, shared by all runs with the same arguments."""
    return train_step(loss_fn, apply_kwargs=apply_kwargs, donate=False)


def train(
    model: nn.Module,
    *,
    steps: int = STEPS,
    size: int = 64,
    seed: int = 0,
    lr: float = 0.01,
    step: Step | None = None,
    each: Callable[[TrainState], Any] = lambda state: None,
    **apply_kwargs: Any,
) -> TrainState:
    """The state after a short training run; `each` is called with all states."""
    x = jnp.zeros((2, SIZE, SIZE, 1))
    state = init_state(model, optimizer(lr, steps), jax.random.key(seed), x, **apply_kwargs)
    step = step or compiled(**apply_kwargs)
    with quickly(quickly.value and steps < 1000):  # long runs are worth a fast program
        for batch in batches(steps, size, seed + 100):
            state, _ = step(state, batch)
            each(state)
    return state


NET = Net()
DATA = list(batches(8, seed=7))


def found(report: Report) -> list[tuple[str, str]]:
    return [(finding.severity, finding.kind) for finding in report.findings]


def diagnose(variables: Any, data: Any = DATA, model: Any = NET, **options: Any) -> Report:
    return bnjax.diagnose(model, variables, data, loss_fn=loss_fn, **options)
