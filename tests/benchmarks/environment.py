"""What must be set before jax is imported: the same for every contender."""

import os
import resource
import sys
from typing import NamedTuple

import numpy as np

# glibc gives large buffers back to the kernel after each call, and each thread has a heap of its
# own: without these settings, and `touch_heap`, a benchmark measures page faults (flax.linen in
# bfloat16 then takes three times as long). They are read when a process starts.
SETTINGS = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(2**32),
    "MALLOC_TRIM_THRESHOLD_": str(2**32),
    "MALLOC_TOP_PAD_": str(2**28),
    "GOMP_SPINCOUNT": "10000",  # or torch's threads wait busily while the next contender runs
    "KERAS_BACKEND": "jax",
}


class Options(NamedTuple):
    """How thorough a run is: timings of each contender, and whether it only tries everything.

    What is compiled without a device is compiled for these platforms.
    """

    rounds: int = 15
    quick: bool = False
    platforms: tuple[str, ...] = ()


_HEAP = 1.5e9  # bytes: more than any case needs


def touch_heap() -> None:
    """Let the kernel give this process its memory now, for all contenders alike."""
    np.ones(int(_HEAP), np.uint8)


def page_faults() -> int:
    """How many pages the kernel has given so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def settle(module: str) -> None:
    """Start this process again as `python -m module` unless it was started with the settings."""
    if any(os.environ.get(name) != value for name, value in SETTINGS.items()):
        program = [sys.executable, "-m", module, *sys.argv[1:]]
        os.execve(sys.executable, program, os.environ | SETTINGS)
