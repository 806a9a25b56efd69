"""Averages of parameters: compared with optax, in any precision, with recomputed statistics."""

import re
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import bnjax
from bnjax.training import Average, eval_step, evaluate, init_state, train_step

pytestmark = pytest.mark.quick_compile

RNG = np.random.default_rng(0)
BATCHES = [RNG.normal(number, 2, (16, 3)).astype("f") for number in range(4)]
loss_fn = lambda y, batch: (y**2).sum(-1)  # noqa: E731 - as in a script


class Net(nn.Module):
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        return bnjax.BatchNorm1d()(nn.Dense(4, param_dtype=self.dtype)(x))


class Nnx(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.fc, self.bn = nnx.Linear(3, 4, rngs=rngs), bnjax.nnx.BatchNorm1d(4, rngs=rngs)

    def __call__(self, x):
        return self.bn(self.fc(x))


def linen_training(tx: Any, decay: float | None, dtype: Any = jnp.float32):
    """The model, its state and average after some steps, and the parameters after each."""
    model = Net(dtype)
    state = init_state(model, tx, jax.random.key(0), BATCHES[0])
    step, average, seen = train_step(loss_fn), Average.start(state, decay), []
    for x in BATCHES:
        state, _ = step(state, {"x": x})
        average = average.update(state)
        seen.append(jax.device_get(getattr(state.params, "slow", state.params)))
    return model, state, average, seen


@pytest.mark.parametrize("decay", [0.5, 0.999, 0.999999])
def test_the_exponential_average_matches_optax(decay):
    _, _, average, seen = linen_training(optax.sgd(0.1), decay)
    ema = optax.ema(decay, debias=False)
    with jax.enable_x64(True):
        wide = [jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), each) for each in seen]
        moving: Any = ema.init(wide[0])
        for params in wide:
            _, moving = ema.update(params, moving)
        expected = jax.tree.map(lambda leaf: leaf / (1 - decay ** len(seen)), moving.ema)
    chex.assert_trees_all_close(average.params, jax.device_get(expected), rtol=2e-5, atol=1e-6)


def test_without_a_decay_the_average_is_the_mean():
    _, _, average, seen = linen_training(optax.adam(0.1), None)
    expected = jax.tree.map(lambda *leaves: np.mean(leaves, 0, np.float64), *seen)
    chex.assert_trees_all_close(average.params, expected, rtol=1e-5, atol=1e-6)
    assert int(average.count) == len(seen)


def test_half_precision_is_averaged_in_float32():
    _, state, average, _ = linen_training(optax.sgd(0.0), 0.999, jnp.bfloat16)
    kernel = average.params["Dense_0"]["kernel"]
    assert kernel.dtype == jnp.float32
    moved = state.replace(params=jax.tree.map(lambda leaf: leaf * 1.01, state.params))
    after = average.update(moved).params["Dense_0"]["kernel"]
    # 1 % of the change, which bfloat16 would round away
    assert 0 < float(jnp.abs(after - kernel).max()) < float(jnp.abs(kernel).max()) * 2**-8
    averaged = average.recalibrated(Net(jnp.bfloat16), state, BATCHES)
    assert averaged.params["Dense_0"]["kernel"].dtype == jnp.bfloat16


def test_with_lookahead_the_slow_parameters_are_averaged():
    tx = optax.lookahead(optax.sgd(0.1), 2, 0.5)
    model, state, average, seen = linen_training(tx, None)
    expected = jax.tree.map(lambda *leaves: np.mean(leaves, 0, np.float64), *seen)
    chex.assert_trees_all_close(average.params, expected, rtol=1e-5, atol=1e-6)
    averaged = average.recalibrated(model, state, BATCHES)
    chex.assert_trees_all_equal(averaged.variables["params"], average.params)


def test_recalibrated_computes_statistics_for_the_averaged_parameters():
    model, state, average, _ = linen_training(optax.sgd(0.5), None)
    before = jax.device_get((state.params, state.batch_stats))
    averaged = average.recalibrated(model, state, BATCHES)
    dense = average.params["Dense_0"]
    outputs = np.concatenate(BATCHES).astype(float) @ dense["kernel"] + dense["bias"]
    stats = averaged.batch_stats["BatchNorm1d_0"]
    np.testing.assert_allclose(stats["mean"], outputs.mean(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(stats["var"], outputs.var(0), rtol=1e-4, atol=1e-5)
    chex.assert_trees_all_equal((state.params, state.batch_stats), before)
    loss = evaluate(eval_step(loss_fn), averaged, [{"x": np.concatenate(BATCHES)}])["loss"]
    scale, bias = (average.params["BatchNorm1d_0"][name] for name in ("scale", "bias"))
    y = (outputs - outputs.mean(0)) / np.sqrt(outputs.var(0) + 1e-5) * scale + bias
    np.testing.assert_allclose(loss, (y**2).sum(-1).mean(), rtol=1e-4)


def test_nnx_models_are_averaged_likewise():
    model = Nnx(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.sgd(0.5), wrt=nnx.Param)
    step, average, seen = bnjax.nnx.train_step(loss_fn), Average.start(model, None), []
    for x in BATCHES:
        step(model, optimizer, {"x": x})
        average = average.update(model)
        seen.append(jax.device_get(nnx.to_pure_dict(nnx.state(model, nnx.Param))))
    before = jax.device_get(nnx.to_pure_dict(nnx.state(model)))
    averaged = average.recalibrated(model, None, BATCHES)
    expected = jax.tree.map(lambda *leaves: np.mean(leaves, 0, np.float64), *seen)
    found = nnx.to_pure_dict(nnx.state(averaged, nnx.Param))
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-6)
    outputs = np.concatenate(BATCHES) @ expected["fc"]["kernel"] + expected["fc"]["bias"]
    np.testing.assert_allclose(averaged.bn.mean[...], outputs.mean(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(averaged.bn.var[...], outputs.var(0), rtol=1e-4, atol=1e-5)
    chex.assert_trees_all_equal(nnx.to_pure_dict(nnx.state(model)), before)


def test_an_average_is_saved_and_restored_with_its_state(tmp_path):
    _, state, average, _ = linen_training(optax.adam(0.1), 0.9)
    bnjax.save(tmp_path / "run.msgpack", {"state": state, "average": average})
    fresh = init_state(Net(), optax.adam(0.1), jax.random.key(1), BATCHES[0])
    like = {"state": fresh, "average": Average.start(fresh, 0.9)}
    found = bnjax.load(tmp_path / "run.msgpack", like=like)["average"]
    chex.assert_trees_all_equal(found, average)
    chex.assert_trees_all_equal(found.update(state), average.update(state))


def test_invalid_arguments_are_errors():
    model, state, average, _ = linen_training(optax.sgd(0.1), 0.9)
    for decay in (0, 1, 1.5):
        message = (
            "`decay` must be between 0 and 1, such as 0.999, or None to weigh all steps equally"
        )
        with pytest.raises(ValueError, match=f"^{re.escape(message)}, got {decay}\\.$"):
            Average.start(state, decay)
    message = "`state` must be the TrainState of the linen model, as the last step returned it"
    with pytest.raises(TypeError, match=f"^{message}, got NoneType\\.$"):
        average.recalibrated(model, None, BATCHES)
