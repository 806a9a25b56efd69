"""Other people's models, written with Flax alone."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from flax import nnx


class ResidualBlock(nn.Module):
    """Two 3x3 convs and a shortcut (He et al. 2015)."""

    features: int
    strides: int = 1
    norm: Callable[..., Any] = nn.BatchNorm

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        norm = partial(self.norm, use_running_average=not train)
        conv = partial(nn.Conv, self.features, use_bias=False)
        y = nn.relu(norm(name="bn1")(conv((3, 3), self.strides, name="conv1")(x)))
        y = norm(name="bn2")(conv((3, 3), name="conv2")(y))
        if x.shape != y.shape:
            x = norm(name="bn0")(conv((1, 1), self.strides, name="conv0")(x))
        return nn.relu(x + y)


class ResNet(nn.Module):
    """Four stages of residual blocks; with two blocks each, 18 layers."""

    stages: Sequence[int] = (2, 2, 2, 2)
    width: int = 8
    classes: int = 10
    norm: Callable[..., Any] = nn.BatchNorm
    remat: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        block = nn.remat(ResidualBlock, static_argnums=(2,)) if self.remat else ResidualBlock
        x = nn.Conv(self.width, (3, 3), use_bias=False, name="stem")(x)
        x = nn.relu(self.norm(use_running_average=not train, name="stem_bn")(x))
        for stage, blocks in enumerate(self.stages):
            for number in range(blocks):
                strides = 2 if stage and not number else 1
                name = f"stage{stage}_block{number}"
                x = block(self.width * 2**stage, strides, self.norm, name=name)(x, train)
        return nn.Dense(self.classes, name="head")(x.mean((1, 2)))


class SharedEncoder(nn.Module):
    """An encoder written with `setup`, used for both inputs of a siamese net."""

    def setup(self) -> None:
        self.layers = [nn.Conv(4, (3, 3)), nn.Conv(6, (3, 3), strides=(2, 2))]
        self.norms = [nn.BatchNorm(momentum=0.9), nn.BatchNorm(momentum=0.9)]

    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = nn.relu(norm(layer(x), use_running_average=not train))
        return x


class Siamese(nn.Module):
    """A shared encoder under `nn.remat`, and a batch norm for each of two domains."""

    def setup(self) -> None:
        self.encoder = nn.remat(SharedEncoder, static_argnums=(2,))()
        self.shared = nn.Dense(5)
        self.domains = [nn.BatchNorm(), nn.BatchNorm()]
        self.head = nn.Dense(3)

    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        both = [self.encoder(part, train).mean((1, 2)) for part in (x, x[:, ::-1])]
        ys = [
            norm(self.shared(y), use_running_average=not train)
            for norm, y in zip(self.domains, both, strict=True)
        ]
        return self.head(nn.relu(ys[0] * ys[1]))


class NnxBlock(nnx.Module):
    """Two 3x3 convs and a shortcut, in nnx."""

    def __init__(self, features: tuple[int, int], rngs: nnx.Rngs, norm: Callable[..., Any]) -> None:
        into, out = features
        strides = 1 if into == out else 2
        self.conv1 = nnx.Conv(into, out, (3, 3), strides, use_bias=False, rngs=rngs)
        self.bn1 = norm(out, rngs=rngs)
        self.conv2 = nnx.Conv(out, out, (3, 3), use_bias=False, rngs=rngs)
        self.bn2 = norm(out, rngs=rngs)
        self.shortcut = nnx.Sequential()
        if strides > 1:
            conv0 = nnx.Conv(into, out, (1, 1), strides, use_bias=False, rngs=rngs)
            self.shortcut = nnx.Sequential(conv0, norm(out, rngs=rngs))

    def __call__(self, x: jax.Array) -> jax.Array:
        y = nnx.relu(self.bn1(self.conv1(x)))
        return nnx.relu(self.shortcut(x) + self.bn2(self.conv2(y)))


class NnxResNet(nnx.Module):
    """Residual blocks under `nnx.remat`, the last one used twice, and dropout."""

    def __init__(self, rngs: nnx.Rngs, norm: Callable[..., Any] = nnx.BatchNorm) -> None:
        self.stem = nnx.Conv(3, 4, (3, 3), rngs=rngs)
        self.stem_bn = norm(4, rngs=rngs)
        self.blocks = nnx.List([NnxBlock(sizes, rngs, norm) for sizes in ((4, 4), (4, 8))])
        self.shared = NnxBlock((8, 8), rngs, norm)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.stem_bn(self.stem(x)))
        for block in (*self.blocks, self.shared, self.shared):
            x = nnx.remat(lambda block, x: block(x))(block, x)
        return self.head(self.dropout(x.mean((1, 2))))


class Branches(nnx.Module):
    """Dropout, remat, and a batch norm that is used twice and also in a list."""

    def __init__(self, rngs: nnx.Rngs, norm: Any = nnx.BatchNorm) -> None:
        self.first = norm(3, rngs=rngs)
        self.dense = nnx.Linear(3, 6, rngs=rngs)
        self.norms = nnx.List([norm(6, rngs=rngs), norm(6, rngs=rngs)])
        self.twice = self.norms[1]
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.inputs: Any = None

    def look(self, name: str, x: Any) -> Any:
        if self.inputs is not None:
            self.inputs.setdefault(name, []).append(np.asarray(x, np.float64))
        return x

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.first(self.look("first", x))
        h = nnx.remat(lambda dense, x: dense(x))(self.dense, x)
        h = self.dropout(nnx.relu(self.norms[0](self.look("norms/0", h))))
        h = self.twice(self.look("norms/1", h))
        return self.twice(self.look("norms/1", h * 2 + 1))
