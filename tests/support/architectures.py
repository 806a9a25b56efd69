"""Train three small networks without faults on five classes of images, in linen and nnx."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax import nnx

from bnjax.training import Step, TrainState, history, init_state, train_step

NAMES = ("plain", "residual", "mlp")
CLASSES, WIDTH = 5, 8
_TX = {"plain": optax.sgd(0.02, 0.9), "residual": optax.adam(3e-3), "mlp": optax.adam(1e-3)}


class Net(nn.Module):
    """A plain convolutional network, a residual one, or a residual MLP."""

    name_of: str
    norm: Callable[..., Any] = functools.partial(nn.BatchNorm, momentum=0.9)

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        def block(x: jax.Array, width: int, name: str, stride: int = 1) -> jax.Array:
            if self.name_of == "mlp":
                x = nn.Dense(width)(x)
            else:
                x = nn.Conv(width, (3, 3), stride, use_bias=False)(x)
            return self.norm(not train, name=name)(x)

        if self.name_of == "mlp":
            x = x.reshape(len(x), -1)
        x = nn.relu(block(x, WIDTH, "first", 2 if self.name_of == "residual" else 1))
        for i in range(2):
            if self.name_of == "plain":
                x = nn.relu(block(x, 2 * WIDTH, f"norm{i}", 2))
            else:
                x = x if self.name_of == "mlp" or not i else nn.avg_pool(x, (2, 2), (2, 2))
                y = nn.relu(block(x, WIDTH, f"norm{i}"))
                x = nn.relu(x + block(y, WIDTH, f"last{i}"))
        return nn.Dense(CLASSES)(x if x.ndim == 2 else x.mean((1, 2)))


class NnxNet(nnx.Module):
    """The same networks in nnx."""

    def __init__(self, name: str, zero: bool = False, seed: int = 0) -> None:
        rngs, self.name = nnx.Rngs(seed), name
        count = 3 if name == "plain" else 5
        widths = [WIDTH] + [2 * WIDTH if name == "plain" else WIDTH] * (count - 1)
        inputs = [8 * 8 * 3 if name == "mlp" else 3, *widths[:-1]]
        strides = [1, 2, 2] if name == "plain" else [2, *[1] * (count - 1)]
        self.inner, self.norms = nnx.List([]), nnx.List([])
        for i, (a, b, stride) in enumerate(zip(inputs, widths, strides, strict=True)):
            if name == "mlp":
                self.inner.append(nnx.Linear(a, b, rngs=rngs))
            else:
                conv = nnx.Conv(a, b, (3, 3), stride, use_bias=False, rngs=rngs)
                self.inner.append(conv)
            last = zero and name != "plain" and i in (2, 4)
            scale = nnx.initializers.zeros if last else nnx.initializers.ones
            self.norms.append(nnx.BatchNorm(b, momentum=0.9, scale_init=scale, rngs=rngs))
        self.head = nnx.Linear(widths[-1], CLASSES, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        if self.name == "mlp":
            x = x.reshape(len(x), -1)
        blocks = list(zip(self.inner, self.norms, strict=True))
        x = nnx.relu(_through(blocks[0], x))
        if self.name == "plain":
            for block in blocks[1:]:
                x = nnx.relu(_through(block, x))
        else:
            for i, (one, two) in enumerate((blocks[1:3], blocks[3:5])):
                x = x if self.name == "mlp" or not i else nnx.avg_pool(x, (2, 2), (2, 2))
                x = nnx.relu(x + _through(two, nnx.relu(_through(one, x))))
        return self.head(x if x.ndim == 2 else x.mean((1, 2)))


def _through(block: tuple[Any, Any], x: jax.Array) -> jax.Array:
    inner, norm = block
    return norm(inner(x))


def batches(
    count: int, size: int = 32, seed: int = 0, *, raw: bool = False, part: int = 0
) -> Iterator[dict[str, Any]]:
    """Noisy images of five classes, with mean 0 and deviation 0.9, or raw, around 0.5."""
    means = np.random.default_rng(seed).normal(0, 0.6, (CLASSES, 8, 8, 3))
    rng = np.random.default_rng((seed, part))
    for _ in range(count):
        y = rng.integers(0, CLASSES, size)
        x = means[y] + rng.normal(0, 0.7, (size, 8, 8, 3))
        yield {"x": (0.5 + 0.25 * x if raw else x).astype(np.float32), "y": y}


def loss_fn(logits: jax.Array, batch: Any) -> jax.Array:
    """Cross entropy per example."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])


@functools.cache
def compiled(name: str) -> tuple[Net, Step]:
    """A network and its step, shared by all runs."""
    return Net(name), train_step(loss_fn, apply_kwargs={"train": True}, donate=False)


def train(
    name: str,
    data: Any,
    *,
    zero: bool = False,
    seed: int = 0,
    record: dict[str, Any] | None = None,
    each: Callable[[TrainState], TrainState] = lambda state: state,
) -> TrainState:
    """The state after a step on each batch; with `zero`, residual branches start at 0."""
    net, step = compiled(name)
    data = list(data)
    state = init_state(net, _TX[name], jax.random.key(seed), data[0]["x"])
    if zero:
        params: Any = dict(state.params)
        for path in [path for path in params if path.startswith("last")]:
            params[path] = {**params[path], "scale": jnp.zeros_like(params[path]["scale"])}
        state = state.replace(params=params)
    step = step if record is None else history(step, record, every=10)
    for batch in data:
        state = each(step(state, batch)[0])
    return state


@functools.cache
def _nnx_step(name: str) -> Any:
    @nnx.jit
    def step(model: NnxNet, optimizer: Any, batch: Any) -> None:
        grads = nnx.grad(lambda model: loss_fn(model(batch["x"]), batch).mean())(model)
        optimizer.update(model, grads)

    return step


def train_nnx(name: str, data: Any, *, zero: bool = False, seed: int = 0) -> NnxNet:
    """The same in nnx; returns the model in evaluation mode."""
    model = NnxNet(name, zero, seed)
    model.train()
    optimizer, step = nnx.Optimizer(model, _TX[name], wrt=nnx.Param), _nnx_step(name)
    for batch in data:
        step(model, optimizer, batch)
    model.eval()
    return model


def fresh(name: str) -> Any:
    """The variables of a new linen network."""
    x = jnp.zeros((2, 8, 8, 3))
    init: Any = jax.jit(compiled(name)[0].init)
    return init(jax.random.key(0), x)


def averaged(trees: list[Any]) -> Any:
    """The mean of parameters, as in stochastic weight averaging."""
    return jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *trees)
