"""Fixtures and settings for all tests."""

import atexit
import gc
import os
import shutil
import tempfile
import types
from collections.abc import Iterator
from typing import Any

# Before importing jax: tests with several devices run on virtual ones.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
# Share compiled programs between tests and processes; workers inherit the folder.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="bnjax-tests-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

import chex
import jax
import numpy as np
import pytest
from hypothesis import settings

from tests.support import compilers

# Half a minute or more: start first, so that no worker has to finish one alone.
LONG = ("test_examples.py", "test_multihost.py", "test_benchmarks.py", "test_programs.py")

settings.register_profile("bnjax", deadline=None, derandomize=True, max_examples=10)
settings.load_profile("bnjax")
compilers.install()


def pytest_collection_finish() -> None:
    """Collect garbage less often, and never among modules."""
    gc.freeze()
    gc.set_threshold(50_000)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the slowest test files first."""
    items.sort(key=lambda item: item.path.name not in LONG)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give each worker whole files where possible; idle workers steal from others."""
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log) if config.getoption("dist") == "load" else None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item):
    """Compile a marked test and its fixtures quickly; `quick_compile(False)` opts out."""
    mark = item.get_closest_marker("quick_compile")
    with compilers.quickly(mark is not None and mark.args != (False,)):
        return (yield)


@pytest.fixture
def rng() -> np.random.Generator:
    """A random generator with a fixed seed."""
    return np.random.default_rng(0)


@pytest.fixture(autouse=True, scope="module")
def forget_programs() -> Iterator[None]:
    """Release the traces and programs of each file; kept, they grow to 10 GB."""
    yield
    jax.clear_caches()


@pytest.fixture(autouse=True)
def no_traces_so_far() -> None:
    """Let `chex.assert_max_traces` count the traces of each test case separately."""
    chex.clear_trace_counter()


@pytest.fixture
def variant(request: pytest.FixtureRequest) -> Any:
    """The `self.variant` of `chex.variants`, for the variant named by the parameter."""
    held: Any = types.SimpleNamespace()
    variants: Any = chex.variants(lambda self: self.variant(len), **{request.param: True})
    (test,) = variants
    test(held)
    return held.variant


@pytest.fixture
def x64():
    """Enable float64 arrays in a test."""
    with jax.enable_x64(True):
        yield
