"""Models and calls for the tables of mistakes."""

from typing import Any

import optax
from flax import linen as nn
from flax import nnx

import bnjax
from bnjax.training import TrainState
from tests.support.mistakes import FLAX, KEY, NC, untyped

# Untyped, for calls that a type checker would reject.
bn: Any = bnjax
training: Any = bnjax.training
like_flax: Any = FLAX

LAYER = bnjax.BatchNorm1d(3)


class Net(nn.Module):
    """A batch norm in a nested module."""

    @nn.compact
    def __call__(self, x):
        return Inner(name="inner")(x)


class Inner(nn.Module):
    @nn.compact
    def __call__(self, x):
        return bnjax.BatchNorm1d(name="bn")(nn.Dense(3, name="dense")(x))


class WithMode(nn.Module):
    """A model that takes its mode as an argument."""

    @nn.compact
    def __call__(self, x, train):
        return bnjax.BatchNorm1d(name="bn")(x)


class InModel(nn.Module):
    """A batch norm with a given number of channels."""

    channels: Any

    @nn.compact
    def __call__(self, x):
        return bnjax.BatchNorm2d(self.channels, name="bn")(x)


class Momentum(nn.Module):
    """A batch norm with an invalid momentum."""

    @nn.compact
    def __call__(self, x):
        return bnjax.BatchNorm2d(momentum=10, name="bn")(x)


class Called(nn.Module):
    """A batch norm called with an argument of this name."""

    argument: str

    @nn.compact
    def __call__(self, x):
        return bnjax.BatchNorm2d(name="bn")(x, **untyped({self.argument: True}))


class Deep(nnx.Module):
    """A batch norm with a given number of channels, in a list."""

    def __init__(self, channels: int) -> None:
        self.norms = nnx.List([bnjax.nnx.BatchNorm2d(channels, rngs=nnx.Rngs(0))])

    def __call__(self, x):
        return self.norms[0](x)


NET = Net()


def loss_fn(outputs, batch):
    return (outputs**2).mean(-1)


def state(model: nn.Module = NET, **kwargs: Any) -> TrainState:
    return training.init_state(model, optax.sgd(0.1), KEY, NC, **kwargs)


def spent() -> TrainState:
    """A state whose arrays were donated."""
    old = state()
    training.train_step(loss_fn)(old, {"x": NC})
    return old


def used() -> Any:
    return training.train_step(loss_fn)(spent(), {"x": NC})


def step(loss: Any) -> Any:
    return training.train_step(loss)(state(), {"x": NC})


def frozen(paths: str) -> None:
    with bnjax.freeze(paths):
        NET.apply(state().variables, NC)


def nnx_layer(kind: Any = bnjax.nnx.BatchNorm2d) -> Any:
    return kind(3, rngs=nnx.Rngs(0))


def nnx_optimizer() -> nnx.Optimizer:
    return nnx.Optimizer(Deep(3), optax.sgd(0.1), wrt=nnx.Param)
