"""What a diagnosis returns, what it leaves unchanged, and which models it handles."""

import json
import re
from collections.abc import Iterator
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import bnjax
from bnjax.diagnosis import Report
from bnjax.models.batches import layout
from bnjax.models.diagnosis.measuring import measured
from bnjax.training import history
from tests.support.diagnosed import STEPS, Net, batches, compiled, loss_fn, train
from tests.support.models import Branches, Siamese

pytestmark = pytest.mark.quick_compile

NET = Net()
DATA = list(batches(8, seed=7))


@pytest.fixture(scope="module")
def trained() -> dict[str, Any]:
    return train(NET).variables


@pytest.fixture(scope="module")
def shifted(trained) -> Report:
    data = [{**batch, "x": 3 * batch["x"]} for batch in DATA]
    return bnjax.diagnose(NET, trained, data, loss_fn=loss_fn)


def test_a_finding_names_layer_evidence_cause_and_repair(shifted):
    (finding,) = shifted.findings
    assert finding.layer == "BatchNorm2d_0"
    assert finding.numbers["var_ratio"] == pytest.approx(1 / 9, rel=0.1)
    text = re.sub(r"\s+", " ", str(shifted))
    for words in (
        "1 data differ from training data, error: BatchNorm2d_0",
        "evidence It starts in 'BatchNorm2d_0'",
        "cause These inputs differ in mean, scale or content",
        "repair x = (x - train_mean) / train_std",
        "accuracy 0.9",
    ):
        assert words in text


def test_json_holds_everything(shifted, trained):
    data = json.loads(shifted.to_json())
    assert data["healthy"] is False
    assert data["findings"][0]["kind"] == "data differ from training data"
    assert [row["path"] for row in data["layers"]] == [
        "BatchNorm2d_0",
        "BatchNorm2d_1",
        "BatchNorm1d_0",
    ]
    assert sorted(data["losses"]["eval"]) == ["accuracy", "loss"]
    lost = jax.tree.map(lambda leaf: leaf * jnp.nan, trained["batch_stats"])
    report = bnjax.diagnose(NET, {**trained, "batch_stats": lost}, DATA)
    data = json.loads(report.to_json())
    assert data["outputs"]["gap"] is None
    assert data["layers"][0]["mean_distance"] is None
    assert "NaN times their deviation" in str(report)


@pytest.mark.parametrize("lost", [False, True])
def test_the_picture_is_drawn_whatever_was_measured(trained, tmp_path, lost):
    stats = jax.tree.map(lambda leaf: leaf * (jnp.nan if lost else 1), trained["batch_stats"])
    report = bnjax.diagnose(NET, {**trained, "batch_stats": stats}, DATA)
    report.plot(tmp_path / "report.png")
    assert (tmp_path / "report.png").stat().st_size > 10_000


def test_many_layers_are_cut_to_the_farthest_in_the_table(tmp_path):
    model = nn.Sequential([bnjax.BatchNorm1d() for _ in range(30)])
    x = np.random.default_rng(0).normal(size=(64, 2)).astype(np.float32)
    variables = bnjax.recalibrate(model, model.init(jax.random.key(0), x), [x])
    stats = variables["batch_stats"]
    far = {name: value + 3 for name, value in stats["layers_23"].items()}
    variables = {**variables, "batch_stats": {**stats, "layers_23": far}}
    report = bnjax.diagnose(model, variables, [x])
    assert "layers_23" in str(report)
    assert "14 more layers, no farther from the data" in str(report)
    assert len(report.layers) == 30
    report.plot(tmp_path / "report.png")


def test_measurements_are_those_of_the_data(trained):
    layer = bnjax.BatchNorm1d()
    parts = [np.random.default_rng(n).normal(n, 1 + n, (40 - 10 * n, 3)) for n in range(3)]
    parts = [part.astype(np.float32) for part in parts]
    variables = layer.init(jax.random.key(0), parts[0])
    (seen,) = measured(layer, variables, parts, None, layout(), {}).layers
    values = np.concatenate(parts).astype(np.float64)
    np.testing.assert_allclose(seen.batch_mean, values.mean(0), rtol=1e-5)
    np.testing.assert_allclose(seen.all_var, values.var(0), rtol=1e-5)
    sizes = [len(part) for part in parts]
    own = np.average([part.var(0, ddof=1) for part in parts], 0, sizes)
    np.testing.assert_allclose(seen.batch_var, own, rtol=1e-5)
    means = np.array([part.mean(0) for part in parts])
    between = (np.array(sizes)[:, None] * (means - values.mean(0)) ** 2).sum(0) / 2 / 40
    np.testing.assert_allclose(seen.mean_spread, np.sqrt(between), rtol=1e-4)
    assert seen.values == 40


def test_recalibrated_statistics_are_at_distance_zero(trained):
    exact = bnjax.recalibrate(NET, trained, DATA)
    for layer in measured(NET, exact, DATA, None, layout(), {}).layers:
        np.testing.assert_allclose(layer.mean, layer.batch_mean, atol=1e-5)
        np.testing.assert_allclose(layer.var, layer.all_var, rtol=1e-4)


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_that_is_passed_in_changes(trained, fails):
    before = jax.device_get(trained)
    kwargs: dict[str, Any] = {"mutable": ["batch_stats"]}

    def data():
        yield from DATA[:2]
        if fails:
            raise OSError("the disk is gone")

    if fails:
        with pytest.raises(OSError, match=r"^the disk is gone$"):
            bnjax.diagnose(NET, trained, data(), apply_kwargs=kwargs)
    else:
        bnjax.diagnose(NET, trained, data(), apply_kwargs=kwargs)
    chex.assert_trees_all_equal(trained, before)
    assert kwargs == {"mutable": ["batch_stats"]}


def test_masked_examples_do_not_count(trained):
    padded = [
        {
            "x": np.concatenate([batch["x"], np.full((9, 8, 8, 1), 1e3, np.float32)]),
            "y": np.concatenate([batch["y"], np.zeros(9, int)]),
            "mask": np.arange(73) < 64,
        }
        for batch in DATA
    ]
    plain = bnjax.diagnose(NET, trained, DATA, loss_fn=loss_fn)
    masked = bnjax.diagnose(NET, trained, padded, loss_fn=loss_fn)
    assert masked.healthy
    for one, other in zip(plain.layers, masked.layers, strict=True):
        assert one["distance"] == pytest.approx(other["distance"], abs=1e-4)
        assert one["values"] == other["values"]
    assert masked.losses["eval"] == pytest.approx(plain.losses["eval"], abs=1e-5)


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return bnjax.BatchNorm1d()(nn.Dense(4)(x)), None


class Scanned(nn.Module):
    """Three layers in one scan, whose statistics are stacked."""

    @nn.compact
    def __call__(self, x):
        axes: Any = {"params": 0, "batch_stats": 0}
        scanned = nn.scan(Layer, variable_axes=axes, split_rngs={"params": True}, length=3)
        return scanned()(x, None)[0]


def test_models_with_scan_remat_shared_layers_and_nnx():
    x = np.random.default_rng(0).normal(size=(32, 8, 8, 3)).astype(np.float32)
    siamese, scanned = Siamese(), Scanned()
    flat = x[:, 0, 0, :1] * np.ones((1, 4), np.float32)
    nnx_model = Branches(nnx.Rngs(0))
    nnx_model.eval()
    for model, data, layers in ((siamese, x, 4), (scanned, flat, 1), (nnx_model, x[:, 0, 0], 3)):
        linen = isinstance(model, nn.Module)
        variables = model.init(jax.random.key(0), data) if linen else None
        report = bnjax.diagnose(model, variables, [data])
        assert [finding.kind for finding in report.findings] == ["never updated"]
        assert len(report.layers) == layers


def test_a_frozen_layer_is_left_out(trained):
    data = [{**batch, "x": 3 * batch["x"]} for batch in DATA]
    with bnjax.freeze("**"):
        report = bnjax.diagnose(NET, trained, data)
    assert report.healthy
    assert report.outputs["gap"] == 0
    with bnjax.freeze("*1d*"):
        report = bnjax.diagnose(NET, trained, data)
    assert report.findings[0].layers[0] == "BatchNorm2d_0"


def test_replicas_that_differ(trained):
    devices = jax.devices()[:2]
    mesh = jax.sharding.Mesh(devices, ("d",))
    alike = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def torn(leaf: Any) -> Any:
        copies = [jax.device_put(leaf * (1 + n), device) for n, device in enumerate(devices)]
        return jax.make_array_from_single_device_arrays(leaf.shape, alike, copies)

    whole = jax.device_put(trained, alike)
    assert bnjax.diagnose(NET, whole, DATA).healthy
    stats = jax.tree.map(torn, trained["batch_stats"])
    report = bnjax.diagnose(NET, {**whole, "batch_stats": stats}, DATA)
    assert ("error", "devices disagree") in [(f.severity, f.kind) for f in report.findings]


def test_the_record_of_a_training():
    record: dict[str, Any] = {}
    step = history(compiled(), record, every=2, paths="*2d*", channels=3)
    states: list[Any] = []
    train(NET, step=step, each=states.append)
    assert record["step"] == list(range(2, STEPS + 1, 2))
    assert set(record["examples"]) == {64}
    assert sorted(record["layers"]) == ["BatchNorm2d_0", "BatchNorm2d_1"]
    assert json.loads(json.dumps(record)) == record
    kept = record["layers"]["BatchNorm2d_0"]
    mean = states[-1].batch_stats["BatchNorm2d_0"]["mean"]
    np.testing.assert_allclose(kept["mean"][-1], mean[:3], rtol=1e-6)
    old = states[-2].batch_stats["BatchNorm2d_0"]["mean"][:3]
    again = 0.9 * np.array(old) + 0.1 * np.array(kept["batch_mean"][-1])
    np.testing.assert_allclose(again, mean[:3], rtol=1e-5)
    assert record["params_norm"][-1] > 0


@pytest.mark.parametrize("lost", [False, True])
def test_the_same_diagnosis_twice_gives_equal_reports(trained, lost):
    # Reports compared the arrays behind them by identity, and NaN does not equal itself.
    stats = jax.tree.map(lambda leaf: leaf.at[0].set(np.nan) if lost else 2 * leaf, trained)
    variables = {**trained, "batch_stats": stats["batch_stats"]}
    one, two = (bnjax.diagnose(Net(), variables, DATA[:3], loss_fn=loss_fn) for _ in range(2))
    assert not one.healthy
    assert one == two
    assert one.findings == two.findings
    assert one.to_json() == two.to_json()
    assert one != bnjax.diagnose(Net(), variables, DATA[:2], loss_fn=loss_fn)


SEVERAL = r"\bbatches\b(?! and of a call)|(?<![.\d])1 \w+s\b|between batches|0\.00"


def one_batch_cases(trained: Any) -> Iterator[tuple[Any, Any, Any]]:
    """A model with a fault, its variables, and a batch."""
    x, fresh = DATA[0]["x"], NET.init(jax.random.key(0), DATA[0]["x"])["batch_stats"]
    yield NET, {**trained, "batch_stats": fresh}, x
    yield NET, trained, 3 * x
    yield NET, trained, x[:2]
    yield NET, trained, x[:1]
    yield NET, trained, np.where(x > 2, np.inf, x)
    yield NET, {**trained, "batch_stats": jax.tree.map(lambda a: 3 * a + 1, fresh)}, x
    yield NET, jax.tree.map(lambda a: a.at[0].set(np.nan), trained), x
    yield NET, {**trained, "batch_stats": jax.tree.map(jnp.bfloat16, trained["batch_stats"])}, x


@pytest.mark.filterwarnings("ignore:momentum=0.9 gives:UserWarning")  # the layer warns as well
def test_a_single_batch_is_not_described_as_several(trained):
    # The report said that statistics "scatter by 0.00 standard deviations between batches".
    kinds = set()
    for model, variables, x in one_batch_cases(trained):
        report = bnjax.diagnose(model, variables, [x])
        assert report.findings
        for finding in report.findings:
            kinds.add(finding.kind)
            assert not re.search(SEVERAL, finding.evidence + finding.cause), finding
        assert all(np.isnan(row["spread"]) for row in report.layers)
        assert "0.00  " not in str(report).split("batch, std")[0]
    assert len(kinds) >= 6
    with bnjax.override("**", momentum=0.9):
        (finding,) = bnjax.diagnose(NET, trained, [DATA[0]["x"]]).findings
    assert finding.evidence.endswith("gives the newest batch a weight of 0.9.")


@pytest.mark.parametrize(
    ("model", "variables", "data", "message"),
    [
        (NET, None, [], "`batches` must hold at least one batch, got none."),
        (NET, {}, DATA, "`variables` must be a dict with the collection `batch_stats`"),
        (nn.Dense(2), None, [np.ones((2, 3))], "`model` must call a batch norm"),
        (NET.apply, {}, DATA, "`model` must be an instance of a flax.linen.Module or"),
    ],
    ids=["no batch", "no statistics", "no batch norm", "no model"],
)
def test_what_cannot_be_diagnosed_is_an_error(model, variables, data, message):
    if isinstance(model, nn.Dense):
        variables = model.init(jax.random.key(0), data[0])
    with pytest.raises((TypeError, ValueError), match="^" + re.escape(message)):
        bnjax.diagnose(model, variables, data)


def test_losses_weight_examples_equally_and_batches_may_hold_other_entries():
    layer, x = bnjax.BatchNorm1d(), np.arange(24, dtype=np.float32).reshape(8, 3)
    variables = bnjax.recalibrate(layer, layer.init(jax.random.key(0), x), [x])
    few = np.arange(8) < 2
    batches = [{"x": x, "loss": np.ones(8), "mask": few | True, "scale": 0.5}]
    batches += [{"x": x, "loss": np.full(8, 6.0), "mask": few, "scale": 0.5}]
    report = bnjax.diagnose(layer, variables, batches, loss_fn=lambda y, batch: batch["loss"])
    assert report.losses["eval"]["loss"] == pytest.approx((8 * 1 + 2 * 6) / 10)
