"""Faults of nnx models are found like those of linen models."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import bnjax
from tests.support.diagnosed import DATA, NnxNet, diagnose, found

pytestmark = pytest.mark.quick_compile


@pytest.fixture(scope="module")
def fitted() -> NnxNet:
    """An nnx network in eval mode that is untrained, except for its statistics."""
    model = NnxNet(nnx.Rngs(0))
    model.eval()
    nnx.update(model, bnjax.recalibrate(model, None, DATA))
    return model


def test_a_healthy_nnx_model(fitted):
    assert diagnose(None, model=fitted).healthy
    assert diagnose(nnx.state(fitted), model=fitted).healthy


def test_an_nnx_model_in_training_mode_warns_and_runs_in_eval_mode(fitted):
    # Each model that was just created or trained gave the error "statistics move in eval".
    model = nnx.clone(fitted)
    model.train()
    report = diagnose(None, model=model)
    assert found(report) == [("warning", "in training mode")]
    (finding,) = report.findings
    assert finding.layers == ("norms/0", "norms/1", "norms/2")
    assert finding.cause.startswith("Is this how you evaluate it? ")
    assert finding.repair.startswith("model.eval()")
    assert report.layers == diagnose(None, model=fitted).layers
    new = diagnose(None, model=NnxNet(nnx.Rngs(0)))
    assert found(new) == [("error", "never updated"), ("warning", "in training mode")]


class Told(nnx.Module):
    """A layer with the mode passed to each call, whatever `.train()` and `.eval()` say."""

    def __init__(self) -> None:
        self.norm = nnx.BatchNorm(3, rngs=nnx.Rngs(0))

    def __call__(self, x, running):
        return self.norm(x, use_running_average=running)


@pytest.mark.parametrize("running", [True, False])
def test_a_mode_passed_to_the_call_is_that_of_the_evaluation(running):
    model, x = Told(), np.random.default_rng(0).normal(size=(64, 3)).astype(np.float32)
    nnx.update(model, bnjax.recalibrate(model, None, [x], apply_kwargs={"running": True}))
    report = bnjax.diagnose(model, None, [x], apply_kwargs={"running": running})
    assert found(report) == ([] if running else [("error", "eval depends on the batch")])
    if not running:
        assert "without use_running_average=False" in report.findings[0].repair


def test_frozen_nnx_layers_are_left_out(fitted):
    model = nnx.clone(fitted)
    bnjax.nnx.freeze(model)
    model.train()
    assert diagnose(None, model=model).healthy


def test_nnx_updates_thrown_away_and_shifted_data(fitted):
    fresh = NnxNet(nnx.Rngs(0))
    fresh.eval()
    assert found(diagnose(None, model=fresh)) == [("error", "never updated")]
    shifted = [{**batch, "x": 3 * batch["x"] + 1} for batch in DATA]
    report = diagnose(None, shifted, fitted)
    assert found(report) == [("error", "data differ from training data")]
    assert report.findings[0].layer == "norms/0"


def test_nnx_layers_that_are_not_tracked():
    def untracked(features, momentum, rngs):
        return bnjax.nnx.BatchNorm1d(features, track_running_stats=False, rngs=rngs)

    class Small(nnx.Module):
        def __init__(self, rngs):
            self.norm = untracked(3, 0.1, rngs)

        def __call__(self, x):
            return self.norm(x)

    model = Small(nnx.Rngs(0))
    model.eval()
    x = np.random.default_rng(0).normal(size=(32, 3)).astype(np.float32)
    report = bnjax.diagnose(model, None, [x])
    assert found(report) == [("error", "eval depends on the batch")]


def test_nnx_devices_that_never_communicated(fitted):
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), nnx.state(fitted))
    assert diagnose(stacked, model=fitted).healthy
    stats = nnx.filter_state(stacked, nnx.BatchStat)
    apart = jax.tree.map(lambda leaf: leaf * jnp.array([[0.5], [1.5]]), stats)
    others = nnx.filter_state(nnx.state(fitted), nnx.Not(nnx.BatchStat))
    report = diagnose(nnx.merge_state(others, apart), model=fitted)
    assert found(report) == [("error", "devices disagree")]
