"""Draw each picture from its numbers, with a fingerprint of the numbers and the drawing code."""

import hashlib
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import domains
import joint_training
import shifted_data
import small_batches
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from bnjax import plotting
from tests.benchmarks import picture as benchmark

HERE = Path(__file__).parent
KEY = "fingerprint"

summary = benchmark.summary
PICTURES: dict[str, Callable[[Any, Path], None]] = {
    "statistics": lambda data, path: plotting.plot_statistics(
        data["record"], path, steps=data["steps"]
    ),
    "diagnosis": lambda data, path: plotting.plot_layers(path=path, **data),
    "diagnosis_resnet50": lambda data, path: plotting.plot_layers(path=path, **data),
    "joint_training": joint_training.draw,
    "domains": domains.draw,
    "shifted_data": shifted_data.draw,
    "small_batches": small_batches.draw,
    "benchmark": benchmark.draw_summary,
}


def source(name: str) -> Path:
    """The file with the numbers of a picture."""
    return HERE / f"{name}.json"


def picture(name: str) -> Path:
    """The file of a picture."""
    return HERE / f"{name}.png"


def draw(name: str) -> None:
    """Draw a picture from its numbers."""
    path = picture(name)
    PICTURES[name](json.loads(source(name).read_text()), path)
    info = PngInfo()
    info.add_text(KEY, fingerprint(name))
    with Image.open(path) as drawn:
        drawn.convert("RGB").save(path, pnginfo=info, optimize=True)


def fingerprint(name: str) -> str:
    """A hash that changes with the numbers and the drawing code of a picture."""
    code = {
        "joint_training": inspect.getsource(joint_training.draw),
        "domains": inspect.getsource(domains.draw),
        "shifted_data": inspect.getsource(shifted_data.draw),
        "small_batches": inspect.getsource(small_batches.draw),
        "benchmark": inspect.getsource(benchmark),
    }
    text = source(name).read_text() + code.get(name, inspect.getsource(plotting))
    return hashlib.sha256(text.encode()).hexdigest()


def rounded(data: Any) -> Any:
    """The numbers, rounded to the digits that a picture can show."""
    if isinstance(data, dict):
        return {name: rounded(value) for name, value in data.items()}
    if isinstance(data, list | tuple):
        return [rounded(value) for value in data]
    return float(f"{data:.4g}") if isinstance(data, float) else data
