"""The data and the network that the examples share: scanned digits and a small residual CNN.

The network is written twice, in linen and in nnx, with the same layers and initial weights.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from flax import linen as nn
from flax import nnx
from flax.traverse_util import flatten_dict

import bnjax

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Data:
    """Images (N, H, W, C) in float32, standardized, and labels (N,)."""

    x: np.ndarray
    y: np.ndarray

    def __len__(self) -> int:
        """The number of images."""
        return len(self.y)


@dataclasses.dataclass(frozen=True)
class Splits:
    """Training, validation and test data, and the number of classes."""

    train: Data
    validation: Data
    test: Data
    classes: int


def load(path: Path | None = None, seed: int = 0) -> Splits:
    """scikit-learn's 1,797 digits, or a user's own `.npz` with `images` and `labels`."""
    if path is None:
        from sklearn.datasets import load_digits

        digits: Any = load_digits()
        images, labels = digits.images, digits.target
    else:
        images, labels = _read(path)
    images = images.astype(np.float32).reshape(*images.shape[:3], -1)
    order = np.random.default_rng(seed).permutation(len(labels))
    test, validation, train = np.split(order, [len(order) // 5, len(order) // 5 + len(order) // 10])
    mean, std = images[train].mean(), images[train].std()
    images = (images - mean) / max(float(std), 1e-6)
    parts = (Data(images[index], labels[index]) for index in (train, validation, test))
    return Splits(*parts, classes=int(labels.max()) + 1)


def _read(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """The arrays of a user's file, or an error that says what is wrong with it."""
    expected = "expected an .npz with `images` (N, H, W) or (N, H, W, C) and integer `labels` (N,)"
    try:
        file = np.load(path, allow_pickle=False)
        if isinstance(file, np.ndarray):
            raise ValueError("it is a single array")
        with file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"Cannot read {path}: {expected} ({error}).") from error
    if missing := {"images", "labels"} - set(arrays):
        raise ValueError(f"{path} lacks {sorted(missing)}: {expected}, got {sorted(arrays)}.")
    images, labels = arrays["images"], arrays["labels"]
    wrong = (
        images.ndim not in (3, 4)
        or labels.shape != images.shape[:1]
        or not np.issubdtype(labels.dtype, np.integer)
        or not np.issubdtype(images.dtype, np.number)
    )
    if wrong:
        got = f"images {images.dtype}{images.shape} and labels {labels.dtype}{labels.shape}"
        raise ValueError(f"{path} has the wrong arrays: {expected}, got {got}.")
    classes = len(np.unique(labels))
    for holds, needed, got in (
        (len(labels) >= 20, "at least 20 images", len(labels)),
        (classes > 1, "labels of at least two classes", classes),
        (labels.min(initial=0) >= 0, "labels from 0 up", labels.min(initial=0)),
        (labels.max(initial=0) < len(labels), "fewer classes than images", labels.max(initial=0)),
        (np.isfinite(images).all(), "finite pixels", "NaN or inf"),
    ):
        if not holds:
            raise ValueError(f"Cannot train on {path}: it needs {needed}, got {got}.")
    return images, labels


def batches(
    data: Data, size: int, seed: int | None = None, part: tuple[int, int] = (0, 1)
) -> Iterator[Batch]:
    """Batches in order; with a seed, shuffled and randomly shifted, without a partial batch.

    With `part=(i, n)`, process i of n gets the i-th of n equal parts of each batch.
    """
    number, parts = part
    own = slice(number * size // parts, (number + 1) * size // parts)
    if seed is None:
        for start in range(0, len(data), size):
            index = np.arange(start, min(start + size, len(data)))[own]
            yield _pick(data, index, size // parts)
        return
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(data))
    for start in range(0, len(data) - size + 1, size):
        moves = rng.integers(0, 3, (size, 2))
        index = order[start : start + size][own]
        yield {"x": _shift(data.x[index], moves[own]), "y": data.y[index]}


def _pick(data: Data, index: np.ndarray, size: int) -> Batch:
    """Take these examples, padded with masked ones if other processes have more."""
    filled = np.concatenate([index, np.zeros(size - len(index), int)])
    return {"x": data.x[filled], "y": data.y[filled], "mask": np.arange(size) < len(index)}


def _shift(x: np.ndarray, moves: np.ndarray) -> np.ndarray:
    """Shift each image by up to one pixel, repeating its border."""
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    height, width = x.shape[1:3]
    return np.stack(
        [p[i : i + height, j : j + width] for p, (i, j) in zip(padded, moves, strict=True)]
    )


class Block(nn.Module):
    """Two convolutions with batch norm, and a shortcut around them."""

    features: int
    stride: int = 1
    track_running_stats: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(N, H, W, C) to (N, H / stride, W / stride, features)."""
        step = (self.stride, self.stride)

        def norm(h: jax.Array) -> jax.Array:
            layer = bnjax.BatchNorm2d(self.features, track_running_stats=self.track_running_stats)
            return layer(h)

        h = nn.relu(norm(nn.Conv(self.features, (3, 3), step, use_bias=False)(x)))
        h = norm(nn.Conv(self.features, (3, 3), use_bias=False)(h))
        if x.shape != h.shape:
            x = norm(nn.Conv(self.features, (1, 1), step, use_bias=False)(x))
        return nn.relu(x + h)


class ResNet(nn.Module):
    """A residual CNN for small images: logits (N, classes)."""

    classes: int = 10
    widths: tuple[int, ...] = (32, 64, 128)
    track_running_stats: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(N, H, W, C) to (N, classes)."""
        x = nn.Conv(self.widths[0], (3, 3), use_bias=False)(x)
        x = bnjax.BatchNorm2d(self.widths[0], track_running_stats=self.track_running_stats)(x)
        x = nn.relu(x)
        for number, width in enumerate(self.widths):
            x = Block(width, 2 if number else 1, self.track_running_stats)(x)
        return nn.Dense(self.classes)(x.mean((1, 2)))


class NnxBlock(nnx.Module):
    """The same block in nnx."""

    def __init__(self, inputs: int, features: int, stride: int = 1, *, rngs: nnx.Rngs) -> None:
        def conv(inputs: int, size: int, stride: int = 1) -> nnx.Conv:
            strides = (stride, stride)
            return nnx.Conv(inputs, features, (size, size), strides, use_bias=False, rngs=rngs)

        convs = [conv(inputs, 3, stride), conv(features, 3)]
        if stride > 1 or inputs != features:
            convs.append(conv(inputs, 1, stride))
        self.convs = nnx.List(convs)
        norms = (bnjax.nnx.BatchNorm2d(features, rngs=rngs) for _ in convs)
        self.norms = nnx.List(norms)

    def __call__(self, x: jax.Array) -> jax.Array:
        """(N, H, W, C) to (N, H / stride, W / stride, features)."""
        first, second, *around = zip(self.convs, self.norms, strict=True)
        h = nnx.relu(first[1](first[0](x)))
        h = second[1](second[0](h))
        for conv, norm in around:
            x = norm(conv(x))
        return nnx.relu(x + h)


class NnxResNet(nnx.Module):
    """The same network in nnx, which needs the number of image channels in advance."""

    def __init__(
        self,
        classes: int = 10,
        widths: tuple[int, ...] = (32, 64, 128),
        *,
        channels: int = 1,
        rngs: nnx.Rngs | None = None,
    ) -> None:
        rngs = rngs or nnx.Rngs(0)
        stem = nnx.Conv(channels, widths[0], (3, 3), use_bias=False, rngs=rngs)
        self.convs = nnx.List([stem])
        self.norms = nnx.List([bnjax.nnx.BatchNorm2d(widths[0], rngs=rngs)])
        pairs = enumerate(zip((widths[0], *widths), widths, strict=False))
        blocks = (NnxBlock(*pair, 2 if number else 1, rngs=rngs) for number, pair in pairs)
        self.blocks = nnx.List(blocks)
        self.heads = nnx.List([nnx.Linear(widths[-1], classes, rngs=rngs)])

    def __call__(self, x: jax.Array) -> jax.Array:
        """(N, H, W, C) to (N, classes)."""
        x = nnx.relu(self.norms[0](self.convs[0](x)))
        for block in self.blocks:
            x = block(x)
        return self.heads[0](x.mean((1, 2)))


def as_linen(model: NnxResNet, variables: Any) -> None:
    """Copy the parameters and statistics of the linen network into the nnx one."""
    lists = {"Block": "blocks", "BatchNorm2d": "norms", "Conv": "convs", "Dense": "heads"}
    arrays = {}
    for (_, *path, leaf), array in flatten_dict(variables).items():
        numbered = (name.rsplit("_", 1) for name in path)  # as "Block_2", "Conv_0"
        keys = (key for kind, number in numbered for key in (lists[kind], int(number)))
        arrays[(*keys, leaf)] = array
    flat = nnx.to_flat_state(nnx.state(model))
    nnx.update(
        model, nnx.from_flat_state((keys, leaf.replace(arrays[keys])) for keys, leaf in flat)
    )


def loss_fn(logits: jax.Array, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Cross entropy and accuracy per example."""
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])
    return loss, {"accuracy": logits.argmax(-1) == batch["y"]}
