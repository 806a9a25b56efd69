"""Policies in layers, and by an override in any model: linen and nnx, bnjax's and Flax's."""

import functools
from contextlib import nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import bnjax
from bnjax.policies import Batch, Blend, Example, Renorm, Running
from bnjax.training import eval_step, evaluate, init_state, train_step
from tests.support.cases import NHWC
from tests.support.oracle import assert_close
from tests.support.strangers import Copied, Sub, Told

pytestmark = pytest.mark.quick_compile

KEY = jax.random.key(0)
POLICIES = (
    Batch(),
    Running(),
    Running(updated=True),
    Renorm(1.5, 0.25),
    Blend(prior=5),
    Example(0.4),
)
each_policy = pytest.mark.parametrize("using", POLICIES, ids=repr)
each_mode = pytest.mark.parametrize("mutable", [True, False], ids=["train", "eval"])


class OfFlax(nn.BatchNorm):
    """A subclass that changes nothing."""


class OfNnx(nnx.BatchNorm):
    """A subclass that adds one."""

    def __call__(self, x, *args, **kwargs):  # pyright: ignore[reportIncompatibleMethodOverride]
        return super().__call__(x, *args, **kwargs) + 1


bnjax.register(Copied)
bnjax.register(Told, {"use_running_average": "not train"})

# How a linen layer is made and called in a mode; its `using` is a field, or comes by override.
LINEN: dict[str, Any] = {
    "torch": (bnjax.BatchNorm2d, lambda layer, x, train: layer(x)),
    "drop-in": (
        functools.partial(bnjax.linen.BatchNorm, momentum=0.9),
        lambda layer, x, train: layer(x, not train),
    ),
    "flax": (
        functools.partial(nn.BatchNorm, momentum=0.9),
        lambda layer, x, train: layer(x, not train),
    ),
    "subclass": (
        functools.partial(OfFlax, momentum=0.9),
        lambda layer, x, train: layer(x, not train),
    ),
    "registered": (Copied, lambda layer, x, train: layer(x, not train)),
    "subclass of registered": (Sub, lambda layer, x, train: layer(x, not train)),
}


class Net(nn.Module):
    """A model with a named layer."""

    kind: str
    using: Any = None

    @nn.compact
    def __call__(self, x, train=True):
        make, call = LINEN[self.kind]
        fields = {"using": self.using} if self.using is not None else {}
        return call(make(name="norm", **fields), x, train)


def arrays(seed: int = 0) -> tuple[Any, Any, Any]:
    rng = np.random.default_rng(seed)
    return NHWC.params(rng), NHWC.batch_stats(rng), jnp.asarray(NHWC.values(rng))


def expected(using: Any, mutable: bool, flax: bool, x: Any = None) -> tuple[Any, Any]:
    """The results of the core, with the convention's running variance."""
    params, stats, own = arrays()
    x = own if x is None else x
    settings = {"mutable": mutable, "using": using, "correction": 1 - flax}
    return bnjax.batch_norm(params, stats, x, **settings)


def applied(net: nn.Module, mutable: bool) -> tuple[Any, Any]:
    params, stats, x = arrays()
    variables = {"params": {"norm": params}, "batch_stats": {"norm": stats}}
    run = jax.jit(
        lambda v, x: net.apply(v, x, mutable, mutable=["batch_stats"] if mutable else False)
    )
    if not mutable:
        return run(variables, x), stats
    y, updates = run(variables, x)
    return y, updates["batch_stats"]["norm"]


@each_policy
@each_mode
@pytest.mark.parametrize("kind", ["torch", "drop-in"])
def test_a_linen_layer_has_a_policy_as_a_field(kind, using, mutable):
    found = applied(Net(kind, using), mutable)
    assert_close(found, expected(using, mutable, kind != "torch"), rtol=2e-6)


@each_policy
@each_mode
@pytest.mark.parametrize("kind", LINEN)
def test_an_override_sets_a_policy_in_any_linen_model(kind, using, mutable):
    with bnjax.override("norm", using=using):
        y, stats = applied(Net(kind), mutable)
    y = y - 1 if kind == "subclass of registered" else y
    assert_close((y, stats), expected(using, mutable, kind != "torch"), rtol=3e-6)
    # Only while it is active.
    y, stats = applied(Net(kind), mutable)
    y = y - 1 if kind == "subclass of registered" else y
    assert_close((y, stats), expected(None, mutable, kind != "torch"), rtol=3e-6)


def test_an_override_removes_a_policy():
    with bnjax.override("**", using=None):
        found = applied(Net("torch", Renorm(1.5, 0.25)), True)
    assert_close(found, expected(None, True, False), rtol=2e-6)


NNX: dict[str, Any] = {
    "torch": bnjax.nnx.BatchNorm2d,
    "drop-in": functools.partial(bnjax.nnx.BatchNorm, momentum=0.9),
    "flax": functools.partial(nnx.BatchNorm, momentum=0.9),
    "subclass": functools.partial(OfNnx, momentum=0.9),
}


class NnxNet(nnx.Module):
    """The same in nnx."""

    def __init__(self, kind: str, using: Any = None) -> None:
        fields = {} if using is None else {"using": using}
        self.norm = NNX[kind](6, rngs=nnx.Rngs(0), **fields)
        params, stats, _ = arrays()
        for name, value in {**params, **stats}.items():
            getattr(self.norm, name)[...] = jnp.asarray(value)

    def __call__(self, x):
        return self.norm(x)


def called(model: Any, mutable: bool) -> tuple[Any, Any]:
    model.train() if mutable else model.eval()
    y = nnx.jit(lambda model, x: model(x))(model, arrays()[2])
    return y, {name: getattr(model.norm, name)[...] for name in ("mean", "var")}


@each_policy
@each_mode
@pytest.mark.parametrize("kind", ["torch", "drop-in"])
def test_an_nnx_layer_has_a_policy_as_an_attribute(kind, using, mutable):
    found = called(NnxNet(kind, using), mutable)
    assert_close(found, expected(using, mutable, kind != "torch"), rtol=2e-6)


@each_policy
@each_mode
@pytest.mark.parametrize("kind", NNX)
def test_an_override_sets_a_policy_in_any_nnx_model(kind, using, mutable):
    model = NnxNet(kind)
    with bnjax.nnx.override(model, "norm", using=using):
        y, stats = called(model, mutable)
    y = y - 1 if kind == "subclass" else y
    assert_close((y, stats), expected(using, mutable, kind != "torch"), rtol=3e-6)
    model = NnxNet(kind)
    y, stats = called(model, mutable)
    y = y - 1 if kind == "subclass" else y
    assert_close((y, stats), expected(None, mutable, kind != "torch"), rtol=3e-6)


@each_policy
@each_mode
def test_an_override_sets_a_policy_in_a_registered_nnx_layer(using, mutable):
    params, stats, x = arrays()
    layer = Told(6, 0.9)
    for name, value in {**params, **stats}.items():
        getattr(layer, name)[...] = jnp.asarray(value)
    with bnjax.nnx.override(layer, using=using):
        y = layer(x, train=mutable)
    after = {name: getattr(layer, name)[...] for name in ("mean", "var")}
    assert_close((y, after), expected(using, mutable, True), rtol=3e-6)


def test_statistics_may_adapt_to_test_data_or_stay():
    net = Net("flax")
    params, stats, x = arrays()
    variables = {"params": {"norm": params}, "batch_stats": {"norm": stats}}
    with bnjax.override("**", using=Blend(prior=5)):
        stay = net.apply(variables, x, False)
        y, moved = net.apply(variables, x, True, mutable=["batch_stats"])
    assert_close(y, stay, rtol=1e-6)
    wanted, after = expected(Blend(prior=5), True, True)
    assert_close((y, moved["batch_stats"]["norm"]), (wanted, after), rtol=3e-6)
    assert not np.allclose(after["mean"], stats["mean"])


def test_a_policy_with_half_precision_in_flax_layers_keeps_their_dtypes():
    params, stats, x = arrays()
    layer = nn.BatchNorm(momentum=0.9, dtype=jnp.bfloat16)
    variables = {"params": params, "batch_stats": stats}
    run = functools.partial(layer.apply, variables, x, False, mutable=["batch_stats"])
    plain: Any = run()[0]
    with bnjax.override("**", using=Renorm(1.5, 0.25)):
        updated: Any = run()
    y, updates = updated
    assert (y.dtype, updates["batch_stats"]["mean"].dtype) == (plain.dtype, jnp.float32)
    wanted, after = expected(Renorm(1.5, 0.25), True, True)
    assert_close(y, wanted, rtol=1e-2)
    assert_close(updates["batch_stats"], after, rtol=1e-6)


def test_statistics_of_flax_and_of_bnjax_are_the_same_tree():
    layer: Any = bnjax.linen.BatchNorm(False, momentum=0.9, using=Renorm())
    variables = layer.init(KEY, arrays()[2])
    wanted = nn.BatchNorm(False).init(KEY, arrays()[2])
    assert jax.tree.structure(variables) == jax.tree.structure(wanted)
    counted: Any = bnjax.BatchNorm2d(using=Renorm.paper()).init(KEY, arrays()[2])
    assert counted["batch_stats"]["count"].dtype == jnp.int32
    assert {*counted["batch_stats"]} == {"mean", "var", "count"}


def squared(y: Any, batch: Any) -> Any:
    return (y - batch["y"]) ** 2


class Critic(nn.Module):
    """Written with Flax's layer, or with bnjax's own count."""

    using: Any = None

    @nn.compact
    def __call__(self, x, train=False):
        if self.using is None:
            norm = nn.BatchNorm(not train, momentum=0.9, name="norm")
        else:
            norm = bnjax.BatchNorm1d(using=self.using, name="norm")
        return nn.Dense(1, name="head")(norm(nn.Dense(6, name="in")(x)))[:, 0]


BATCH = {"x": arrays()[2].reshape(-1, 6), "y": jnp.linspace(-1, 1, 60)}
BAD = {**BATCH, "y": jnp.full(60, jnp.nan)}


def run_steps(model: nn.Module, batches: Any, **fields: Any) -> Any:
    step = train_step(squared, apply_kwargs={"train": True}, donate=False)
    state = init_state(model, optax.sgd(0.01), KEY, BATCH["x"])
    for batch in batches:
        with bnjax.override("norm", **fields) if fields else nullcontext():
            state, _ = step(state, batch)
    return state


def test_a_rejected_step_does_not_advance_the_count():
    state = run_steps(Critic(Renorm.crossq(2)), [BATCH, BAD, BATCH, BAD])
    assert int(state.batch_stats["norm"]["count"]) == 2
    assert int(state.rejected) == 2
    without = run_steps(Critic(Renorm.crossq(2)), [BATCH, BATCH])
    assert_close(state.params, without.params)
    assert_close(state.batch_stats, without.batch_stats)


def test_in_a_training_step_a_flax_layer_follows_the_step_number():
    def limit(count: Any) -> Any:
        return jnp.where(count < 2, 1.0, 1.1)

    using = Renorm(limit, lambda count: jnp.where(count < 2, 0.0, 0.1))
    found = run_steps(Critic(), [BATCH] * 4, using=using)
    assert {*found.batch_stats["norm"]} == {"mean", "var"}
    two = run_steps(Critic(), [BATCH] * 2)
    early = run_steps(Critic(), [BATCH] * 2, using=using)
    assert_close(early.params, two.params, rtol=1e-5, atol=1e-6)
    always = run_steps(Critic(), [BATCH] * 4)
    assert not np.allclose(found.params["in"]["kernel"], always.params["in"]["kernel"], rtol=1e-3)


def test_an_nnx_step_does_not_advance_the_count_of_a_rejected_batch():
    class Model(nnx.Module):
        def __init__(self) -> None:
            self.norm = bnjax.nnx.BatchNorm1d(6, using=Renorm.crossq(2), rngs=nnx.Rngs(0))
            self.head = nnx.Linear(6, 1, rngs=nnx.Rngs(1))

        def __call__(self, x):
            return self.head(self.norm(x))[:, 0]

    model = Model()
    optimizer = nnx.Optimizer(model, optax.sgd(0.01), wrt=nnx.Param)
    step = bnjax.nnx.train_step(squared)
    model.train()
    for batch in (BATCH, BAD, BATCH):
        step(model, optimizer, batch)
    assert int(model.norm.count[...]) == 2  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("using", [Renorm(), Renorm.paper()], ids=repr)
def test_recalibrate_and_fold_treat_renorm_as_batch_norm(using):
    model, plain = Critic(using), Critic(None)
    xs = [BATCH["x"][:30], BATCH["x"][30:] + 2]
    variables: Any = model.init(KEY, BATCH["x"])
    stats = {name: variables["batch_stats"]["norm"][name] for name in ("mean", "var")}
    same = {**variables, "batch_stats": {"norm": stats}}
    new, old = (bnjax.recalibrate(m, v, xs) for m, v in ((model, variables), (plain, same)))
    for name in ("mean", "var"):
        found, wanted = (each["batch_stats"]["norm"][name] for each in (new, old))
        assert_close(found, wanted, rtol=1e-6)
    folded = bnjax.fold(model, new, BATCH["x"])
    assert [row.reason for row in folded.report.rows if row.batch_norm] == [None]
    y = jax.jit(folded.apply)(folded.variables, BATCH["x"])
    assert_close(y, model.apply(new, BATCH["x"]), rtol=1e-5)


def test_micro_batches_of_renorm_use_the_limits_of_one_step():
    model = Critic(Renorm.crossq(2))
    state = init_state(model, optax.sgd(0.01), KEY, BATCH["x"])
    options = {"apply_kwargs": {"train": True}, "donate": False}
    step = train_step(squared, microbatches=2, **options)
    for number in range(1, 4):
        state, metrics = step(state, BATCH)
        assert metrics["accepted"]
        assert int(state.batch_stats["norm"]["count"]) == number


def test_an_eval_step_takes_a_policy_from_an_override():
    state = run_steps(Critic(), [BATCH] * 3)
    step = eval_step(squared, apply_kwargs={"train": False})
    with bnjax.override("norm", using=Batch()):
        found = evaluate(step, state, [BATCH])["loss"]
    y, _ = state.apply_fn(state.variables, BATCH["x"], train=True, mutable=["batch_stats"])
    np.testing.assert_allclose(found, np.mean(squared(y, BATCH)), rtol=1e-5)
    assert abs(evaluate(step, state, [BATCH])["loss"] - found) > 1e-4
