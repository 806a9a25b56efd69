"""Fixtures and settings of all tests."""

import os

# Before jax is imported: the tests of several devices run on virtual ones.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import jax
import numpy as np
import pytest
from hypothesis import settings

settings.register_profile("bnjax", deadline=None, derandomize=True, max_examples=10)
settings.load_profile("bnjax")


@pytest.fixture
def rng() -> np.random.Generator:
    """Random numbers that are the same in every run."""
    return np.random.default_rng(0)


@pytest.fixture
def x64():
    """Float64 arrays, inside the test that asks for them alone."""
    with jax.enable_x64(True):
        yield
