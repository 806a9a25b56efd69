"""Thirty healthy training runs have no findings, except that some are young."""

import dataclasses
import itertools
from typing import Any

import pytest

from bnjax.models.batches import layout
from bnjax.models.diagnosis import report_of
from bnjax.models.diagnosis.evidence import Evidence
from bnjax.models.diagnosis.measuring import Measured, measured
from tests.support.architectures import (
    NAMES,
    batches,
    compiled,
    loss_fn,
    train,
    train_nnx,
)

pytestmark = pytest.mark.quick_compile

LINEN = list(itertools.product(NAMES, (10, 20, 30, 50, 100, 200, 500)))
NNX = list(itertools.product(NAMES, (10, 30, 100)))
# Statistics of so few steps hold over 5% of their initial values: 0.9^28.
YOUNG = 28


def findings(seen: Measured, steps: int, record: dict[str, Any]) -> dict[str, list[str]]:
    """The kinds of findings, by what is known besides the batches."""
    blind = dataclasses.replace(seen, losses={"train": {}, "eval": {}})
    return {
        f"{loss} {known}": [x.kind for x in report_of(Evidence(given, *more)).findings]
        for loss, given in (("without loss_fn", blind), ("with loss_fn", seen))
        for known, more in (
            ("alone", (None, {})),
            ("and steps", (steps, {})),
            ("and history", (None, record)),
            ("and both", (steps, record)),
        )
    }


def check(found: dict[str, list[str]], steps: int) -> None:
    if steps <= YOUNG:  # the evaluation is not right yet, and the diagnosis says why
        found = {known: [k for k in kinds if k != "lagging"] for known, kinds in found.items()}
    assert not any(found.values()), found


@pytest.mark.parametrize(("name", "steps"), LINEN)
def test_a_healthy_training_in_linen(name, steps):
    seed = LINEN.index((name, steps))
    record: dict[str, Any] = {}
    data = list(batches(steps, 16 if seed % 2 else 32, seed, raw=seed % 3 == 0))
    state = train(name, data, zero=seed % 2 == 0, seed=seed, record=record)
    seen = measured(compiled(name)[0], state.variables, data[-8:], loss_fn, layout(), {})
    check(findings(seen, steps, record), steps)


@pytest.mark.parametrize(("name", "steps"), NNX)
def test_a_healthy_training_in_nnx(name, steps):
    seed = NNX.index((name, steps))
    data = list(batches(steps, 32, seed, raw=seed % 2 == 0))
    model = train_nnx(name, data, zero=seed % 2 == 1, seed=seed)
    check(findings(measured(model, None, data[-8:], loss_fn, layout(), {}), steps, {}), steps)
