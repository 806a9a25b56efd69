"""The train state, training and evaluation steps, and commits."""

import re
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import bnjax
from bnjax.training import TrainState, commit, eval_step, evaluate, init_state, train_step

pytestmark = pytest.mark.quick_compile


class Net(nn.Module):
    norm: bool = True
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x, train: bool = True):
        x = nn.Dense(8)(x)
        x = bnjax.BatchNorm1d()(x) if self.norm else x
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(1)(x)[:, 0]


def squared_error(outputs, batch):
    error = (outputs - batch["y"]) ** 2
    return error, {"distance": jnp.sqrt(error)}


def make(rng, size=16, **fields) -> tuple[TrainState, dict[str, np.ndarray]]:
    x = rng.normal(size=(size, 4)).astype(np.float32)
    state = init_state(Net(**fields), optax.adam(1e-2), jax.random.key(0), x)
    return state, {"x": x, "y": x.sum(1)}


def test_training_lowers_the_loss_and_updates_the_statistics(rng):
    state, batch = make(rng)
    before = jax.device_get(state.batch_stats)
    step = train_step(squared_error)
    state, first = step(state, batch)
    last = first
    for _ in range(100):
        state, last = step(state, batch)
    assert last["loss"] < 0.1 * first["loss"]
    assert (
        np.abs(state.batch_stats["BatchNorm1d_0"]["mean"] - before["BatchNorm1d_0"]["mean"]).max()
        > 0
    )
    assert (int(state.step), int(state.rejected)) == (101, 0)


@pytest.mark.parametrize(("microbatches", "traces"), [(1, 1), (4, 2)])  # once for the shapes
def test_steps_are_traced_once_per_shape(rng, microbatches, traces):
    state, batch = make(rng)
    loss_fn: Any = chex.assert_max_traces(squared_error, n=traces)
    step = train_step(loss_fn, microbatches=microbatches)
    for _ in range(3):
        state, _ = step(state, batch)
    chex.clear_trace_counter()
    loss_fn = chex.assert_max_traces(squared_error, n=2)
    test = eval_step(loss_fn)
    ragged = [{k: v[i : i + 6] for k, v in batch.items()} for i in (0, 6, 12)]
    for _ in range(2):
        evaluate(test, state, ragged)


def test_a_step_matches_one_written_by_hand(rng):
    state, batch = make(rng)

    def objective(params):
        variables = {"params": params, "batch_stats": state.batch_stats}
        outputs, updates = Net().apply(variables, batch["x"], mutable=["batch_stats"])
        return jnp.mean((outputs - batch["y"]) ** 2), updates["batch_stats"]

    (loss, stats), grads = jax.jit(jax.value_and_grad(objective, has_aux=True))(state.params)
    expected = state.apply_gradients(grads=grads)
    after, metrics = train_step(squared_error, donate=False)(state, batch)
    found = metrics["loss"], after.batch_stats, after.params
    chex.assert_trees_all_close(found, (loss, stats, expected.params), rtol=1e-7, atol=1e-6)


@pytest.mark.parametrize("poison", [np.nan, np.inf, 1e38])
def test_a_rejected_step_changes_only_its_count(rng, poison):
    state, batch = make(rng)
    step = train_step(squared_error, donate=False)
    state, _ = step(state, batch)
    bad = batch | {"y": batch["y"].copy()}
    bad["y"][3] = poison
    after, metrics = step(state, bad)
    assert not metrics["accepted"]
    for name in ("params", "opt_state", "batch_stats"):
        chex.assert_trees_all_equal(getattr(after, name), getattr(state, name))
    assert (int(after.rejected), int(after.step)) == (1, 2)
    again, metrics = step(after, batch)
    assert metrics["accepted"]
    chex.assert_trees_all_equal(again.params, step(state, batch)[0].params)


def test_commit_keeps_all_or_nothing(rng):
    state, _ = make(rng)
    proposed = state.replace(
        params=jax.tree.map(jnp.ones_like, state.params),
        batch_stats=jax.tree.map(jnp.ones_like, state.batch_stats),
    )
    chex.assert_trees_all_equal(commit(jnp.array(True), proposed, state).params, proposed.params)
    refused = commit(jnp.array(False), proposed, state)
    chex.assert_trees_all_equal(
        (refused.params, refused.batch_stats), (state.params, state.batch_stats)
    )


def test_the_state_is_donated_by_default(rng):
    state, batch = make(rng)
    train_step(squared_error, donate=False)(state, batch)
    assert not jax.tree.leaves(state.params)[0].is_deleted()
    train_step(squared_error)(state, batch)
    assert jax.tree.leaves(state.params)[0].is_deleted()


def test_evaluation_counts_each_example_once_and_updates_nothing(rng):
    state, batch = make(rng, size=10)
    before = jax.device_get(state.batch_stats)
    step = eval_step(squared_error)
    whole = evaluate(step, state, [batch])
    ragged = [{k: v[i : i + 4] for k, v in batch.items()} for i in (0, 4, 8)]
    assert evaluate(step, state, ragged) == pytest.approx(whole, rel=1e-6)
    padded = {k: np.concatenate([v[8:], np.zeros_like(v[:2])]) for k, v in batch.items()}
    padded["mask"] = np.array([True, True, False, False])
    assert evaluate(step, state, [*ragged[:2], padded]) == pytest.approx(whole, rel=1e-6)
    chex.assert_trees_all_equal(state.batch_stats, before)


def test_masked_examples_do_not_count_in_the_training_loss(rng):
    state, batch = make(rng)
    mask = np.arange(16) < 12
    wild = batch | {"y": np.where(mask, batch["y"], 1e6).astype(np.float32), "mask": mask}
    _, metrics = train_step(squared_error, donate=False)(state, wild)
    assert metrics["loss"] < 1e3


def test_a_mean_loss_and_a_model_without_batch_norm_work(rng):
    state, batch = make(rng, norm=False)
    assert state.batch_stats == {}
    assert "batch_stats" not in state.variables
    step = train_step(lambda outputs, batch: jnp.mean((outputs - batch["y"]) ** 2))
    after, metrics = step(state, batch)
    assert metrics["accepted"]
    assert int(after.step) == 1


def test_dropout_differs_between_steps_and_repeats_with_the_step_number(rng):
    state, batch = make(rng, dropout=0.5)
    step = train_step(squared_error, apply_kwargs={"train": True}, donate=False)
    losses = [float(step(state.replace(step=n), batch)[1]["loss"]) for n in (0, 1, 0)]
    assert losses[0] == losses[2] != losses[1]
    means = eval_step(squared_error, apply_kwargs={"train": False})
    assert evaluate(means, state, [batch]) == evaluate(means, state, [batch])


def test_evaluating_no_batches_is_an_error(rng):
    state, _ = make(rng)
    message = (
        "`batches` must hold at least one example that counts, got none. An iterator can be used "
        "only once: pass a list, or create it again."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        evaluate(eval_step(squared_error), state, [])


def test_a_loss_of_the_wrong_shape_is_an_error(rng):
    state, batch = make(rng)
    message = (
        "`loss_fn` must return `loss` as a mean, of shape (), or per example, of shape (16,), got "
        "shape (16, 1). Take the mean over the other axes."
    )
    # JAX adds its own note to errors raised during tracing.
    with pytest.raises(ValueError, match=rf"^{re.escape(message)}(\n|$)"):
        eval_step(lambda outputs, batch: outputs[:, None])(state, batch)


def test_decay_mask_excludes_scales_and_biases_of_all_layers():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = bnjax.linen.BatchNorm(False)(nn.Conv(4, (3, 3))(x))
            return nn.Dense(2)(bnjax.BatchNorm2d()(x).mean((1, 2)))

    params = Model().init(jax.random.key(0), jnp.ones((2, 8, 8, 3)))["params"]
    kernels, others = {"kernel": True, "bias": False}, {"scale": False, "bias": False}
    assert bnjax.decay_mask(params) == {
        "Conv_0": kernels,
        "BatchNorm_0": others,
        "BatchNorm2d_0": others,
        "Dense_0": kernels,
    }
    assert optax.adamw(1e-3, mask=bnjax.decay_mask).init(params) is not None


NO_EXAMPLES = {
    "empty": {"x": np.zeros((0, 4), np.float32), "y": np.zeros(0, np.float32)},
    "masked": {
        "x": np.ones((4, 4), np.float32),
        "y": np.ones(4, np.float32),
        "mask": np.zeros(4, bool),
    },
}


@pytest.mark.parametrize("batch", NO_EXAMPLES.values(), ids=NO_EXAMPLES)
def test_a_batch_without_counted_examples_is_rejected(rng, batch):
    state, _ = make(rng)
    after, metrics = train_step(squared_error, donate=False)(state, batch)
    assert not metrics["accepted"]
    assert int(after.rejected) == 1
    chex.assert_trees_all_equal(
        (after.params, after.opt_state, after.batch_stats),
        (state.params, state.opt_state, state.batch_stats),
    )


class WithMode(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        return nn.BatchNorm(use_running_average=not train)(x)[:, 0]


def with_mode() -> TrainState:
    return init_state(WithMode(), optax.sgd(0.1), jax.random.key(0), jnp.ones((2, 4)), train=False)


MISSING = "The model is called with its inputs and `apply_kwargs`, but WithMode.__call__() "
MISSING += "missing 1 required positional argument: 'train'. "
X = {"x": np.ones((4, 4), np.float32), "y": np.ones(4, np.float32)}
MISTAKES = {
    "a batch as input": (
        lambda: init_state(Net(), optax.sgd(0.1), jax.random.key(0), X),
        "`x` must be an input of the model, got a batch that contains `x`: write "
        'init_state(model, tx, key, batch["x"]), or init_state(model, tx, key, batch, inputs="x").',
    ),
    "init without a mode": (
        lambda: init_state(WithMode(), optax.sgd(0.1), jax.random.key(0), X["x"]),
        MISSING + "Pass its other arguments, as in init_state(model, tx, key, x, train=False).",
    ),
    "a step without a mode": (
        lambda: train_step(squared_error)(with_mode(), X),
        MISSING + "Pass its training arguments, as in train_step(loss_fn, apply_kwargs={'train': "
        "True}).",
    ),
    "an evaluation without a mode": (
        lambda: eval_step(squared_error)(with_mode(), X),
        MISSING + "Pass its evaluation arguments, as in eval_step(loss_fn, apply_kwargs={'train': "
        "False}).",
    ),
    "mutable": (
        lambda: train_step(squared_error, apply_kwargs={"mutable": ["batch_stats"]}),
        "`apply_kwargs` must not contain `mutable`: a training step keeps the updates of all "
        "collections.",
    ),
    "a number as loss function": (
        lambda: train_step(3),  # pyright: ignore[reportArgumentType]
        "`loss_fn` must be a function, loss_fn(outputs, batch), got int.",
    ),
} | {
    f"{wrong} as mesh": (
        lambda wrong=wrong: train_step(squared_error, mesh=wrong),  # pyright: ignore
        "`mesh` must be a jax.sharding.Mesh, such as jax.make_mesh((4,), ('data',)), got "
        f"{type(wrong).__name__}.",
    )
    for wrong in (4, [*jax.devices()])
}


@pytest.mark.parametrize(("call", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_raise_errors_that_say_what_to_write(call, message):
    with pytest.raises(TypeError, match=rf"^{re.escape(message)}(\n|$)"):
        call()
