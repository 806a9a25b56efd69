"""Small nnx layers and models, their arrays, and what a forward pass updates."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import bnjax

X = jnp.asarray(2 + np.random.default_rng(1).standard_normal((8, 4, 2, 3)) * 3, jnp.float32)
ROWS = jnp.arange(8).reshape(8, 1, 1, 1) < 5
KINDS = (bnjax.nnx.BatchNorm2d, bnjax.nnx.BatchNorm, nnx.BatchNorm)


def make(kind: Any = bnjax.nnx.BatchNorm2d, num_features: int = 3, **settings: Any) -> Any:
    return kind(num_features, **settings, rngs=nnx.Rngs(0))


def held(layer: Any) -> dict[str, Any]:
    """The current arrays of a model by path, without random keys."""
    flat = nnx.to_flat_state(nnx.state(layer, nnx.Not(nnx.RngKey)))
    return {"/".join(map(str, path)): np.array(leaf[...]) for path, leaf in flat}


def assert_bits(found: Any, expected: Any) -> None:
    chex.assert_trees_all_equal(found, expected)
    chex.assert_trees_all_equal_shapes_and_dtypes(found, expected)


def moved(before: dict[str, Any], after: dict[str, Any]) -> set[str]:
    return {path for path in before if not np.array_equal(before[path], after[path])}


class Block(nnx.Module):
    """Batch norms of three classes, as attributes and in a list; the last may be shared."""

    def __init__(self, rngs: nnx.Rngs, shared: Any = None) -> None:
        self.first = bnjax.nnx.BatchNorm1d(3, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(3, 3, rngs=rngs), nnx.BatchNorm(3, rngs=rngs)])
        self.last = shared or bnjax.nnx.BatchNorm(3, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        return self.last(x)


class Net(nnx.Module):
    """An encoder and a decoder that share their last batch norm."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.decoder = Block(rngs)
        self.encoder = Block(rngs, self.decoder.last)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.decoder(self.encoder(x))


ROW = X.reshape(-1, 3)
ENCODER = {"encoder/first", "encoder/layers/1"}
DECODER = {"decoder/first", "decoder/layers/1"}
SHARED = {"decoder/last"}


def net() -> Net:
    return Net(nnx.Rngs(0))


def moving(model: Any) -> set[str]:
    """The batch norms of a model whose statistics a forward pass updates."""
    before = held(model)
    model(ROW)
    return {path.rpartition("/")[0] for path in moved(before, held(model))}


class WithDropout(nnx.Module):
    """Layers in a list, and dropout."""

    def __init__(self, rngs: nnx.Rngs):
        self.layers = nnx.List([nnx.Linear(3, 4, rngs=rngs), bnjax.nnx.BatchNorm1d(4, rngs=rngs)])
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.dropout(x)
