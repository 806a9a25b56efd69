"""Training steps for nnx models, compared with steps by hand and with the linen step."""

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
from flax.training.dynamic_scale import DynamicScale

import bnjax
from bnjax.core import checks
from bnjax.training import eval_step, evaluate, history, init_state, train_step

pytestmark = pytest.mark.quick_compile

X = np.random.default_rng(0).normal(1, 2, (4, 16, 3)).astype(np.float32)
BATCHES = [{"x": x, "y": x.sum(1)} for x in X]
MASKED = [{**batch, "mask": np.arange(16) < 13} for batch in BATCHES]


class Net(nnx.Module):
    def __init__(self, dropout: float = 0.0, norm: Any = nnx.BatchNorm):
        rngs = nnx.Rngs(0)
        self.a = nnx.Linear(3, 8, rngs=rngs)
        self.bn = norm(8, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)
        self.b = nnx.Linear(8, 1, rngs=rngs)

    def __call__(self, x):
        return self.b(self.dropout(nnx.relu(self.bn(self.a(x)))))[:, 0]


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(8, name="a")(x)
        x = nn.BatchNorm(use_running_average=not train, name="bn")(x)
        return nn.Dense(1, name="b")(nn.relu(x))[:, 0]


def loss_fn(outputs, batch):
    error = (outputs - batch["y"]) ** 2
    return error, {"distance": jnp.sqrt(error)}


def start(tx: Any = None, **fields: Any) -> tuple[Any, Any]:
    model: Any = Net(**fields)
    model.train()
    return model, nnx.Optimizer(model, tx or optax.sgd(1e-2, momentum=0.9), wrt=nnx.Param)


def arrays(*nodes: Any) -> Any:
    """All arrays of models and optimizers, with random keys as integers."""
    leaves = jax.tree.leaves([nnx.state(node) for node in nodes])
    is_key = [jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) for leaf in leaves]
    pairs = zip(leaves, is_key, strict=True)
    return [np.asarray(jax.random.key_data(leaf) if key else leaf) for leaf, key in pairs]


@pytest.mark.parametrize("norm", [nnx.BatchNorm, bnjax.nnx.BatchNorm, bnjax.nnx.BatchNorm1d])
def test_steps_match_those_written_by_hand(norm):
    @nnx.jit
    def by_hand(model, optimizer, batch):
        def loss(model):
            return ((model(batch["x"]) - batch["y"]) ** 2).mean()

        optimizer.update(model, nnx.grad(loss)(model))

    expected, found = start(norm=norm, dropout=0.3), start(norm=norm, dropout=0.3)
    step = bnjax.nnx.train_step(loss_fn)
    for batch in BATCHES:
        by_hand(*expected, batch)
        step(*found, batch)
    chex.assert_trees_all_close(arrays(*found), arrays(*expected), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("batches", [BATCHES, MASKED], ids=["all", "masked"])
@pytest.mark.parametrize("on_mesh", [False, True], ids=["one device", "mesh"])
@pytest.mark.parametrize("microbatches", [1, 2])
def test_linen_and_nnx_agree(microbatches, on_mesh, batches):
    mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2]) if on_mesh else None
    options: Any = {"microbatches": microbatches, "mesh": mesh}
    model, optimizer = start()
    tx, params = optimizer.tx, nnx.to_pure_dict(nnx.state(model, nnx.Param))
    state: Any = init_state(Linen(), tx, jax.random.key(0), X[0])
    state = state.replace(params=jax.tree.map(jnp.array, params), opt_state=tx.init(params))
    records: list[dict[str, Any]] = [{}, {}]
    step = history(bnjax.nnx.train_step(loss_fn, **options), records[0])
    linen = history(train_step(loss_fn, apply_kwargs={"train": True}, **options), records[1])
    for batch in batches:
        metrics = step(model, optimizer, batch)
        state, expected = linen(state, batch)
        chex.assert_trees_all_close(metrics, expected, rtol=1e-6)
    found = [nnx.to_pure_dict(nnx.state(model, kind)) for kind in (nnx.Param, nnx.BatchStat)]
    chex.assert_trees_all_close(found, [state.params, state.batch_stats], rtol=1e-6, atol=1e-6)
    chex.assert_trees_all_close(*records, rtol=1e-5, atol=1e-6)
    totals = bnjax.nnx.evaluate(bnjax.nnx.eval_step(loss_fn, mesh=mesh), model, batches)
    again = evaluate(eval_step(loss_fn, mesh=mesh), state, batches)
    assert totals == pytest.approx(again, rel=1e-6)


@pytest.mark.parametrize("microbatches", [1, 2])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_rejected_step_changes_nothing(bad, microbatches):
    node = start(optax.adam(1e-2), dropout=0.5)
    step = bnjax.nnx.train_step(loss_fn, microbatches=microbatches)
    step(*node, BATCHES[0])
    before = arrays(*node)
    metrics = step(*node, {**BATCHES[1], "x": X[1] * bad})
    assert not metrics["accepted"]
    chex.assert_trees_all_equal(arrays(*node), before)
    assert step(*node, BATCHES[1])["accepted"]
    assert int(step.rejected) == 1


def test_a_batch_without_counted_examples_is_rejected():
    node = start(optax.adam(1e-2))
    before = arrays(*node)
    step = bnjax.nnx.train_step(loss_fn)
    assert not step(*node, {**BATCHES[0], "mask": np.zeros(16, bool)})["accepted"]
    chex.assert_trees_all_equal(arrays(*node), before)
    assert int(step.rejected) == 1


@pytest.mark.parametrize("microbatches", [2, 4, 16])
def test_micro_batches_give_the_statistics_of_the_whole_batch(microbatches):
    whole, parts = start(norm=bnjax.nnx.BatchNorm), start(norm=bnjax.nnx.BatchNorm)
    double = {name: np.concatenate([BATCHES[0][name], BATCHES[1][name]]) for name in ("x", "y")}
    bnjax.nnx.train_step(loss_fn)(*whole, double)
    bnjax.nnx.train_step(loss_fn, microbatches=microbatches)(*parts, double)
    found, expected = (nnx.state(model, nnx.BatchStat) for model, _ in (parts, whole))
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-6)


def test_each_micro_batch_draws_its_own_random_numbers():
    class Noise(nnx.Module):
        def __init__(self):
            self.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(0))
            self.scale = nnx.Param(jnp.ones(()))

        def __call__(self, x):
            return self.dropout(x * self.scale)

    model = Noise()
    optimizer = nnx.Optimizer(model, optax.sgd(0.0), wrt=nnx.Param)
    step = bnjax.nnx.train_step(lambda y, _: (y.sum(-1), {"y": y.sum(-1)}), microbatches=2)
    x = np.ones((2, 1000), np.float32)
    sums = [float(step(model, optimizer, {"x": x})["loss"]) for _ in range(3)]
    assert len(set(sums)) == 3
    streams: Any = model.dropout.rngs
    assert int(streams.count[...]) == 6


def test_frozen_modules_keep_their_values_and_types():
    model, optimizer = start(optax.adamw(1e-2, weight_decay=0.1))
    before = arrays(model.a, model.bn)
    step = bnjax.nnx.train_step(loss_fn, frozen=("a", "bn"))
    for batch in BATCHES:
        step(model, optimizer, batch)
    chex.assert_trees_all_equal(arrays(model.a, model.bn), before)
    assert type(model.bn) is nnx.BatchNorm
    assert not np.array_equal(model.b.kernel[...], Net().b.kernel[...])
    with pytest.raises(ValueError, match=r"^The pattern 'c' matches no module"):
        bnjax.nnx.train_step(loss_fn, frozen="c")(model, optimizer, BATCHES[0])


def test_parameters_outside_wrt_do_not_change():
    model, _ = start()
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.All(nnx.Param, nnx.PathContains("b")))
    before = arrays(model.a)
    bnjax.nnx.train_step(loss_fn)(model, optimizer, BATCHES[0])
    chex.assert_trees_all_equal(arrays(model.a), before)
    assert not np.array_equal(model.b.kernel[...], Net().b.kernel[...])


@pytest.mark.parametrize(
    "tx",
    {
        "plateau": optax.chain(optax.sgd(0.01), optax.contrib.reduce_on_plateau(patience=1)),
        "polyak_sgd": optax.polyak_sgd(),
        "lbfgs": optax.lbfgs(),
        "prodigy": optax.contrib.prodigy(),
        "MultiSteps": optax.MultiSteps(optax.sgd(0.01), 2),
    }.items(),
    ids=lambda pair: pair[0],
)
def test_optimizers_get_their_extra_arguments(tx):
    def loss(model, batch):
        return ((model(batch["x"]) - batch["y"]) ** 2).mean()

    @nnx.jit
    def by_hand(model, optimizer, batch):
        graph, _, others = nnx.split(model, nnx.Param, ...)
        others = nnx.as_pure(others)
        value, grads = nnx.value_and_grad(loss)(model, batch)
        known = {
            "value": value,
            "grad": grads,
            "value_fn": lambda params: loss(nnx.merge(graph, params, others), batch),
        }
        takes = tx[0] in ("plateau", "polyak_sgd", "lbfgs")
        optimizer.update(model, grads, **(known if takes else {}))

    expected, found = start(tx[1]), start(tx[1])
    step = bnjax.nnx.train_step(loss_fn, donate=True)
    for batch in BATCHES[:3]:
        by_hand(*expected, batch)
        step(*found, batch)
    chex.assert_trees_all_close(arrays(*found), arrays(*expected), rtol=1e-4, atol=1e-5)


def test_an_overflow_lowers_the_scale_and_rejects_the_step():
    node = start()
    step = bnjax.nnx.train_step(loss_fn, loss_scale=DynamicScale(scale=jnp.float32(2**10)))
    step(*node, BATCHES[0])
    before = arrays(*node)
    step(*node, {**BATCHES[0], "y": np.full(16, np.inf, np.float32)})
    chex.assert_trees_all_equal(arrays(*node), before)
    assert (float(step.loss_scale.scale), int(step.rejected)) == (2**9, 1)


def test_a_loss_scale_does_not_change_results():
    scaled, plain = start(), start()
    bnjax.nnx.train_step(loss_fn, loss_scale=DynamicScale())(*scaled, BATCHES[0])
    bnjax.nnx.train_step(loss_fn)(*plain, BATCHES[0])
    chex.assert_trees_all_close(arrays(*scaled), arrays(*plain), rtol=1e-5, atol=1e-6)


def test_a_step_is_traced_once_per_shape():
    traced: Any = chex.assert_max_traces(loss_fn, n=2)
    step = bnjax.nnx.train_step(traced)
    node = start()
    for batch in BATCHES:
        step(*node, batch)
    step(*start(), {name: leaf[:8] for name, leaf in BATCHES[0].items()})


def test_a_step_keeps_the_mode_of_the_model_and_warns_in_eval_mode():
    checks.warn_once.cache_clear()
    model, optimizer = start()
    model.eval()
    before = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
    with pytest.warns(
        UserWarning, match=r"the batch norm at 'bn' runs in evaluation mode.*\.train"
    ):
        bnjax.nnx.train_step(loss_fn)(model, optimizer, BATCHES[0])
    chex.assert_trees_all_equal(nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)), before)


def test_evaluation_changes_nothing_and_runs_in_eval_mode():
    model, _ = start(dropout=0.5)
    before = arrays(model)
    step = bnjax.nnx.eval_step(loss_fn)
    found = bnjax.nnx.evaluate(step, model, BATCHES)
    chex.assert_trees_all_equal(arrays(model), before)
    assert model.bn.use_running_average is False
    model.eval()
    errors = [np.asarray((model(batch["x"]) - batch["y"]) ** 2) for batch in BATCHES]
    assert found["loss"] == pytest.approx(np.mean(errors), rel=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    {
        "linen model": (
            lambda: bnjax.nnx.train_step(loss_fn)(Linen(), None, {}),  # pyright: ignore
            "`model` must be a flax.nnx.Module, got Linen. For linen models, use "
            "bnjax.training.train_step and eval_step.",
        ),
        "no optimizer": (
            lambda: bnjax.nnx.train_step(loss_fn)(Net(), optax.sgd(0.1), {}),  # pyright: ignore
            "`optimizer` must be an nnx.Optimizer, such as nnx.Optimizer(model, optax.adam(1e-3), "
            "wrt=nnx.Param), got GradientTransformationExtraArgs.",
        ),
        "an nnx model in linen": (
            lambda: init_state(Net(), optax.sgd(0.1), jax.random.key(0), X[0]),  # pyright: ignore
            "`model` is an nnx model, which holds its own parameters and statistics. Train it with "
            "optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param); step = "
            "bnjax.nnx.train_step(loss_fn); metrics = step(model, optimizer, batch).",
        ),
    }.values(),
    ids=["linen model", "no optimizer", "an nnx model in linen"],
)
def test_mistakes_raise_errors_that_say_what_to_write(call, message):
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        call()
