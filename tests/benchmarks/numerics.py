"""Error of a training-mode output against float64, beside the peers'.

The input is float32, x ~ N(mean, 1); the error is the largest one of any output, which is of the
order of 1. The running mean is near the batch's (steady), or N(0, 1) whatever the mean (cold).
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from rich.table import Table

from tests.benchmarks import torch_layers
from tests.benchmarks.cases import COLD, FORWARD, STEADY, Case, Inputs, around
from tests.benchmarks.contenders import OURS, available, linen
from tests.benchmarks.environment import Options
from tests.benchmarks.steps import step
from tests.support import oracle

MEANS = (0, 1, 1e2, 1e3, 1e4, 1e5)
CASES = Case((4096, 64)), Case((64, 3)), Case((2, 5)), Case((8, 4, 3, 3), 1)
EXACT_FLAX = "flax.linen, use_fast_variance=False"


def measure(options: Options) -> dict[str, Any]:
    """The largest error of each contender at each mean, in both states."""
    slow = linen(lambda *a, **k: nn.BatchNorm(*a, use_fast_variance=False, **k))
    contenders = {**available(options.quick), EXACT_FLAX: slow}
    rows = []
    for case in (Case((64, 8)), CASES[2]) if options.quick else CASES:
        functions = {name: jax.jit(step(f, case, FORWARD)) for name, f in contenders.items()}
        for mean in MEANS:
            row: dict[str, Any] = {"case": case.name, "mean": mean}
            for state in (STEADY, COLD):
                given = _plain(around(case._replace(state=state), mean))
                outputs = {name: f(*given)["y"] for name, f in functions.items()}
                for name, run in torch_layers.runs(case, given, FORWARD).items():
                    outputs[name] = torch_layers.as_jax(run(), case)["y"]
                exact = _exact(given, case)
                row[state] = {
                    name: float(np.abs(np.asarray(y) - exact).max()) for name, y in outputs.items()
                }
            rows.append(row)
    return {"rows": rows}


def _plain(given: Inputs) -> Inputs:
    """With an output of mean 0 and variance 1."""
    ones, zeros = jnp.ones_like(given.values.scale), jnp.zeros_like(given.values.bias)
    return given._replace(values=given.values._replace(scale=ones, bias=zeros))


def _exact(given: Inputs, case: Case) -> np.ndarray:
    return oracle.batch_norm({}, {}, given.x, given.dy, mutable=True, axis=case.axis).y


def tables(data: dict[str, Any]) -> Iterator[Table]:
    """A row for each mean, a table for each shape: bnjax in both states, peers at their worse."""
    for case in dict.fromkeys(row["case"] for row in data["rows"]):
        rows = [row for row in data["rows"] if row["case"] == case]
        table = Table(title=f"largest output error, float32, x ~ N(mean, 1), {case}")
        peers = [name for name in rows[0][STEADY] if name != OURS]
        ours = (f"{OURS}, {state}" for state in (STEADY, COLD))
        for column in ("mean", *ours, *peers):
            table.add_column(column, justify="right")
        for row in rows:
            mean = f"{row['mean']:.0e}" if row["mean"] > 1 else str(row["mean"])
            errors = [row[STEADY][OURS], row[COLD][OURS]]
            errors += [max(row[STEADY][name], row[COLD][name]) for name in peers]
            table.add_row(mean, *(f"{error:.1e}" for error in errors))
        yield table
