"""Records of running statistics and batch statistics during training."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import bnjax
from bnjax.training import history, init_state, scalars, train_step

pytestmark = pytest.mark.quick_compile


def test_a_record_of_an_nnx_model_has_the_statistics_of_each_batch():
    norm = nnx.BatchNorm(3, momentum=0.75, rngs=nnx.Rngs(0))
    model = nnx.Sequential(norm, lambda x: x.sum(-1))
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
    record: dict = {}
    step = history(bnjax.nnx.train_step(lambda y, batch: y), record, channels=2)
    rng, running = np.random.default_rng(0), np.zeros(3)
    for number in range(3):
        x = rng.normal(number, 2, (8, 3)).astype("f")
        metrics = step(model, optimizer, {"x": jnp.asarray(x)})
        assert bool(metrics["accepted"])
        running = 0.75 * running + 0.25 * x.mean(0)
        layer = record["layers"]["layers/0"]
        np.testing.assert_allclose(layer["mean"][number], running[:2], rtol=1e-5)
        np.testing.assert_allclose(layer["batch_mean"][number], x.mean(0)[:2], rtol=1e-4)
        np.testing.assert_allclose(layer["batch_var"][number], x.var(0)[:2], rtol=1e-4)
    assert (record["step"], record["examples"]) == ([1, 2, 3], [8, 8, 8])
    params = np.concatenate(jax.tree.leaves(nnx.state(model, nnx.Param)))
    np.testing.assert_allclose(record["params_norm"][-1], np.sqrt((params**2).sum()), rtol=1e-6)


class Conventions(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(False, momentum=0.99, name="flax")(x) + bnjax.BatchNorm1d(name="torch")(x)
        return x.sum(-1) + bnjax.BatchNorm1d(momentum=None, name="average")(x).sum(-1)


def test_batch_statistics_are_recovered_with_the_momentum_of_each_layer():
    x = np.random.default_rng(0).normal(1, 2, (16, 4)).astype(np.float32)
    record: dict = {}
    step = history(train_step(lambda y, batch: y**2), record)
    step(init_state(Conventions(), optax.sgd(0.1), jax.random.key(0), x), {"x": x})
    wide = x.astype(np.float64)
    for name, correction in (("flax", 0), ("torch", 1)):
        lines = record["layers"][name]
        np.testing.assert_allclose(
            np.asarray(lines["batch_mean"]), wide.mean(0)[None], rtol=1e-4, atol=1e-4
        )
        np.testing.assert_allclose(
            np.asarray(lines["batch_var"]), wide.var(0, ddof=correction)[None], rtol=1e-3, atol=1e-3
        )
    assert "batch_mean" not in record["layers"]["average"]


@pytest.mark.parametrize("affine", [True, "own", "both"])
def test_each_bank_is_recorded_by_name_with_its_own_examples(affine):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            names = ("clean", "noisy")
            return bnjax.BatchNorm1d(banks=names, affine=affine, name="bn")(x).sum(-1)

    rng, record = np.random.default_rng(0), {}
    step = history(train_step(lambda y, batch: y**2, donate=False), record, channels=2)
    state = init_state(Net(), optax.sgd(0.01), jax.random.key(0), jnp.ones((2, 3)))
    for bank in (np.array([0, 1, 1, 0, 1, 0, 1, 0], np.int32), np.zeros(8, np.int32)):
        x = rng.normal(1, 2, (8, 3)).astype("f")
        state, _ = step(state, {"x": x, "bank": bank})
        for number, name in enumerate(("clean", "noisy")):
            mine, layer = x[bank == number], record["layers"][f"bn[{name}]"]
            found = [layer[f"batch_{which}"][-1] for which in ("mean", "var")]
            expected = [mine.mean(0), mine.var(0, ddof=1)] if len(mine) else [[np.nan] * 3] * 2
            np.testing.assert_allclose(found, np.stack(expected)[:, :2], rtol=1e-4, atol=1e-5)
    assert bnjax.diagnose(Net(), state, [{"x": x, "bank": bank}], history=record) is not None
    stats = state.batch_stats["bn"]
    np.testing.assert_allclose(record["layers"]["bn[noisy]"]["mean"][-1], stats["mean"][1, :2])
    numbers = scalars(state)
    assert (numbers["bn/bn/dead"], len(scalars(record))) == (0, 4)


def test_a_diagnosis_uses_the_record_of_each_bank():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = bnjax.BatchNorm1d(banks=("clean", "noisy"), name="bn")(nn.Dense(8)(x))
            return nn.Dense(1)(nn.relu(x))[:, 0]

    rng, record = np.random.default_rng(0), {}
    step = history(train_step(lambda y, batch: (y - batch["x"][:, 0]) ** 2, donate=False), record)
    state = init_state(Net(), optax.adam(1e-3), jax.random.key(0), jnp.ones((2, 5)))

    def batch() -> dict:
        bank = (np.arange(64) % 2).astype(np.int32)
        return {"x": rng.normal(size=(64, 5)).astype("f") + bank[:, None], "bank": bank}

    for _ in range(60):
        state, _ = step(state, batch())
    data = [batch() for _ in range(8)]
    assert bnjax.diagnose(Net(), state, data, history=record).healthy
    shifted = [{**each, "x": each["x"] + 2 * each["bank"][:, None]} for each in data]
    (finding,) = bnjax.diagnose(Net(), state, shifted, history=record).findings
    assert (finding.kind, finding.layers) == ("data differ from training data", ("bn[noisy]",))
    assert (
        finding.cause == "These inputs differ in mean, scale or content from the training inputs."
    )
    other = {"bn": {k: v.at[1].multiply(1.5) for k, v in state.batch_stats["bn"].items()}}
    report = bnjax.diagnose(Net(), {**state.variables, "batch_stats": other}, data, history=record)
    assert {finding.kind for finding in report.findings} == {"statistics belong to other weights"}
