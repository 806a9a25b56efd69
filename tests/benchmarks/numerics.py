"""Error of a training-mode output against float64, beside the peers'.

The input is float32, x ~ N(mean, 1), of shape (4096, 64); the error is the largest one of any
output, which is of the order of 1.
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from rich.table import Table

from tests.benchmarks import torch_layers
from tests.benchmarks.cases import FORWARD, Case, Inputs, inputs, step
from tests.benchmarks.contenders import Values, available, linen
from tests.benchmarks.environment import Options

MEANS = (0, 1e2, 1e3, 1e4, 1e5)
EXACT_FLAX = "flax.linen, use_fast_variance=False"


def measure(options: Options) -> dict[str, Any]:
    """The largest error of each contender at each mean."""
    case = Case((64, 8) if options.quick else (4096, 64))
    given = inputs(case)
    channels = case.shape[-1]
    ones, zeros = jnp.ones(channels), jnp.zeros(channels)
    values = Values(ones, zeros, zeros, ones)
    slow = linen(lambda *a, **k: nn.BatchNorm(*a, use_fast_variance=False, **k))
    contenders = {**available(), EXACT_FLAX: slow}
    functions = {name: jax.jit(step(f, case, FORWARD)) for name, f in contenders.items()}
    rng = np.random.default_rng(0)
    rows = []
    for mean in MEANS:
        x = jnp.asarray(rng.normal(mean, 1, case.shape), jnp.float32)
        shifted = Inputs(values, x, given.dy, None, None)
        outputs = {name: f(*shifted)["y"] for name, f in functions.items()}
        for name, run in torch_layers.runs(case, shifted, FORWARD).items():
            outputs[name] = torch_layers.as_jax(run(), case)["y"]
        errors = {name: _error(y, x) for name, y in outputs.items()}
        rows.append({"mean": mean, "errors": errors})
    return {"shape": case.shape, "rows": rows}


def _error(y: jax.Array, x: jax.Array) -> float:
    exact = np.asarray(x, np.float64)
    exact = (exact - exact.mean(0)) / np.sqrt(exact.var(0) + 1e-5)
    return float(np.abs(np.asarray(y) - exact).max())


def tables(data: dict[str, Any]) -> Iterator[Table]:
    """A row for each mean."""
    table = Table(title="largest output error, float32, x ~ N(mean, 1)")
    names = list(data["rows"][0]["errors"])
    for column in ("mean", *names):
        table.add_column(column, justify="right")
    for row in data["rows"]:
        mean = f"{row['mean']:.0e}" if row["mean"] else "0"
        table.add_row(mean, *(f"{row['errors'][name]:.1e}" for name in names))
    yield table
