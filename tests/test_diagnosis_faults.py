"""Each fault of `examples/why_is_eval_bad.py` is found in each of three architectures."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import bnjax
from bnjax.training import TrainState
from tests.support.architectures import (
    NAMES,
    Net,
    averaged,
    batches,
    compiled,
    fresh,
    loss_fn,
    train,
)

pytestmark = pytest.mark.quick_compile

STEPS = 80
each_net = pytest.mark.parametrize("name", NAMES)


@dataclasses.dataclass
class Trained:
    """A good training run, with its record and all its states."""

    state: TrainState
    data: list[Any]
    record: dict[str, Any]
    states: list[TrainState]

    @property
    def variables(self) -> dict[str, Any]:
        return dict(self.state.variables)

    @property
    def stats(self) -> Any:
        return self.state.batch_stats


@functools.cache
def trained(name: str) -> Trained:
    data, states, record = list(batches(STEPS, 64, seed=3)), [], {}

    def kept(state: TrainState) -> TrainState:
        states.append(state)
        return state

    state = train(name, data, seed=3, record=record, each=kept)
    return Trained(state, data, record, states)


def with_weight(name: str, weight: float, dtype: Any = jnp.float32) -> dict[str, Any]:
    """The variables after training with a momentum that gives a new batch this weight."""
    run = trained(name)
    stats = old = fresh(name)["batch_stats"]
    for state in run.states:  # statistics do not affect training, and each batch's are known
        alone = jax.tree.map(lambda a, b: a + (b - a) / 0.1, old, state.batch_stats)
        stats = jax.tree.map(
            lambda a, b: ((1 - weight) * a + weight * b).astype(dtype), stats, alone
        )
        old = state.batch_stats
    return {**run.variables, "batch_stats": stats}


def found(
    name: str, variables: Any, data: Any = None, *, model: Any = None, **options: Any
) -> tuple[str, str]:
    data = trained(name).data[-8:] if data is None else data
    net = compiled(name)[0] if model is None else model
    report = bnjax.diagnose(net, variables, data, loss_fn=loss_fn, **options)
    (finding,) = report.findings
    return finding.kind, finding.layer


def changed(name: str, change: Any) -> list[Any]:
    return [{**batch, "x": change(batch["x"])} for batch in trained(name).data[-8:]]


@each_net
def test_faults_of_the_statistics(name):
    run = trained(name)
    bad: dict[str, Any] = {"never updated": fresh(name)["batch_stats"]}
    bad["statistics poisoned"] = jax.tree.map(lambda leaf: leaf.at[0].set(jnp.nan), run.stats)
    parts = [jax.tree.map(lambda leaf, n=n: leaf * (1 + n / 4), run.stats) for n in range(4)]
    bad["devices disagree"] = jax.tree.map(lambda *rows: jnp.stack(rows), *parts)
    for kind, stats in bad.items():
        assert found(name, {**run.variables, "batch_stats": stats})[0] == kind


@each_net
@pytest.mark.filterwarnings("ignore:momentum=0.01:UserWarning")  # the layer warns as well
@pytest.mark.parametrize(
    ("weight", "kind"), [(0.001, "lagging"), (0.99, "momentum looks inverted")]
)
@pytest.mark.parametrize("known", [True, False], ids=["steps", "alone"])
def test_faults_of_the_momentum(name, weight, kind, known):
    variables, steps = with_weight(name, weight), STEPS if known else None
    with bnjax.override("**", momentum=round(1 - weight, 3)):
        assert found(name, variables, steps=steps)[0] == kind


@each_net
def test_faults_of_the_data(name):
    run = trained(name)
    kind, layer = found(name, run.variables, changed(name, lambda x: x / 4 + 1))
    assert (kind, layer) == ("data differ from training data", "first")
    assert found(name, run.variables, list(batches(8, 2, 3)))[0] == "batch too small"
    tiny = changed(name, lambda x: x / 1e5)
    scaled = bnjax.recalibrate(compiled(name)[0], run.variables, tiny)
    assert found(name, scaled, tiny) == ("eps dominates", "first")


@each_net
@pytest.mark.parametrize("known", [True, False], ids=["history", "alone"])
def test_averaged_weights(name, known):
    run = trained(name)
    params = averaged([state.params for state in run.states[: STEPS // 2]])
    variables = {"params": params, "batch_stats": run.stats}
    options = {"history": run.record} if known else {}
    assert found(name, variables, **options)[0] == "statistics belong to other weights"


@each_net
def test_an_evaluation_that_trains(name):
    run = trained(name)
    kwargs = {"train": True, "mutable": ["batch_stats"]}
    assert found(name, run.variables, apply_kwargs=kwargs)[0] == "statistics move in eval"
    assert found(name, run.variables, apply_kwargs={"train": True})[0] == (
        "eval depends on the batch"
    )


@each_net
def test_statistics_that_are_not_tracked(name):
    kind = bnjax.BatchNorm1d if name == "mlp" else bnjax.BatchNorm2d
    net = Net(name, lambda running, name: kind(track_running_stats=False, name=name))
    params = {"params": trained(name).state.params}
    assert found(name, params, model=net)[0] == "eval depends on the batch"


@each_net
def test_statistics_in_half_precision(name):
    variables = with_weight(name, 0.005, jnp.bfloat16)
    with bnjax.override("**", momentum=0.995):
        report = bnjax.diagnose(compiled(name)[0], variables, trained(name).data[-8:])
    assert "half-precision statistics" in [finding.kind for finding in report.findings]
