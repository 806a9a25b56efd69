"""The record of an nnx training: its running statistics, and those of each batch."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import bnjax
from bnjax.training import history

pytestmark = pytest.mark.quick_compile


def test_the_record_has_the_statistics_of_each_batch():
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
