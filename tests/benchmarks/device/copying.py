"""What a device can move at most: the time of a copy, and what its caches hold."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from tests.benchmarks.device import cuda
from tests.benchmarks.device.clock import Queue
from tests.benchmarks.timing import medians

# Of the last cache before memory, in MB, by a part of the device's name.
_CACHES = {
    "B200": 126,
    "H200": 50,
    "H100": 50,
    "A100": 40,
    "L40": 96,
    "L4": 48,
    "A10": 6,
    "V100": 6,
    "T4": 4,
    "RTX 4090": 72,
}


def measure(sizes: Sequence[int], queue: Queue) -> dict[str, Any]:
    """Bytes a second of y = x + 1 at each size, and the best of them."""
    copy = jax.jit(lambda x: x + 1)
    found = {}
    for size in sizes:
        x = jnp.zeros(size // 4, jnp.float32)
        times = medians(queue.turns({"copy": lambda x=x: copy(x)}))
        found[size] = 2 * x.nbytes / times["copy"]
    return {"by size": found, "bytes/s": max(found.values()), "cache": _cache()}


def _cache() -> int | None:
    """Bytes, as torch says, or as known by the device's name."""
    kind = jax.devices()[0].device_kind
    known = (size * 10**6 for name, size in _CACHES.items() if name in kind)
    return cuda.cache_size() or next(known, None)
