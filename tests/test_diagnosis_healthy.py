"""Healthy training runs have no findings, except that some are young."""

import dataclasses
import itertools
from typing import Any

import jax
import numpy as np
import optax
import pytest
from flax import linen as nn

import bnjax
from bnjax.models.batches import layout
from bnjax.models.diagnosis import report_of
from bnjax.models.diagnosis.evidence import Evidence
from bnjax.models.diagnosis.measuring import Measured, measured
from bnjax.policies import Renorm
from bnjax.training import init_state, train_step
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


class One(nn.Module):
    """A network with a single batch norm, after a layer that the raw data move."""

    using: Any = None

    @nn.compact
    def __call__(self, x):
        x = bnjax.BatchNorm1d(using=self.using, name="norm")(nn.Dense(8, name="dense")(x))
        return nn.Dense(1)(nn.relu(x))[:, 0]


def trained_one(net: One, steps: int) -> tuple[Any, Any]:
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(32, 6)) * 2 + 3).astype(np.float32)
    state = init_state(net, optax.adam(1e-2), jax.random.key(0), x)
    step = train_step(lambda y, batch: (y - batch["x"][:, 0]) ** 2)
    for _ in range(steps):
        state, _ = step(state, {"x": x})
    return state.variables, x


@pytest.mark.parametrize("using", [None, Renorm(3.0, 5.0)])
@pytest.mark.parametrize(("steps", "kinds"), [(20, ["lagging"]), (40, []), (80, [])])
def test_a_single_layer_that_trails_its_weights_is_not_blamed_on_the_data(using, steps, kinds):
    net = One(using)
    variables, x = trained_one(net, steps)
    inputs = x @ np.asarray(variables["params"]["dense"]["kernel"], np.float64)
    off = np.asarray(variables["batch_stats"]["norm"]["mean"]) - inputs.mean(0)
    assert np.sqrt(np.mean((off / inputs.std(0)) ** 2)) > 0.05  # it does trail
    for known in (None, steps):
        report = bnjax.diagnose(net, variables, [x] * 3, steps=known)
        assert [finding.kind for finding in report.findings] == kinds


def test_a_single_layer_still_shows_other_data_and_other_weights():
    net = One()
    variables, x = trained_one(net, 200)
    assert bnjax.diagnose(net, variables, [x] * 3).healthy
    for other in (3 * x + 1, 255 * x, x + 2, x / 4, -x):
        (finding,) = bnjax.diagnose(net, variables, [other] * 3).findings
        assert finding.kind == "data differ from training data"
    dense = variables["params"]["dense"]["kernel"]
    bias = 0.45 * (x @ dense).std(0)  # too little to tell the weights from the data
    bias += variables["params"]["dense"]["bias"]
    params = {**variables["params"], "dense": {"kernel": dense, "bias": bias}}
    moved = {**variables, "params": params}
    (finding,) = bnjax.diagnose(net, moved, [x] * 3).findings
    assert finding.kind == "statistics belong to other weights"
    assert finding.cause == (
        "The weights are an average (EMA, SWA), of another step, or moved faster than the "
        "statistics follow, or the data are others. Pass `history=` of the training to find out."
    )
    (finding,) = bnjax.diagnose(net, moved, [x] * 3, steps=200).findings
    assert finding.kind == "data differ from training data"
