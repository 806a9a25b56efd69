"""Outputs, statistics and gradients on the device, against float64 on the host."""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from flax import linen as nn

import bnjax
from tests.benchmarks.cases import BACKWARD, COLD, EVAL, MASK, STEADY, Case, Inputs, around
from tests.benchmarks.contenders import OURS, REFERENCE, Apply, linen
from tests.benchmarks.steps import step
from tests.support import oracle

_MOMENTUM = 0.5  # so that an error of the batch's statistics is seen in the new ones
LAYERS = {
    OURS: linen(functools.partial(bnjax.linen.BatchNorm, momentum=_MOMENTUM)),
    REFERENCE: linen(functools.partial(nn.BatchNorm, momentum=_MOMENTUM)),
}
PARTS = "eval", "y", "mean", "var", "dx", "dscale", "dbias"
# Of the largest error of each part, as a part of the largest value. Statistics of bfloat16 need
# not be better than the rounding of the values that they are of.
BOUNDS = {
    "float32": dict.fromkeys(PARTS, 2e-5),
    "bfloat16": dict.fromkeys(PARTS, 2e-4) | dict.fromkeys(("eval", "y", "dx"), 1e-2),
}
_NHWC, _NCHW = Case((8, 14, 14, 64)), Case((8, 64, 14, 14), 1)
_HALF = _NHWC._replace(dtype="bfloat16")


def checks(quick: bool) -> Iterator[tuple[Case, float]]:
    """Cases, and the mean of their values, whose deviation is 1."""
    if quick:
        yield from ((case, 10) for case in (Case((8, 4, 4, 8)), Case((32, 8), dtype="bfloat16")))
        return
    for state in (STEADY, COLD):
        for case, means in ((_NHWC, (0, 10, 1e3, 1e5)), (_HALF, (0, 10)), (_NCHW, (1e3,))):
            yield from ((case._replace(state=state), mean) for mean in means)
    yield _NHWC._replace(variant=MASK), 10
    yield _HALF._replace(variant=MASK), 10
    yield Case((32, 14, 14, 64)), 1e3  # beyond 4,096 rows, XLA's programs are others
    yield Case((64, 3)), 1e3


def measure(quick: bool, layers: dict[str, Apply] = LAYERS) -> list[dict[str, Any]]:
    """A row for each check: the errors of all, and what of bnjax's is wrong."""
    rows = []
    for case, mean in checks(quick):
        given = around(case, mean)
        exact = _exact(case, given)
        found = {name: _errors(_results(f, case, given), exact) for name, f in layers.items()}
        bounds = BOUNDS[case.dtype]
        wrong = [part for part in PARTS if not found[OURS][part] <= bounds[part]]
        row = {"case": case.name, "dtype": case.dtype, "state": case.state, "mean": mean}
        rows.append({**row, "errors": found, "wrong": wrong})
    return rows


@functools.cache
def _program(apply: Apply, case: Case, which: str) -> Any:
    return jax.jit(step(apply, case, which))


def _results(apply: Apply, case: Case, given: Inputs) -> dict[str, Any]:
    same = case._replace(state=STEADY)  # the state is in the data alone
    evaluated, trained = (_program(apply, same, which)(*given) for which in (EVAL, BACKWARD))
    dscale, dbias, dx, _ = trained["gradients"]
    found = evaluated["y"], trained["y"], *trained["moved"], dx, dscale, dbias
    return dict(zip(PARTS, found, strict=True))


def _exact(case: Case, given: Inputs) -> dict[str, Any]:
    scale, bias, mean, var = map(np.asarray, given.values)
    params, stats = {"scale": scale, "bias": bias}, {"mean": mean, "var": var}
    settings = {"axis": case.axis, "momentum": 1 - _MOMENTUM, "correction": 0, "mask": given.mask}
    run = functools.partial(oracle.batch_norm, params, stats, given.x, given.dy, **settings)
    trained, evaluated = run(mutable=True), run(mutable=False)
    statistics, gradients = trained.batch_stats, trained.dparams
    found = evaluated.y, trained.y, statistics["mean"], statistics["var"], trained.dx
    return dict(zip(PARTS, (*found, gradients["scale"], gradients["bias"]), strict=True))


def _errors(found: dict[str, Any], exact: dict[str, Any]) -> dict[str, float]:
    def one(part: str) -> float:
        error = np.abs(np.asarray(found[part], np.float64) - exact[part])
        return float(np.max(error) / np.max(np.abs(exact[part])))

    return {part: one(part) for part in PARTS}


def faults(rows: list[dict[str, Any]]) -> list[str]:
    """What of bnjax's is wrong, in words."""
    return [
        f"{name(row)}: {part} is off by {row['errors'][OURS][part]:.1e} of its largest value, "
        f"at most {BOUNDS[row['dtype']][part]:.0e} is right"
        for row in rows
        for part in row["wrong"]
    ]


def name(row: dict[str, Any]) -> str:
    """The case of a row, for people."""
    state = "" if row["case"].endswith(row["state"]) else f" {row['state']}"
    return f"{row['case']}{state}, {row['dtype']}, mean {row['mean']:g}"
