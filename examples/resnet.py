"""ResNet-18, 34 and 50 with bnjax's batch norm, and torchvision's layer names.

`conv1`, `bn1`, `layer1.0.conv1`, `layer1.0.downsample.0` and `fc` are called `conv1`, `bn1`,
`layer1_0/conv1`, `layer1_0/downsample_0` and `fc`, so `bnjax.from_torch` needs no `rename`.
Padding is PyTorch's as well: Flax's "SAME" pads strided convolutions on the other side.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
from flax import linen as nn

import bnjax


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al. 2015)."""

    width: int
    stride: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(N, H, W, C) to (N, H / stride, W / stride, width)."""
        y = _conv(self.width, 3, self.stride, name="conv1")(x)
        y = nn.relu(bnjax.BatchNorm2d(self.width, name="bn1")(y))
        y = _conv(self.width, 3, name="conv2")(y)
        y = bnjax.BatchNorm2d(self.width, name="bn2")(y)
        return nn.relu(y + _shortcut(x, y, self.stride))


class Bottleneck(nn.Module):
    """A strided 3x3 convolution between two 1x1 convolutions, and a shortcut."""

    width: int
    stride: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(N, H, W, C) to (N, H / stride, W / stride, 4 * width)."""
        y = _conv(self.width, 1, name="conv1")(x)
        y = nn.relu(bnjax.BatchNorm2d(self.width, name="bn1")(y))
        y = _conv(self.width, 3, self.stride, name="conv2")(y)
        y = nn.relu(bnjax.BatchNorm2d(self.width, name="bn2")(y))
        y = _conv(4 * self.width, 1, name="conv3")(y)
        y = bnjax.BatchNorm2d(4 * self.width, name="bn3")(y)
        return nn.relu(y + _shortcut(x, y, self.stride))


class ResNet(nn.Module):
    """Four stages of blocks, from images (N, H, W, channels) to logits (N, classes)."""

    stages: Sequence[int]
    block: type[BasicBlock] | type[Bottleneck]
    classes: int = 1000
    width: int = 64

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(N, H, W, channels) to (N, classes)."""
        x = _conv(self.width, 7, 2, name="conv1")(x)
        x = nn.relu(bnjax.BatchNorm2d(self.width, name="bn1")(x))
        padding: Any = ((1, 1), (1, 1))  # Flax annotates it as a string
        x = nn.max_pool(x, (3, 3), (2, 2), padding)
        for stage, blocks in enumerate(self.stages):
            for number in range(blocks):
                stride = 2 if stage and not number else 1
                name = f"layer{stage + 1}_{number}"
                x = self.block(self.width * 2**stage, stride, name=name)(x)
        return nn.Dense(self.classes, name="fc")(x.mean((1, 2)))


def _conv(features: int, size: int, stride: int = 1, *, name: str) -> nn.Conv:
    padding = size // 2
    return nn.Conv(
        features, (size, size), (stride, stride), padding=padding, use_bias=False, name=name
    )


def _shortcut(x: jax.Array, y: jax.Array, stride: int) -> jax.Array:
    """The input in the shape of the output; its layers belong to the calling block."""
    if x.shape == y.shape:
        return x
    x = _conv(y.shape[-1], 1, stride, name="downsample_0")(x)
    return bnjax.BatchNorm2d(y.shape[-1], name="downsample_1")(x)


ResNet18 = partial(ResNet, (2, 2, 2, 2), BasicBlock)
ResNet34 = partial(ResNet, (3, 4, 6, 3), BasicBlock)
ResNet50 = partial(ResNet, (3, 4, 6, 3), Bottleneck)
