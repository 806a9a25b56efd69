"""Fixtures and settings of all tests."""

import atexit
import gc
import os
import shutil
import tempfile

# Before jax is imported: the tests of several devices run on virtual ones.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
# What one test or process has compiled, the others need not; the workers inherit the folder.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="bnjax-tests-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

import jax
import numpy as np
import pytest
from hypothesis import settings

from tests.support import compilers

settings.register_profile("bnjax", deadline=None, derandomize=True, max_examples=10)
settings.load_profile("bnjax")
compilers.install()


def pytest_collection_finish() -> None:
    """Let the collector of garbage look less often, and never at what stays, as modules do."""
    gc.freeze()
    gc.set_threshold(50_000)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item):
    """Compile a marked test and its fixtures quickly; `quick_compile(False)` takes a test out."""
    mark = item.get_closest_marker("quick_compile")
    with compilers.quickly(mark is not None and mark.args != (False,)):
        return (yield)


@pytest.fixture
def rng() -> np.random.Generator:
    """Random numbers that are the same in every run."""
    return np.random.default_rng(0)


@pytest.fixture
def x64():
    """Float64 arrays, inside the test that asks for them alone."""
    with jax.enable_x64(True):
        yield
