"""Training with all kinds of models and optimizers, compared with steps written by hand."""

import re
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from flax import linen as nn
from flax.core import FrozenDict, freeze, unfreeze
from flax.training.dynamic_scale import DynamicScale

import bnjax
from bnjax.core import checks
from bnjax.training import TrainState, eval_step, evaluate, init_state, train_step
from tests.support.strangers import Codebook, Noisy, Spectral

pytestmark = pytest.mark.quick_compile

X = np.asarray(1 + 2 * np.random.default_rng(0).normal(size=(24, 4)), np.float32)
BATCH = {"x": X, "y": X.sum(1)}
TRAIN: dict[str, Any] = {"apply_kwargs": {"train": True}, "donate": False}


def loss(outputs, batch):
    return (outputs - batch["y"]) ** 2


def start(net: Any, tx: Any = None, **options: Any) -> TrainState:
    return init_state(net, optax.sgd(0.1) if tx is None else tx, jax.random.key(0), X, **options)


def close(found: Any, wanted: Any, tol: float = 1e-5) -> None:
    found, wanted = (jax.tree.leaves(tree) for tree in (found, wanted))
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=tol, atol=tol)


def same(found: Any, wanted: Any) -> None:
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(a, b)


class Net(nn.Module):
    """A Flax batch norm between two layers."""

    width: int = 4
    dtype: Any = None
    param_dtype: Any = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, train=False):
        kind: Any = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x = nn.Dense(self.width, **kind, name="dense")(x)
        norm = nn.BatchNorm(not train, momentum=0.9, axis_name=self.axis_name, name="bn", **kind)
        return nn.Dense(1, **kind, name="head")(nn.relu(norm(x)))[:, 0]


def by_hand(net: Any, params: Any, others: Any, **rngs: Any) -> tuple[Any, Any, Any, Any]:
    """The loss, its gradients, the updated collections, and the loss function."""

    def objective(params):
        y, moved = net.apply(
            {"params": params, **others}, X, train=True, mutable=list(others), rngs=rngs or None
        )
        return loss(y, BATCH).mean(), moved

    (value, moved), grads = jax.value_and_grad(objective, has_aux=True)(params)
    return value, grads, moved, lambda p: objective(p)[0]


class WithoutParameters(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        norm = nn.BatchNorm(not train, use_scale=False, use_bias=False, momentum=0.9, name="bn")
        return norm(x).sum(-1)


class WithoutNorm(nn.Module):
    layers: tuple[nn.Module, ...] = (nn.Dense(1),)

    @nn.compact
    def __call__(self, x, train=False):
        return 1 + nn.Sequential((*self.layers, jnp.square))(x).sum(-1)


@pytest.mark.parametrize("number", [1, 2, 12])
@pytest.mark.parametrize("net", [WithoutParameters(), WithoutNorm(), WithoutNorm(()), Net()])
def test_models_train_without_parameters_or_batch_norms(net, number):
    state = start(net)
    others = {"batch_stats": state.batch_stats} if state.batch_stats else {}
    _, grads, moved, _ = by_hand(net, state.params, others)
    after, metrics = train_step(loss, microbatches=number, **TRAIN)(state, BATCH)
    assert metrics["accepted"]
    close(after.batch_stats, moved.get("batch_stats", {}))
    if number == 1 or isinstance(net, WithoutNorm):
        close(after.params, jax.tree.map(lambda p, g: p - 0.1 * g, state.params, grads))
    assert evaluate(eval_step(loss), after, [BATCH])["loss"] > 0


@pytest.mark.parametrize(
    ("stream", "named", "number"),
    [
        ("z", True, 2),
        ("z", False, 12),
        ("drop_path", False, 1),
        ("drop_path", True, 12),
        ("dropout", False, 2),
        ("params", False, 2),
    ],
)
def test_each_step_and_micro_batch_draws_new_numbers_and_updates_collections(stream, named, number):
    rngs = {"rngs": {stream: jax.random.key(5)}} if named else {}
    how: Any = {"apply_kwargs": {"train": True} | rngs, "microbatches": number, "donate": False}
    state, step = start(Noisy(stream)), train_step(loss, **how)
    for _ in range(2):
        state, metrics = step(state, BATCH)
        assert metrics["accepted"]
    log = state.collections["log"]
    assert int(log["calls"]) == 2 * number
    drawn = np.asarray(log["noise"])[: 2 * number]
    assert len(set(drawn.tolist())) == 2 * number
    new = start(Noisy(stream))
    again = step(new, BATCH)[0].collections["log"]["noise"]
    same(again[:number], drawn[:number])
    other = step(new.replace(rng=jax.random.key(9)), BATCH)[0].collections["log"]["noise"]
    assert not np.array_equal(other, again)


@pytest.mark.parametrize("net", [Codebook(), Spectral()], ids=["codebook", "spectral"])
def test_other_collections_are_carried_along_but_sown_ones_are_not(net):
    state = start(net)
    tree = jax.tree.structure(state)
    assert sorted(state.collections) == (["codebook"] if net == Codebook() else [])
    others = {"batch_stats": state.batch_stats, **state.collections}
    value, grads, moved, _ = by_hand(net, state.params, others)
    after, metrics = train_step(loss, **TRAIN)(state, BATCH)
    assert jax.tree.structure(after) == tree
    close(metrics["loss"], value)
    close({"batch_stats": after.batch_stats, **after.collections}, moved)
    close(after.params, jax.tree.map(lambda p, g: p - 0.1 * g, state.params, grads))
    bad = BATCH | {"y": np.full(24, np.nan, np.float32)}
    refused, _ = train_step(loss, **TRAIN)(after, bad)
    same((refused.batch_stats, refused.collections), (after.batch_stats, after.collections))
    parts, metrics = train_step(loss, microbatches=2, **TRAIN)(state, BATCH)
    assert metrics["accepted"]
    if (
        net == Codebook()
    ):  # each micro-batch updates a spectral norm, which changes the kernel for the next
        close(parts.batch_stats["bn"], after.batch_stats["bn"])
    assert np.isfinite(evaluate(eval_step(loss), parts, [BATCH])["loss"])


class Sharded(nn.Module):
    """A model with partitioned variables."""

    @nn.compact
    def __call__(self, x, train=False):
        init = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
        ones = nn.with_partitioning(nn.initializers.ones, ("model",))
        x = nn.Dense(4, kernel_init=init)(x)
        return nn.BatchNorm(not train, momentum=0.9, scale_init=ones, name="bn")(x).sum(-1)


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("kind", [unfreeze, freeze])
@pytest.mark.parametrize("net", [Sharded(), Net()], ids=["partitioned", "plain"])
def test_variables_keep_their_container_types(net, kind, number):
    state = start(net)
    state = state.replace(
        params=kind(state.params),
        batch_stats=kind(state.batch_stats),
        opt_state=state.tx.init(kind(state.params)),
    )
    _, _, moved, _ = by_hand(net, state.params, {"batch_stats": state.batch_stats})
    step = train_step(loss, microbatches=number, **TRAIN)
    after, metrics = step(step(state, BATCH)[0], BATCH)
    assert metrics["accepted"]
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert isinstance(after.batch_stats, FrozenDict) is (kind is freeze)
    close(step(state, BATCH)[0].batch_stats, moved["batch_stats"])
    assert np.isfinite(evaluate(eval_step(loss), after, [BATCH])["loss"])


def test_a_batch_norm_without_parameters_is_frozen():
    state = start(WithoutParameters())
    after, _ = train_step(loss, frozen="bn", **TRAIN)(state, BATCH)
    same(after.batch_stats, state.batch_stats)


class Averaged(TrainState):
    """A state with an average of its parameters and the number of updates."""

    ema: Any
    taken: Any = 0

    def apply_gradients(self, *, grads: Any, **others: Any) -> Any:
        new = super().apply_gradients(grads=grads, **others)
        ema = jax.tree.map(lambda e, p: 0.9 * e + 0.1 * p, self.ema, new.params)
        return new.replace(ema=ema, taken=self.taken + 1)


def test_a_rejected_step_does_not_change_the_fields_of_a_subclass():
    plain = start(Net())
    held = {k: getattr(plain, k) for k in ("params", "batch_stats", "rng", "rejected", "apply_fn")}
    state = Averaged.create(**held, tx=optax.sgd(0.1), ema=plain.params)
    step = train_step(loss, **TRAIN)
    bad = BATCH | {"y": np.full(24, np.inf, np.float32)}
    refused: Any
    refused, metrics = step(state, bad)
    assert not metrics["accepted"]
    same((refused.ema, refused.taken), (state.ema, 0))
    after: Any = step(refused, BATCH)[0]
    close(after.ema, jax.tree.map(lambda e, p: 0.9 * e + 0.1 * p, state.ema, after.params))
    assert (int(after.taken), int(after.step), int(after.rejected)) == (1, 2, 1)


OPTIMIZERS: dict[str, Any] = {
    "adamw": optax.adamw(1e-2, mask=bnjax.decay_mask),
    "schedule_free_adamw": optax.contrib.schedule_free_adamw(1e-2),
    "schedule_free_sgd": optax.contrib.schedule_free_sgd(1e-2),
    "multi_steps": optax.MultiSteps(optax.adam(1e-2), 2),
    "apply_if_finite": optax.apply_if_finite(optax.adam(1e-2), 3),
    "lion": optax.lion(1e-2),
    "ema": optax.chain(optax.adam(1e-2), optax.ema(0.9)),
    "prodigy": optax.contrib.prodigy(),
    "dog": optax.contrib.dog(),
    "lbfgs": optax.lbfgs(1e-2, linesearch=None),
    "lbfgs_zoom": optax.lbfgs(),
    "lbfgs_backtracking": optax.lbfgs(linesearch=optax.scale_by_backtracking_linesearch(5)),
    "sam": optax.contrib.sam(optax.sgd(0.01), optax.sgd(0.1)),
    "opaque_sam": optax.contrib.sam(optax.sgd(0.01), optax.sgd(0.1), opaque_mode=True),
    "plateau": optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau(patience=1, cooldown=1)),
    "polyak": optax.polyak_sgd(),
    "lookahead": optax.lookahead(optax.sgd(0.01), 3, 0.5),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_get_their_extra_arguments_and_match_plain_updates(name):
    net, tx, state = Net(), OPTIMIZERS[name], start(Net(), OPTIMIZERS[name])
    own, stats, slow = state.params, state.batch_stats, name == "lookahead"
    opt, update = tx.init(own), optax.with_extra_args_support(tx).update

    @jax.jit
    def plain(own, opt, stats):
        params = own.fast if slow else own
        value, grads, moved, f = by_hand(net, params, {"batch_stats": stats})
        known = {"value": value, "grad": grads, "value_fn": f}
        known = {"opaque_sam": {"grad_fn": lambda p, _: jax.grad(f)(p)}, "sam": {}}.get(name, known)
        updates, opt = update(grads, opt, own, **known)
        return optax.apply_updates(own, updates), opt, moved["batch_stats"]

    step = train_step(loss, apply_kwargs={"train": True})
    for _ in range(4):
        own, opt, stats = plain(own, opt, stats)
        state, metrics = step(state, BATCH)
        assert metrics["accepted"]
    close((state.params, state.batch_stats), (own, stats), 1e-4)
    close(state.opt_state, opt, 1e-3)


@pytest.mark.parametrize("number", [1, 2])
def test_a_float16_overflow_rejects_the_step_and_halves_the_scale(number):
    net = Net(dtype=jnp.float16)
    state = start(net, loss_scale=DynamicScale(growth_interval=1, scale=1024.0))
    step = train_step(loss, microbatches=number, **TRAIN)
    plain, _ = step(state.replace(loss_scale=None), BATCH)
    scaled, metrics = step(state, BATCH)
    assert metrics["accepted"]
    close((scaled.params, scaled.batch_stats), (plain.params, plain.batch_stats), 2e-3)
    scaled, _ = step(scaled, BATCH)
    assert float(scaled.loss_scale.scale) == 2048  # two accepted steps
    huge = scaled.replace(loss_scale=DynamicScale(scale=2.0**24))
    after, metrics = step(huge, BATCH)
    assert not metrics["accepted"]
    assert np.isfinite(metrics["loss"])
    for name in ("params", "batch_stats", "opt_state"):
        same(getattr(after, name), getattr(huge, name))
    assert (float(after.loss_scale.scale), int(after.rejected)) == (2.0**23, 1)


def test_half_precision_gradients_accumulate_in_float32():
    net = nn.Dense(1, use_bias=False, param_dtype=jnp.bfloat16)
    state = init_state(net, optax.sgd(1.0), jax.random.key(0), np.ones((512, 1), np.float32))
    state = state.replace(params=jax.tree.map(jnp.zeros_like, state.params))
    x = np.full((512, 1), 1.0, np.float32)
    step = train_step(lambda y, _: -y[:, 0], microbatches=512, donate=False)
    after: Any = step(state, {"x": x})[0]
    assert after.params["kernel"].dtype == jnp.bfloat16
    assert float(after.params["kernel"][0, 0]) == 1  # 256 + 1 is 256 in bfloat16


def test_a_donated_state_is_an_error_but_its_variables_remain():
    state = start(Net())
    kept = state.variables
    wanted = jax.device_get(kept)
    after, _ = train_step(loss, apply_kwargs={"train": True})(state, BATCH)
    same(kept, wanted)
    message = (
        "This state was passed to an earlier step, which reused its memory, so its arrays are "
        "deleted. Use the state that the step returned, state, metrics = step(state, batch); or "
        "keep this one with train_step(..., donate=False)."
    )
    for step in (train_step(loss), eval_step(loss)):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            step(state, BATCH)
    assert np.isfinite(evaluate(eval_step(loss), after, [BATCH])["loss"])


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("devices", [None, 4])
def test_an_axis_name_needs_no_mapped_axis(devices, number):
    mesh = None if devices is None else jax.make_mesh((devices,), ("data",))
    step = train_step(loss, mesh=mesh, microbatches=number, **TRAIN)
    after, metrics = step(start(Net(axis_name="batch")), BATCH)
    wanted, _ = train_step(loss, microbatches=number, **TRAIN)(start(Net()), BATCH)
    assert metrics["accepted"]
    close((after.params, after.batch_stats), (wanted.params, wanted.batch_stats))


def test_metrics_may_be_called_count_and_accepted():
    def named(outputs, batch):
        return loss(outputs, batch), {name: batch["y"] * 0 + 7 for name in ("count", "accepted")}

    state = start(Net())
    _, metrics = train_step(named, microbatches=2, **TRAIN)(state, BATCH)
    assert (float(metrics["count"]), float(metrics["accepted"])) == (7, 7)
    found, plain = (evaluate(eval_step(f), state, [BATCH, BATCH]) for f in (named, loss))
    assert found == pytest.approx({"loss": plain["loss"], "count": 7, "accepted": 7})


def warned(**options: Any) -> list[str]:
    step = train_step(loss, donate=False, **options)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        step(step(start(Net(width=5)), BATCH)[0], BATCH)
    return [str(each.message) for each in found]


def test_a_step_that_updates_no_statistics_warns_once():
    checks.warn_once.cache_clear()
    assert warned() == [
        "This training step updates no running statistics: the batch norm at 'bn' runs in "
        "evaluation mode. Pass training arguments, such as apply_kwargs={'train': True}, or call "
        "model.train() on an nnx model; to freeze all statistics, pass frozen='**'."
    ]
    assert warned() == []
    checks.warn_once.cache_clear()
    assert warned(frozen="**") == warned(apply_kwargs={"train": True}) == []
    with bnjax.freeze("**"):
        assert warned(apply_kwargs={"train": True}) == warned() == []


class Tower(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = Net(name="encoder")(x, train)[:, None]
        return Net(name="decoder")(x, train)


@pytest.mark.parametrize("number", [1, 2])
def test_a_frozen_encoder_keeps_parameters_statistics_and_mode(number):
    state, free = start(Tower(), optax.adamw(0.1, weight_decay=0.1)), ("encoder", "decoder")
    step = train_step(loss, microbatches=number, **TRAIN)
    state, _ = step(state, BATCH)  # gives the optimizer some momentum
    frozen = train_step(loss, microbatches=number, frozen="encoder/**", **TRAIN)
    after, metrics = frozen(state, BATCH)
    held, moved = ((after.params[n], after.batch_stats[n]) for n in free)
    same(held, (state.params["encoder"], state.batch_stats["encoder"]))
    before = state.params["decoder"], state.batch_stats["decoder"]
    assert jax.tree.all(jax.tree.map(lambda a, b: np.abs(a - b).max() > 0, moved, before))
    parts = [{c: tree[name] for c, tree in state.variables.items()} for name in free]
    fed: Any = Net().apply(parts[0], X)
    fed = fed[:, None]
    y, new = Net().apply(parts[1], fed, train=True, mutable=["batch_stats"])
    close(moved[1], new["batch_stats"])
    if number == 1:
        close(metrics["loss"], loss(y, BATCH).mean())


def test_lookahead_freezes_fast_and_slow_parameters():
    state = start(Tower(), optax.lookahead(optax.adamw(0.1, weight_decay=0.1), 2, 0.5))
    before, step = state, train_step(loss, frozen="encoder/**", **TRAIN)
    for _ in range(2):
        state, _ = step(state, BATCH)
    for name in ("fast", "slow"):
        after, old = getattr(state.params, name), getattr(before.params, name)
        same(after["encoder"], old["encoder"])
        assert jax.tree.all(
            jax.tree.map(lambda a, b: (a != b).any(), after["decoder"], old["decoder"])
        )
