"""Networks with batch norms between two learned layers, trained on random images."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

import bnjax
from bnjax.training import TrainState, init_state, train_step

Norms = Mapping[str, Callable[..., nn.Module]]


class Parallel(nn.Module):
    """Batch norms in parallel, applied to images, optionally with a mask."""

    norms: Norms

    @nn.compact
    def __call__(self, x):
        x, mask = (x["image"], x["mask"]) if isinstance(x, Mapping) else (x, None)
        outputs = [make(name=name)(x, mask=mask) for name, make in self.norms.items()]
        return jnp.stack(outputs).sum(0)


TRAINED = Parallel({"norm": bnjax.BatchNorm2d})


class Net(nn.Module):
    """A module between two learned layers."""

    body: nn.Module
    stem: bool = True

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (2, 2), use_bias=False)(x) if self.stem else x
        y = self.body(x)
        return nn.Dense(1)(y.reshape(len(y), -1))[:, 0]


def squared_error(outputs, batch):
    return (outputs - batch["y"]) ** 2


def images(seed: int, size: int = 32) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    x = 1 + 2 * rng.standard_normal((size, 3, 2, 4))
    return {"x": x.astype(np.float32), "y": rng.standard_normal(size).astype(np.float32)}


def start(model: nn.Module, x: Any, rate: float = 0.1) -> TrainState:
    """A new state with random statistics."""
    rng = np.random.default_rng(1)

    def random(leaf):
        whole = jnp.issubdtype(leaf.dtype, jnp.integer)
        return np.asarray(rng.uniform(0.5, 2, leaf.shape) + 3 * whole, leaf.dtype)

    state = init_state(model, optax.sgd(rate), jax.random.key(0), x)
    stats = jax.tree.map(random, state.batch_stats)
    return state.replace(batch_stats=stats)


def trained(state: TrainState, batches: list[Any], **options: Any) -> TrainState:
    """The state after a step for each batch."""
    step = train_step(squared_error, donate=False, **options)
    for batch in batches:
        state, metrics = step(state, batch)
        assert metrics["accepted"]
        assert np.isfinite(metrics["loss"])
    return jax.device_get(state)
