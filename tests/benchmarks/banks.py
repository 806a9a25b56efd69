"""What banks, and a scale and bias for each example, cost beside the plain layer."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

import bnjax
from tests.benchmarks.cases import BACKWARD, DTYPES, FORWARD, Case, inputs
from tests.benchmarks.environment import Options
from tests.benchmarks.timing import compiled, geometric_mean, medians, ratio, turns

PLAIN, STATIC, CONDITIONAL = "plain", "one bank by name", "scale and bias per example"
BANKS = (1, 2, 4, 8)
SHAPES = ((32, 28, 28, 128), (32, 7, 7, 512), (4096, 512))


def _mixed(number: int) -> str:
    return f"{number} mixed"


NAMES = (STATIC, CONDITIONAL, *map(_mixed, BANKS))


def measure(options: Options) -> dict[str, Any]:
    """A row for each case and pass, of rounds of times by what is done."""
    rows = []
    for shape in [(8, 4, 4, 8), (8, 8)] if options.quick else SHAPES:
        for dtype in DTYPES:
            case = Case(shape, dtype=dtype)
            given = inputs(case)
            banks = {n: np.random.default_rng(0).integers(0, n, shape[0], np.int32) for n in BANKS}
            arguments = given.x, given.dy, jax.tree.map(jnp.asarray, banks)
            for which in (FORWARD, BACKWARD):
                steps = {name: _step(name, case, which) for name in (PLAIN, *NAMES)}
                rounds = turns(compiled(steps, arguments), options.rounds)
                row = {"case": case.name, "dtype": dtype, "pass": which, "rounds": rounds}
                rows.append(row | {"milliseconds": medians(rounds)})
    return {"rows": rows}


def _step(name: str, case: Case, which: str) -> Callable[..., Any]:
    """A training step of the layer: output and statistics, and perhaps all gradients."""
    examples, channels = case.shape[0], case.shape[-1]
    number = {_mixed(n): n for n in BANKS} | {STATIC: max(BANKS)}
    params, stats = bnjax.init(channels, banks=number.get(name))
    each = {"scale": jnp.ones((examples, channels)), "bias": jnp.zeros((examples, channels))}
    given = each if name == CONDITIONAL else {}

    def bank(banks: dict[int, jax.Array]) -> int | jax.Array | None:
        return 1 if name == STATIC else banks[number[name]] if name in number else None

    def forward(x: jax.Array, banks: Any, params: Any, given: Any) -> Any:
        return bnjax.batch_norm(params, stats, x, bank=bank(banks), mutable=True, **given)

    def both(x: jax.Array, dy: jax.Array, banks: Any) -> Any:
        def step(x: jax.Array, params: Any, given: Any) -> Any:
            return forward(x, banks, params, given)

        y, pull, moved = jax.vjp(step, x, params, given, has_aux=True)
        return y, moved, pull(dy)

    alone = functools.partial(forward, params=params, given=given)
    return both if which == BACKWARD else lambda x, dy, banks: alone(x, banks)


def tables(data: dict[str, Any]) -> Iterator[Table]:
    """The ratios to the plain layer, and their geometric means."""
    title = "ratio to the plain layer"
    table = Table("pass", "dtype", "case", f"{PLAIN}, ms", *NAMES, title=title)
    for which in (FORWARD, BACKWARD):
        for dtype in DTYPES:
            rows = [row for row in data["rows"] if (row["pass"], row["dtype"]) == (which, dtype)]
            for row in rows:
                cells = (f"{_ratio(row, name):.2f}" for name in NAMES)
                own = f"{row['milliseconds'][PLAIN]:.2f}"
                table.add_row(which, dtype, row["case"], own, *cells)
            means = (geometric_mean(_ratio(row, name) for row in rows) for name in NAMES)
            table.add_row(which, dtype, "all", "", *(f"{mean:.2f}" for mean in means))
    yield table


def _ratio(row: dict[str, Any], name: str) -> float:
    return ratio(row["rounds"][name], row["rounds"][PLAIN])
