"""bnjax on the accelerator that jax finds: `python -m tests.benchmarks --only device`.

Numbers are compared to float64 first; then come a network, the bandwidth of a copy, and layers in
the order of what they say, as long as there is time: all of it takes less than eight minutes.
"""

from typing import Any

import jax

from tests.benchmarks.device import copying, cuda, exactness, layers, network
from tests.benchmarks.device.clock import Budget, Queue
from tests.benchmarks.device.plan import plan
from tests.benchmarks.device.report import tables as tables
from tests.benchmarks.environment import Options


def measure(options: Options) -> dict[str, Any]:
    """All rows, what was skipped, and whatever of bnjax's is wrong."""
    planned = plan(options)
    budget = Budget(planned.budget)
    queue = Queue(planned.rounds, planned.seconds, cuda.wait)
    exact = exactness.measure(options.quick)
    blocks = network.measure(planned, queue, budget)
    copies = copying.measure(planned.copies, queue)
    rows = layers.measure(planned, queue, budget)
    return {
        "device": jax.devices()[0].device_kind,
        "versions": [f"jax {jax.__version__}", *filter(None, [cuda.version()])],
        "sizes": planned.name,
        "exactness": exact,
        "network": blocks,
        "copy": copies,
        "layers": rows,
        "skipped": budget.skipped,
        "seconds": planned.budget - budget.left,
        "wrong": [*exactness.faults(exact), *layers.faults(rows)],
    }
