"""Every tool handles every kind of layer: subclasses, lifted and shared ones, linen and nnx."""

import re
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax.core import FrozenDict, freeze

import bnjax
from bnjax.training import init_state, train_step
from tests.support.populations import PARTS, X, stranger

pytestmark = pytest.mark.quick_compile


class ByTrain(nn.BatchNorm):
    @nn.compact
    def __call__(self, x, train):  # pyright: ignore[reportIncompatibleMethodOverride]
        return super().__call__(x, use_running_average=not train)


class NotCompact(nn.BatchNorm):
    def __call__(self, x, training=True):  # pyright: ignore[reportIncompatibleMethodOverride]
        return super().__call__(x, use_running_average=not training)


class ByName(nn.BatchNorm):
    @nn.compact
    def __call__(self, x, *, training):  # pyright: ignore[reportIncompatibleMethodOverride]
        return nn.BatchNorm.__call__(self, x, use_running_average=not training)


class Activated(bnjax.linen.BatchNorm):
    def __call__(self, x, train, *, slope=0.0):  # pyright: ignore[reportIncompatibleMethodOverride]
        return nn.leaky_relu(super().__call__(x, use_running_average=not train), slope)


class Shifted(bnjax.BatchNorm1d):
    """A subclass that shifts its input and returns more than an array."""

    def __call__(self, x, train, shift=2.0):  # pyright: ignore[reportIncompatibleMethodOverride]
        del train  # a layer with PyTorch's fields trains if its statistics are mutable
        return super().__call__(x - shift), x


class Rematerialized(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        return nn.remat(nn.BatchNorm)(use_running_average=not train, name="norm")(x)


class Scanned(nn.Module):
    """Four layers whose statistics are stacked along the last axis."""

    @nn.compact
    def __call__(self, x, train):
        axes: Any = {"params": 0, "batch_stats": -1}
        scan = nn.scan(
            lambda norm, x, _: (norm(x, use_running_average=not train), None),
            variable_axes=axes,
            split_rngs={"params": True},
            length=4,
        )
        return scan(nn.BatchNorm(name="norm"), x, None)[0]


class Mapped(nn.Module):
    """One layer for both halves of the examples, with its own axis name."""

    @nn.compact
    def __call__(self, x, train):
        axes: Any = {"params": None, "batch_stats": None}
        layer = nn.vmap(
            nn.BatchNorm, variable_axes=axes, split_rngs={"params": False}, axis_name="half"
        )
        norm = layer(use_running_average=not train, axis_name="half", name="norm")
        return norm(x.reshape(2, -1, 3)).reshape(x.shape)


KINDS: dict[str, tuple[Callable[..., Any], float]] = {
    "flax": (lambda name: lambda x, train: nn.BatchNorm(name=name)(x, not train), 0),
    "another signature": (lambda name: ByTrain(name=name), 0),
    "not compact": (lambda name: NotCompact(name=name), 0),
    "a keyword, and the base class by its name": (
        lambda name: lambda x, train: ByName(name=name)(x, training=train),
        0,
    ),
    "something after": (lambda name: Activated(name=name), 0),
    "something before": (lambda name: lambda x, train: Shifted(name=name)(x, train)[0], 2),
    "remat": (lambda name: Rematerialized(name=name), 0),
    "scan": (lambda name: Scanned(name=name), 0),
    "vmap": (lambda name: Mapped(name=name), 0),
}


class Net(nn.Module):
    kind: str

    @nn.compact
    def __call__(self, x, train=False):
        layer = KINDS[self.kind][0]("layer")
        return nn.Dense(2, name="head")(layer(x, train))


def trained(kind: str) -> tuple[Net, Any]:
    net = Net(kind)
    return net, net.init(jax.random.key(0), X)


def statistics(variables: Any) -> tuple[np.ndarray, ...]:
    """Mean and variance of the (first) layer."""
    stats = variables["batch_stats"]["layer"]
    stats = stats.get("norm", stats)
    return tuple(np.asarray(stats[name]).reshape(3, -1)[:, 0] for name in ("mean", "var"))


each_kind = pytest.mark.parametrize("kind", KINDS)


@each_kind
def test_recalibrate_measures_what_the_library_code_of_a_layer_sees(kind):
    net, variables = trained(kind)
    several: Any = ({}, {"sequential": True}, {"apply_kwargs": {"train": True}})
    for settings in several:
        mean, var = statistics(bnjax.recalibrate(net, variables, PARTS, **settings))
        np.testing.assert_allclose(mean, X.mean(0, np.float64) - KINDS[kind][1], rtol=2e-6)
        np.testing.assert_allclose(var, X.astype(np.float64).var(0), rtol=2e-6)


@each_kind
def test_freeze_keeps_a_layer_and_override_changes_it(kind):
    net, variables = trained(kind)
    step = jax.jit(lambda v: net.apply(v, X, train=True, mutable=["batch_stats"])[1])
    flax = kind != "something before"
    usual = statistics(step(variables))
    with bnjax.freeze("layer/**"):
        frozen = statistics(step(variables))
    with bnjax.override("layer/**", momentum=0.75 if flax else 0.25):
        faster = statistics(step(variables))
    for found, expected in zip(frozen, statistics(variables), strict=True):
        np.testing.assert_array_equal(found, expected)
    np.testing.assert_allclose(faster[0], usual[0] * (25 if flax else 2.5), rtol=1e-5)


@each_kind
def test_micro_batches_move_the_statistics_as_the_whole_batch_does(kind):
    net = Net(kind)
    state = init_state(net, optax.sgd(0.0), jax.random.key(0), X)
    found = []
    for parts in (1, 2):
        if kind == "vmap" and parts > 1:
            continue  # of other halves
        step = train_step(
            lambda y, _: (y**2).sum(-1),
            apply_kwargs={"train": True},
            microbatches=parts,
            donate=False,
        )
        found.append(statistics({"batch_stats": step(state, {"x": X})[0].batch_stats}))
    for one, other in zip(found[0], found[-1], strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)


@each_kind
def test_diagnose_finds_nothing_in_a_healthy_layer_and_reports_its_path(kind):
    net, variables = trained(kind)
    right = bnjax.recalibrate(net, variables, PARTS)
    parts = [jnp.asarray(X), jnp.asarray(X[::-1])]
    assert [finding.kind for finding in bnjax.diagnose(net, right, parts).findings] == []
    assert bnjax.diagnose(net, variables, parts).findings[0].kind == "never updated"


class Folding(nn.Module):
    norm: Callable[..., Any]

    @nn.compact
    def __call__(self, x, train=False):
        return self.norm(name="norm")(nn.Dense(4, name="dense")(x), train)


@pytest.mark.parametrize("norm", [ByTrain, NotCompact, Activated])
def test_a_subclass_is_folded_with_the_code_around_its_layer(norm):
    net: Any = Folding(norm)
    variables = bnjax.recalibrate(net, net.init(jax.random.key(0), X), PARTS)
    folded = bnjax.fold(net, variables, X)
    assert [row.reason for row in folded.report.rows] == [None]
    np.testing.assert_allclose(
        folded.apply(folded.variables, X), net.apply(variables, X), atol=1e-5
    )


class Spectral(nn.Module):
    @nn.compact
    def __call__(self, x):
        moving = self.is_mutable_collection("batch_stats")
        return bnjax.BatchNorm1d(name="bn")(nn.SpectralNorm(nn.Dense(3))(x, update_stats=moving))


def test_other_variables_next_to_the_layers_stay_unchanged():
    net = Spectral()
    variables = net.init(jax.random.key(0), X)
    new = bnjax.recalibrate(net, variables, PARTS)
    flat, other = (jax.tree_util.tree_leaves_with_path(v) for v in (variables, new))
    changed = [k for (k, a), (_, b) in zip(flat, other, strict=True) if not np.array_equal(a, b)]
    names = {jax.tree_util.keystr(keys, simple=True, separator="/") for keys in changed}
    assert names == {"batch_stats/bn/mean", "batch_stats/bn/var"}


class Twice(nn.Module):
    """A shared layer, one that is called only on request, and sown values."""

    @nn.compact
    def __call__(self, x, both=True):
        norm = nn.BatchNorm(use_running_average=not self.is_mutable_collection("batch_stats"))
        x = norm(x) + norm(2 * x)
        self.sow("intermediates", "h", x)
        if both or self.is_initializing():
            x = bnjax.BatchNorm1d(name="extra")(x)
        return x


def test_a_layer_that_matches_the_paths_but_is_not_called_is_named():
    net = Twice()
    variables = net.init(jax.random.key(0), X)
    message = (
        "All batch norms that match `paths` must be measured, but ['extra'] were not called: pass "
        "what enables them in `apply_kwargs`. Or name only the others in `paths`."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        bnjax.recalibrate(net, variables, PARTS, apply_kwargs={"both": False})
    settings: Any = {"apply_kwargs": {"both": False}, "paths": "BatchNorm_*"}
    new = bnjax.recalibrate(net, variables, PARTS, **settings)["batch_stats"]
    both = np.concatenate([X, 2 * X]).astype(np.float64)
    np.testing.assert_allclose(new["BatchNorm_0"]["mean"], both.mean(0), rtol=1e-5)
    np.testing.assert_array_equal(new["extra"]["mean"], variables["batch_stats"]["extra"]["mean"])


def test_frozen_dicts_come_back_as_frozen_dicts():
    net, variables = trained("flax")
    for given in (
        freeze(variables),
        {**variables, "batch_stats": freeze(variables["batch_stats"])},
    ):
        new = bnjax.recalibrate(net, given, PARTS)
        assert jax.tree.structure(new) == jax.tree.structure(given)
        assert isinstance(new["batch_stats"], FrozenDict)
        assert bnjax.diagnose(net, new, PARTS).healthy
        with bnjax.freeze("layer"):
            net.apply(given, X, train=True, mutable=["batch_stats"])
        assert bnjax.merge_batch_stats(
            jax.tree.map(lambda a: jnp.stack([a, a]), new["batch_stats"])
        )


class Copied(nn.Module):
    """Somebody else's batch norm, with Flax's names."""

    @nn.compact
    def __call__(self, x, train):
        mean = self.variable("batch_stats", "mean", jnp.zeros, x.shape[-1:])
        var = self.variable("batch_stats", "var", jnp.ones, x.shape[-1:])
        if train and not self.is_initializing():
            mean.value, var.value = 0.9 * mean.value + 0.1 * x.mean(0), var.value
        return (x - mean.value) / jnp.sqrt(var.value + 1e-5)


class Beside(nn.Module):
    known: bool = True

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(3)(Copied(name="own")(x, train))
        return nn.BatchNorm(use_running_average=not train, name="bn")(x) if self.known else x


STRANGER = stranger("own", "Copied")


@pytest.mark.parametrize("known", [True, False])
def test_every_tool_names_an_unknown_batch_norm(known):
    net = Beside(known)
    variables = net.init(jax.random.key(0), X)
    state = init_state(net, optax.sgd(0.0), jax.random.key(0), X)
    step = train_step(lambda y, _: (y**2).sum(-1), microbatches=2, donate=False)

    def frozen() -> None:
        with bnjax.freeze("**"):
            net.apply(variables, X, train=True, mutable=["batch_stats"])

    for use in (
        frozen,
        lambda: bnjax.recalibrate(net, variables, PARTS),
        lambda: step(state, {"x": X}),
    ):
        with pytest.raises(ValueError, match=re.escape(STRANGER)):
            use()
    if known:
        (finding,) = (f for f in bnjax.diagnose(net, variables, PARTS).findings if f.layer == "own")
        assert (finding.kind, finding.severity) == ("not diagnosed", "warning")
        h = X @ np.asarray(variables["params"]["Dense_0"]["kernel"])
        new = bnjax.recalibrate(net, variables, PARTS, paths="bn")["batch_stats"]
        np.testing.assert_allclose(new["bn"]["mean"], h.mean(0), rtol=1e-4)
    else:
        with pytest.raises(ValueError, match=re.escape(STRANGER)):
            bnjax.diagnose(net, variables, PARTS)


def test_merging_requires_stacked_statistics():
    _, variables = trained("flax")
    message = (
        "`batch_stats` must be stacked along axis 0, but the mean at 'layer' has shape (3,). A "
        "single set needs no merging."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        bnjax.merge_batch_stats(variables["batch_stats"])


def test_the_tools_run_without_jit():
    net, variables = trained("another signature")
    state = init_state(net, optax.sgd(0.1), jax.random.key(0), X)

    def use() -> list[Any]:
        step = train_step(
            lambda y, _: (y**2).sum(-1), microbatches=2, donate=False, apply_kwargs={"train": True}
        )
        with bnjax.freeze("layer"):
            frozen = net.apply(variables, X, train=True, mutable=["batch_stats"])
        right = bnjax.recalibrate(net, variables, PARTS)
        findings = bnjax.diagnose(net, right, PARTS).findings
        return [frozen, right, step(state, {"x": X})[0].params, len(findings)]

    expected = use()
    with jax.disable_jit():
        found = use()
    chex.assert_trees_all_close(found, expected, rtol=2e-5, atol=2e-5)
