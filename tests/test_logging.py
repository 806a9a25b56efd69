"""Running statistics as scalars for a logger."""

import json
import re
from typing import Any

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


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(False, momentum=0.9, name="flax")(x)
        x = bnjax.BatchNorm1d(affine=False, momentum=None, name="average")(x)
        return bnjax.BatchNorm1d(name="torch")(x).sum(-1)


def state_of(x):
    return init_state(Net(), optax.sgd(0.1), jax.random.key(0), x)


@pytest.fixture
def x(rng):
    return jnp.asarray(rng.normal(1, 2, (16, 4)), jnp.float32)


def test_variables_give_scale_dead_channels_and_count(x):
    variables = state_of(x).variables
    variables["params"]["torch"]["scale"] = jnp.array([1.0, -0.5, 0.0, 2.0])
    variables["batch_stats"]["torch"]["var"] = jnp.array([1.0, 0.0, 1.0, 1.0])
    variables["batch_stats"]["average"]["count"] = jnp.array(7)
    assert scalars(variables) == {
        "bn/flax/scale_min": 1.0,
        "bn/flax/dead": 0.0,
        "bn/average/dead": 0.0,
        "bn/average/updates": 7.0,
        "bn/torch/scale_min": 0.0,
        "bn/torch/dead": 2.0,
    }


def test_comparing_two_trees_matches_numpy(x, rng):
    mean, other_mean = rng.normal(size=(2, 4))
    var, other_var = rng.uniform(0.5, 2, (2, 4))

    def tree(mean, var):
        return {"params": {}, "batch_stats": {"a": {"bn": {"mean": mean, "var": var}}}}

    found = scalars(tree(mean, var), tree(other_mean, other_var), prefix="stats", eps=0.1)
    gap = np.sqrt((((other_mean - mean) ** 2) / (var + 0.1)).mean())
    ratio = np.prod((var + 0.1) / (other_var + 0.1)) ** 0.25
    np.testing.assert_allclose(found["stats/a/bn/mean_gap"], gap, rtol=1e-12)
    np.testing.assert_allclose(found["stats/a/bn/var_ratio"], ratio, rtol=1e-12)


def test_a_record_compares_the_running_statistics_with_the_last_batch(x):
    record: dict = {}
    step = history(train_step(lambda y, batch: y**2), record, channels=3)
    state, _ = step(state_of(x), {"x": x})
    state, _ = step(state, {"x": 3 * x + 1})
    found = scalars(json.loads(json.dumps(record)))
    running = state.batch_stats["flax"]
    batch = np.asarray(3 * x + 1, np.float64)
    std = np.sqrt(np.asarray(running["var"], np.float64) + 1e-5)
    gap = ((batch.mean(0) - np.asarray(running["mean"])) / std)[:3]
    np.testing.assert_allclose(found["bn/flax/mean_gap"], np.sqrt((gap**2).mean()), rtol=1e-3)
    # A cumulative average does not reveal the last batch.
    assert {name.split("/")[1] for name in found} == {"flax", "torch"}
    assert not {*found} & {*scalars(state)}


def test_nnx_models_and_states_are_accepted(x):
    norm = bnjax.nnx.BatchNorm1d(4, rngs=nnx.Rngs(0))
    model = nnx.Sequential(norm, nnx.BatchNorm(4, use_scale=False, rngs=nnx.Rngs(0)))
    exact = bnjax.recalibrate(model, None, [x])
    found = scalars(model, exact)
    assert found == scalars(nnx.state(model), exact)
    assert found["bn/layers/0/scale_min"] == 1
    assert "bn/layers/1/scale_min" not in found
    expected = np.sqrt((np.asarray(x, np.float64).mean(0) ** 2).mean())
    np.testing.assert_allclose(found["bn/layers/0/mean_gap"], expected, rtol=1e-4)


def test_scanned_boxed_and_half_precision_variables_are_accepted():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return bnjax.BatchNorm1d(scale_init=nn.with_partitioning(nn.ones, ("c",)))(x), None

    axes: Any = {"params": 0, "batch_stats": 0}
    named = {nn.PARTITION_NAME: "layers"}
    scanned = nn.scan(Block, axes, split_rngs={"params": True}, length=3, metadata_params=named)()
    variables = scanned.init(jax.random.key(0), jnp.ones((2, 4)), None)
    half = jax.tree.map(jnp.bfloat16, variables)
    assert scalars(half, variables)["bn/BatchNorm1d_0/var_ratio"] == 1
    assert scalars(half)["bn/BatchNorm1d_0/scale_min"] == 1


def test_layers_with_nan_or_without_channels_give_nan():
    def tree(mean):
        return {"batch_stats": {"mean": mean, "var": np.ones_like(mean)}}

    poisoned = scalars(tree(np.array([np.nan, 0.0])), tree(np.zeros(2)))
    assert np.isnan(poisoned["bn/mean_gap"])
    assert poisoned["bn/var_ratio"] == 1
    empty = scalars(tree(np.zeros(0)), tree(np.zeros(0)))
    assert np.isnan(empty["bn/mean_gap"])
    assert empty["bn/dead"] == 0


def test_paths_select_layers(x):
    assert {*scalars(state_of(x), paths="flax")} == {"bn/flax/scale_min", "bn/flax/dead"}


NONE = (
    "`trained` must hold running statistics, but has none: pass a TrainState, variables with "
    "`batch_stats`, an nnx model, or a record of bnjax.training.history."
)
RECORD = {"step": [1], "layers": {"bn": {"mean": [[0.0]], "var": [[1.0]]}}}
TREE = {"batch_stats": {"a": {"bn": {"mean": np.zeros(2), "var": np.ones(2)}}}}
WIDER = {"batch_stats": {"a": {"bn": {"mean": np.zeros(3), "var": np.ones(3)}}}}


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (({},), {}, ValueError, NONE),
        ((None,), {}, ValueError, NONE),
        (({"params": {"kernel": np.ones(2)}},), {}, ValueError, NONE),
        (
            (RECORD, TREE),
            {},
            TypeError,
            "`other` must be None with a record of bnjax.training.history, which already holds the "
            "statistics of the last batch, got dict.",
        ),
        (
            (TREE, WIDER),
            {},
            ValueError,
            "`trained` and `other` must be from the same model, but the batch norm at 'a/bn' has 2 "
            "channels in one and 3 in the other.",
        ),
        (
            (TREE,),
            {"paths": "b/**"},
            ValueError,
            "The pattern 'b/**' matches no batch norm: there are ['a/bn']. `*` matches part of one "
            "name, `**` any number of names, as in 'encoder/**'.",
        ),
    ],
)
def test_invalid_arguments_are_errors(arguments, options, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        scalars(*arguments, **options)
