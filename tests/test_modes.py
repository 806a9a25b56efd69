"""Whether a layer that was told no mode trains: by `mutable`, lifted, and across the bridge."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from flax.core.scope import DenyList
from flax.nnx import bridge

import bnjax
from bnjax.core import checks
from tests.support.oracle import assert_close

pytestmark = pytest.mark.quick_compile

KEY = jax.random.key(0)
X = jnp.asarray(np.random.default_rng(0).normal(3, 2, (8, 3)), jnp.float32)
DENIED = DenyList(["params"])
MIXED: dict[str, Any] = {
    "variable_axes": {"params": 0, "batch_stats": 0},
    "split_rngs": {"params": True},
}
EACH: dict[str, Any] = {**MIXED, "in_axes": None}


@pytest.fixture(autouse=True)
def each_warning_anew():
    checks.warn_once.cache_clear()


class Norm(nn.Module):
    @nn.compact
    def __call__(self, x):
        return bnjax.BatchNorm1d(3)(x)


class Step(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return Norm()(x), None


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.scan(Step, **MIXED, length=2)()(x, None)[0]


class Mapped(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.vmap(Norm, **EACH, axis_size=2)()(x).mean(0)


class Nested(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.jit(nn.remat(Scanned))()(Mapped()(x))


MODELS = {
    "plain": Norm(),
    "jit": nn.jit(Norm)(),
    "remat": nn.remat(Norm)(),
    "scan": Scanned(),
    "vmap": Mapped(),
    "all of them": Nested(),
}
each_model = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)


def trains(model: nn.Module, mutable: Any, *, compiled: bool = False) -> bool:
    """Whether the statistics of all layers move, or of none."""
    variables = model.init(KEY, X)
    apply = lambda variables: model.apply(variables, X, mutable=mutable)  # noqa: E731 - for jit
    _, updates = (jax.jit(apply) if compiled else apply)(variables)
    before = jax.tree.leaves(variables["batch_stats"])
    after = jax.tree.leaves(updates["batch_stats"])
    moved = {not np.array_equal(a, b) for a, b in zip(before, after, strict=True)}
    assert len(moved) == 1
    return moved.pop()


@each_model
@pytest.mark.parametrize(
    "mutable",
    [True, "batch_stats", ["batch_stats"], {"batch_stats"}, ["batch_stats", "other"]],
    ids=str,
)
def test_statistics_that_are_mutable_by_name_or_with_everything_train(model, mutable):
    assert trains(model, mutable)


@each_model
@pytest.mark.parametrize("deny", ["params", ["params"], ["params", "losses"], "losses"], ids=str)
def test_a_deny_list_evaluates_and_warns_once_with_what_to_write(model, deny):
    with pytest.warns(UserWarning, match="^mutable=DenyList") as caught:
        assert not any([trains(model, DenyList(deny), compiled=jit) for jit in (False, True)])
    (warning,) = caught
    assert str(warning.message) == (
        f"mutable=DenyList(deny={deny!r}) makes `batch_stats` mutable without naming it, so batch "
        "norms without a mode of their own evaluate, in training too. To train, write "
        "mutable=['batch_stats']; where you can't, as in Keras' FlaxLayer, give the mode: "
        "BatchNorm2d(use_running_average=not training)."
    )
    assert warning.filename == __file__


@pytest.mark.parametrize("use_running_average", [True, False])
@pytest.mark.parametrize("layer", [bnjax.BatchNorm1d(), bnjax.linen.BatchNorm(), nn.BatchNorm()])
def test_a_given_mode_is_followed_under_a_deny_list(layer, use_running_average):
    variables = layer.init(KEY, X, use_running_average=True)
    arguments = {"use_running_average": use_running_average}
    found = layer.apply(variables, X, **arguments, mutable=DENIED)
    assert_close(found, layer.apply(variables, X, **arguments, mutable=["batch_stats"]))


@pytest.mark.parametrize("mutable", [DENIED, ["batch_stats"]], ids=["denied", "named"])
@pytest.mark.parametrize("outer", [DENIED, ["batch_stats"]], ids=["in denied", "in named"])
@pytest.mark.parametrize("inner", [Norm(), Scanned()], ids=["plain", "scan"])
@pytest.mark.filterwarnings("ignore:mutable=DenyList")
def test_a_model_that_a_model_applies_has_its_own_mutable(inner, outer, mutable):
    variables = inner.init(KEY, X)

    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x):
            bnjax.BatchNorm1d(3)(x)
            return inner.apply(variables, x, mutable=mutable)

    (y, updates), _ = Outer().apply(Outer().init(KEY, X), X, mutable=outer)
    expected = inner.apply(variables, X, mutable=mutable is not DENIED and ["batch_stats"])
    assert_close(y, expected if mutable is DENIED else expected[0], rtol=1e-6)
    assert_close(
        updates["batch_stats"], (variables if mutable is DENIED else expected[1])["batch_stats"]
    )


def test_a_bound_model_has_the_mutable_that_it_was_bound_with():
    variables = Norm().init(KEY, X)
    bound = Norm().bind(variables, mutable=["batch_stats"])
    bound(X)
    moved = bound.variables["batch_stats"]
    assert not np.array_equal(moved["BatchNorm1d_0"]["mean"], np.zeros(3))


# linen in nnx


class Inside(nnx.Module):
    """An nnx model with a linen one inside, which gets what the call is given."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.linen = bridge.ToNNX(Norm(), rngs=rngs)

    def __call__(self, x, **arguments):
        return self.linen(x, **arguments)


UNTOLD = (
    "In an nnx model, `ToNNX` of a linen model does not pass on `.train()` or `.eval()`. To train, "
    "call it with mutable=['batch_stats']; to evaluate, with mutable=False.\n"
    "In BatchNorm1d at 'BatchNorm1d_0'."
)


@pytest.mark.parametrize("prepare", [nnx.Module.train, nnx.Module.eval, lambda model: None])
@pytest.mark.parametrize("around", [lambda f: f, nnx.jit], ids=["plain", "jit"])
def test_a_linen_layer_in_an_nnx_model_must_be_told_the_mode(prepare, around):
    model = bridge.lazy_init(Inside(nnx.Rngs(0)), X)
    prepare(model)
    with pytest.raises(ValueError, match=f"^{re.escape(UNTOLD)}"):
        around(lambda model, x: model(x))(model, X)


def test_a_linen_layer_in_an_nnx_model_follows_its_mode():
    model: Any = bridge.lazy_init(Inside(nnx.Rngs(0)), X)
    params, stats = bnjax.init(3)
    y, stats = bnjax.batch_norm(params, stats, X, mutable=True)
    assert_close(model(X, mutable=["batch_stats"]), y, rtol=1e-6)
    assert_close(model.linen.BatchNorm1d_0["mean"][...], stats["mean"], rtol=1e-6)
    expected = bnjax.batch_norm(params, stats, X, mutable=False)[0]
    for mutable in (False, [], ["intermediates"]):
        assert_close(model(X, mutable=mutable), expected, rtol=1e-6)


def test_a_linen_layer_with_a_mode_needs_no_mutable_in_an_nnx_model():
    layer = bridge.ToNNX(bnjax.BatchNorm1d(3, use_running_average=True), rngs=nnx.Rngs(0))
    assert_close(layer.lazy_init(X)(X), X / np.sqrt(1 + 1e-5), rtol=1e-6)


@pytest.mark.parametrize("mutable", [["batch_stats"], False], ids=["train", "eval"])
def test_a_linen_layer_in_nnx_in_linen_follows_the_outer_mutable(mutable):
    inside: Any = bridge.lazy_init(Inside(nnx.Rngs(0)), X)

    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x):
            return inside(x)

    found = Outer().apply({}, X, mutable=mutable)
    expected = Norm().apply(Norm().init(KEY, X), X, mutable=mutable)
    assert_close(found[0] if mutable else found, expected[0] if mutable else expected, rtol=1e-6)


# nnx in linen

IMMUTABLE = (
    "The batch norm at 'bn' was asked to train (use_running_average=False), but its `batch_stats` "
    "are immutable. To train, call `y, updates = model.apply(variables, x, "
    "mutable=['batch_stats'])`; to evaluate, pass use_running_average=True."
)


class Outside(nn.Module):
    """A linen model with an nnx layer inside."""

    kind: Any

    @nn.compact
    def __call__(self, x, **arguments):
        return bridge.to_linen(self.kind, 3, name="bn")(x, **arguments)


def test_an_nnx_layer_in_a_linen_model_trains_where_its_statistics_can_move():
    model = Outside(bnjax.nnx.BatchNorm1d)
    variables = model.init(KEY, X)
    params, stats = bnjax.init(3)
    assert_close(variables["batch_stats"]["bn"], stats)
    y, moved = bnjax.batch_norm(params, stats, X, mutable=True)
    found, updates = model.apply(variables, X, mutable=["batch_stats"])
    assert_close((found, updates["batch_stats"]["bn"]), (y, moved), rtol=1e-6)
    with pytest.raises(ValueError, match=f"^{re.escape(IMMUTABLE)}\nIn BatchNorm1d of 3 features"):
        model.apply(variables, X)
    y = model.apply({**variables, **updates}, X, use_running_average=True)
    assert_close(y, bnjax.batch_norm(params, moved, X, mutable=False)[0], rtol=1e-6)


def test_the_nnx_drop_in_trains_there_as_flaxs_layer_does_and_warns():
    models = [Outside(kind) for kind in (bnjax.nnx.BatchNorm, nnx.BatchNorm)]
    variables = models[1].init(KEY, X)
    expected = models[1].apply(variables, X)
    with pytest.warns(UserWarning, match="^The batch norm at 'bn'") as caught:
        both = [models[0].apply(variables, X) for _ in range(2)]
    assert_close(both, [expected, expected], rtol=1e-5)
    ending = " Here it normalizes with the batch and forgets its statistics."
    assert [str(warning.message) for warning in caught] == [IMMUTABLE + ending]
