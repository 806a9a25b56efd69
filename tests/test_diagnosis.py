"""Each fault that is injected into a small trained network is found, and nothing else."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import bnjax
from bnjax.core.checks import warn_once
from bnjax.training import TrainState, history, train_step
from tests.support.diagnosed import (
    DATA,
    NET,
    STEPS,
    FlaxNet,
    Net,
    batches,
    compiled,
    diagnose,
    found,
    loss_fn,
    train,
)

pytestmark = pytest.mark.quick_compile

PATHS = ["BatchNorm2d_0", "BatchNorm2d_1", "BatchNorm1d_0"]


@pytest.fixture(scope="module")
def trained() -> dict[str, Any]:
    return train(NET).variables


@pytest.fixture(scope="module")
def flax_trained() -> dict[str, Any]:
    return train(FlaxNet(), train=True).variables


@pytest.mark.parametrize("seed", range(20))
def test_a_healthy_run_has_no_finding(seed):
    record: dict[str, Any] = {}
    step = history(compiled(), record, every=20)
    state = train(NET, seed=seed, step=step)
    report = diagnose(state.variables, list(batches(8, seed=seed)), history=record)
    assert report.healthy, report
    assert "All is well: 3 batch norms fit these data." in str(report)
    assert report.losses["eval"]["accuracy"] > 0.9


@pytest.mark.parametrize(
    "data",
    [DATA, DATA[:1], [{**DATA[0], "mask": np.arange(64) < 50}]],
    ids=["eight batches", "one batch", "masked"],
)
def test_a_healthy_run_of_flaxs_layers_has_no_finding(flax_trained, data):
    report = diagnose(flax_trained, data, FlaxNet(), apply_kwargs={"train": False})
    assert report.healthy, report


def test_updates_thrown_away(trained):
    fresh = NET.init(jax.random.key(0), DATA[0]["x"])["batch_stats"]
    report = diagnose({**trained, "batch_stats": fresh})
    assert found(report) == [("error", "never updated")]
    assert set(report.findings[0].layers) == set(PATHS)
    assert "mutable=['batch_stats']" in report.findings[0].repair


def test_one_layer_that_was_not_updated_with_the_others(trained):
    fresh = NET.init(jax.random.key(0), DATA[0]["x"])["batch_stats"]["BatchNorm2d_1"]
    stats = {**trained["batch_stats"], "BatchNorm2d_1": fresh}
    report = diagnose({**trained, "batch_stats": stats})
    assert found(report) == [("error", "left in evaluation")]
    assert report.findings[0].layers == ("BatchNorm2d_1",)


def test_a_momentum_too_small_for_so_few_steps():
    with bnjax.override("**", momentum=0.01):
        variables = train(NET, step=train_step(loss_fn, donate=False)).variables
        for steps, tolerance in ((STEPS, 0), (None, 0.12)):
            report = diagnose(variables, steps=steps)
            assert found(report) == [("error", "lagging")]
            numbers = report.findings[0].numbers
            assert numbers["left"] == pytest.approx(0.99**STEPS, abs=tolerance)
            assert numbers["needed"] == 459  # 0.99^459 = 0.01


def test_pytorchs_momentum_in_a_flax_layer():
    model = FlaxNet(momentum=0.1)
    report = diagnose(
        train(model, train=True).variables, model=model, apply_kwargs={"train": False}
    )
    assert found(report) == [("warning", "momentum looks inverted")]
    assert report.findings[0].repair.startswith("BatchNorm(..., momentum=0.9)")


def test_flaxs_momentum_in_a_pytorch_layer():
    warn_once.cache_clear()
    warned = pytest.warns(
        UserWarning, match=r"^momentum=0.99 gives the new batch a weight of 0.99 "
    )
    with bnjax.override("**", momentum=0.99), warned:
        report = diagnose(train(NET, step=train_step(loss_fn, donate=False)).variables)
    assert found(report) == [("warning", "momentum looks inverted")]
    assert report.findings[0].repair.startswith("BatchNorm2d(..., momentum=0.01)")


@pytest.mark.parametrize("scale", [1, 255])
def test_images_that_are_not_scaled_as_in_training(trained, scale):
    shifted = [{**batch, "x": scale * (0.3 * batch["x"] + 1)} for batch in DATA]
    report = diagnose(trained, shifted)
    assert found(report) == [("error", "data differ from training data")]
    assert report.findings[0].layer == "BatchNorm2d_0"


@pytest.mark.parametrize("examples", [1, 2, 4])
def test_too_few_data_to_tell(trained, examples):
    batch = {"x": 0.3 * DATA[0]["x"][:examples] + 1, "y": DATA[0]["y"][:examples]}
    report = bnjax.diagnose(NET, trained, [batch])
    assert not report.healthy
    assert {kind for _, kind in found(report)} <= {
        "too few data",
        "batch too small",
        "data differ from training data",
    }


def test_batches_of_four():
    state = train(NET, size=4, steps=400, lr=0.003)
    report = diagnose(state.variables, list(batches(64, 4, seed=7)))
    assert found(report) == [("warning", "batch too small")]
    assert report.findings[0].layers == ("BatchNorm1d_0",)
    assert report.findings[0].numbers["values"] == 4


def test_a_batch_of_one_that_a_layer_cannot_train_on(trained):
    report = diagnose(trained, list(batches(8, 1)))
    assert found(report) == [("warning", "batch too small")]
    assert "1 value per channel in a batch of 1: a variance is not" in report.findings[0].evidence


@pytest.mark.parametrize("size", [16, 64])
def test_batches_of_one_class_each(trained, size):
    drawn = list(batches(16, seed=7))
    order = np.argsort(np.concatenate([batch["y"] for batch in drawn]), kind="stable")
    whole = {name: np.concatenate([batch[name] for batch in drawn])[order] for name in drawn[0]}
    starts = range(0, len(order), 2 * size)
    data = [{name: array[at : at + size] for name, array in whole.items()} for at in starts]
    report = diagnose(trained, data)
    assert found(report) == [("warning", "batches not alike")]
    assert "np.random.permutation" in report.findings[0].repair


class CalledTwice(nn.Module):
    """One batch norm for two inputs with different statistics."""

    @nn.compact
    def __call__(self, x):
        norm = bnjax.BatchNorm1d()
        return norm(x) + norm(5 + 3 * x)


@pytest.mark.parametrize("trained_for", [0, 400])
def test_statistics_of_a_layer_called_twice_may_be_of_both_calls_or_of_all_values(trained_for):
    model = CalledTwice()
    data = [{"x": np.random.default_rng(i).normal(0, 1, (256, 4))} for i in range(8)]
    variables = model.init(jax.random.key(0), data[0]["x"])
    apply = jax.jit(functools.partial(model.apply, mutable=["batch_stats"]))
    for step in range(trained_for):
        _, updates = apply(variables, data[step % 8]["x"])
        variables = {**variables, **updates}
    if not trained_for:
        variables = bnjax.recalibrate(model, variables, data)
    report = bnjax.diagnose(model, variables, data)
    assert report.healthy, report


def test_batches_in_which_no_example_counts_are_an_error(trained):
    none = [{**batch, "mask": np.zeros(64, bool)} for batch in DATA]
    message = r"^`batches` must hold at least one example that counts, got none."
    with pytest.raises(ValueError, match=message):
        diagnose(trained, none)
    assert diagnose(trained, [*DATA, *none[:1]]).healthy


@pytest.mark.parametrize("mask", [np.ones((64, 1), bool), np.ones(64), [True] * 64])
def test_a_mask_must_have_one_bool_per_example(trained, mask):
    message = r"^The `mask` of a batch of 64 examples must be a boolean array of shape \(64,\), got"
    with pytest.raises(ValueError, match=message):
        diagnose(trained, [{**DATA[0], "mask": mask}])


def test_a_record_shows_that_training_had_larger_batches(trained):
    record = {"step": [STEPS], "examples": [64]}
    assert diagnose(trained, list(batches(64, 4, seed=7)), history=record).healthy


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("scale", lambda x: 3 * x),
        ("brightness", lambda x: x + 2),
        ("noise", lambda x: x + np.random.default_rng(0).normal(size=x.shape).astype("f")),
        ("another range", lambda x: 40 * x + 120),
    ],
)
def test_shifted_data_show_in_the_first_layer(trained, name, change):
    report = diagnose(trained, [{**batch, "x": change(batch["x"])} for batch in DATA])
    assert found(report) == [("error", "data differ from training data")]
    assert report.findings[0].layer == "BatchNorm2d_0"


@pytest.fixture(scope="module")
def fast() -> list[TrainState]:
    """The states of a training run at a high learning rate, without the initial one."""
    states: list[TrainState] = []
    train(NET, lr=0.03, each=states.append)
    return states


def test_averaged_weights_with_the_last_statistics(fast):
    params = jax.tree.map(lambda *p: sum(p) / len(p), *(s.params for s in fast[5:40]))
    variables = {"params": params, "batch_stats": fast[-1].batch_stats}
    report = diagnose(variables)
    assert found(report) == [("error", "statistics belong to other weights")]
    assert diagnose(bnjax.recalibrate(NET, variables, DATA)).healthy


def test_weights_of_another_step(fast):
    variables = {"params": fast[-1].params, "batch_stats": fast[20].batch_stats}
    report = diagnose(variables)
    assert found(report) == [("error", "statistics belong to other weights")]


def test_a_record_shows_that_the_weights_differ():
    record: dict[str, Any] = {}
    states: list[TrainState] = []
    train(NET, lr=0.03, each=states.append, step=history(compiled(), record))
    last = states[-1].batch_stats
    averaged = jax.tree.map(lambda *p: sum(p) / len(p), *(s.params for s in states[5:40]))
    report = diagnose({"params": averaged, "batch_stats": last}, history=record)
    assert found(report) == [("error", "statistics belong to other weights")]
    # The record shows it even if the first layer is off the most.
    shifted = [{**batch, "x": batch["x"] + 3} for batch in DATA]
    report = diagnose({"params": states[-1].params, "batch_stats": last}, shifted, history=record)
    assert ("error", "data differ from training data") in found(report)


class Untracked(nn.Module):
    @nn.compact
    def __call__(self, x):
        tracked = functools.partial(bnjax.BatchNorm1d, track_running_stats=False)
        conv = functools.partial(bnjax.BatchNorm2d, track_running_stats=False)
        return Net(conv, tracked)(x)


def test_statistics_that_are_not_tracked():
    model = Untracked()
    report = diagnose(train(model).variables, model=model)
    assert found(report) == [("error", "eval depends on the batch")]
    finding = report.findings[0]
    assert finding.numbers["mates"] > 0.03
    assert len(finding.layers) == 3
    assert "track_running_stats=True" in finding.repair


def test_evaluation_in_training_mode(flax_trained):
    report = diagnose(flax_trained, model=FlaxNet(), apply_kwargs={"train": True})
    assert found(report) == [("error", "eval depends on the batch")]
    assert "train=False" in report.findings[0].repair


@pytest.mark.parametrize("model", [NET, FlaxNet()], ids=["bnjax", "flax"])
def test_an_evaluation_that_moves_the_statistics(model, trained, flax_trained):
    kwargs: dict[str, Any] = {"mutable": ["batch_stats"]}
    if isinstance(model, FlaxNet):
        trained, kwargs = flax_trained, {**kwargs, "train": True}
    report = diagnose(trained, model=model, apply_kwargs=kwargs)
    assert found(report) == [("error", "statistics move in eval")]
    assert len(report.findings[0].layers) == 3


def test_a_nan_batch_in_flaxs_layer(flax_trained):
    model = FlaxNet()
    x = DATA[0]["x"].copy()
    x[0] = np.nan
    _, updates = model.apply(flax_trained, x, train=True, mutable=["batch_stats"])
    report = diagnose({**flax_trained, **updates}, model=model, apply_kwargs={"train": False})
    assert found(report) == [("error", "statistics poisoned")]
    assert report.findings[0].layer == "BatchNorm_0"
    assert report.findings[0].numbers["channels"] == 8 + 16 + 32


@pytest.mark.parametrize("value", [-1.0, np.inf])
def test_a_bad_variance_in_one_channel(trained, value):
    stats = jax.tree.map(np.array, trained["batch_stats"])
    stats["BatchNorm2d_1"]["var"][3] = value
    report = diagnose({**trained, "batch_stats": stats})
    assert found(report) == [("error", "statistics poisoned")]
    assert report.findings[0].layers == ("BatchNorm2d_1",)


def test_a_batch_that_is_not_finite(trained):
    x = DATA[1]["x"].copy()
    x[0] = np.inf
    report = diagnose(trained, [DATA[0], {**DATA[1], "x": x}, *DATA[2:]])
    assert found(report) == [("error", "values not finite")]
    assert report.findings[0].layer == "BatchNorm2d_0"
    assert report.findings[0].numbers["batches"] == 1


def devices(variables: Any, count: int = 4) -> Any:
    """The statistics of devices that trained separately, each on its own kind of data."""
    own = [[{**b, "x": b["x"] + 0.3 * d} for b in batches(60, 16, seed=d)] for d in range(count)]
    step = jax.pmap(
        lambda v, x: {**v, **NET.apply(v, x, mutable=["batch_stats"])[1]},
        devices=jax.devices()[:count],
    )
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf] * count), variables)
    for parts in zip(*own, strict=True):
        stacked = step(stacked, np.stack([part["x"] for part in parts]))
    return jax.device_get(stacked)


@pytest.mark.parametrize("alone", [True, False], ids=["statistics", "all variables"])
def test_devices_that_never_communicated(trained, alone):
    stacked = devices(trained)
    variables = {**trained, "batch_stats": stacked["batch_stats"]} if alone else stacked
    report = diagnose(variables)
    assert found(report) == [("error", "devices disagree")]
    assert report.findings[0].numbers["distance"] > 0.1
    assert "merge_batch_stats" in report.findings[0].repair


def test_devices_that_agree(trained):
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf] * 4), trained)
    assert diagnose(stacked).healthy


def test_eps_that_is_larger_than_the_variance(trained):
    tiny = [{**batch, "x": 1e-4 * batch["x"]} for batch in DATA]
    report = diagnose(bnjax.recalibrate(NET, trained, tiny), tiny)
    assert found(report) == [("warning", "eps dominates")]
    assert report.findings[0].layers == ("BatchNorm2d_0",)
    assert "eps=1e-" in report.findings[0].repair


def test_channels_that_are_constant(trained):
    kernel = trained["params"]["Conv_1"]["kernel"].at[..., :5].set(0)
    params = {**trained["params"], "Conv_1": {"kernel": kernel}}
    report = diagnose(bnjax.recalibrate(NET, {**trained, "params": params}, DATA))
    assert found(report) == [("warning", "dead channels")]
    assert report.findings[0].numbers["constant"] == 5


def test_scales_that_are_zero(trained):
    norm = trained["params"]["BatchNorm2d_0"]
    params = {**trained["params"], "BatchNorm2d_0": {**norm, "scale": jnp.zeros(8)}}
    report = diagnose(bnjax.recalibrate(NET, {**trained, "params": params}, DATA[:1]), DATA[:1])
    assert ("warning", "dead channels") in found(report)


def test_statistics_that_stall_in_bfloat16():
    plain = train_step(loss_fn, donate=False)

    def step(state, batch):  # a precision policy that casts all variables after each step
        state, metrics = plain(state, batch)
        return state.replace(batch_stats=jax.tree.map(jnp.bfloat16, state.batch_stats)), metrics

    with bnjax.override("**", momentum=0.005):
        variables = train(NET, step=step, steps=1500, lr=0.003).variables
        report = diagnose(variables, steps=1500)
    assert found(report) == [("error", "half-precision statistics")]


def test_statistics_in_half_precision_that_fit(trained):
    half = jax.tree.map(jnp.bfloat16, trained["batch_stats"])
    report = diagnose({**trained, "batch_stats": half})
    assert found(report) == [("warning", "half-precision statistics")]


def test_activations_near_the_limit_of_float16():
    layer = bnjax.BatchNorm1d()
    x = np.random.default_rng(0).normal(0, 15_000, (256, 4)).astype(np.float16)
    variables = bnjax.recalibrate(layer, layer.init(jax.random.key(0), x), [x])
    report = bnjax.diagnose(layer, variables, [x])
    assert found(report) == [("warning", "range exhausted")]
