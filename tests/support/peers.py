"""Batch renormalization and running statistics in other libraries, if they are installed."""

import importlib
import importlib.util
import os
import sys
from typing import Any

import pytest

from tests.support.zoo import sbx_layers

INSTALL = {
    "sbx": "pip install --no-deps sbx-rl==0.28.0",
    "keras": "pip install keras==3.15.1",
    "brax": "pip install --no-deps brax==0.14.2",
}


def needed(package: str) -> None:
    """Skip a test if its package is not installed."""
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed: {INSTALL[package]}")


def sbx() -> Any:
    """The class `BatchRenorm` of sbx-rl."""
    needed("sbx")
    return sbx_layers().BatchRenorm


def keras() -> Any:
    """Keras, on JAX."""
    needed("keras")
    os.environ.setdefault("KERAS_BACKEND", "jax")
    return importlib.import_module("keras")


def brax() -> Any:
    """`running_statistics` from brax, without importing the rest and its simulators."""
    needed("brax")
    if "brax" not in sys.modules:
        spec = importlib.util.find_spec("brax")
        assert spec is not None
        sys.modules["brax"] = importlib.util.module_from_spec(spec)  # without running it
    return importlib.import_module("brax.training.acme.running_statistics")
