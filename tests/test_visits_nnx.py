"""Every tool handles the layers of nnx models, whatever wraps them and was done to them before."""

import copy
import pickle
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from flax.nnx import bridge

import bnjax
from tests.support.populations import PARTS, X, stranger

pytestmark = pytest.mark.quick_compile


class OwnForm(nnx.BatchNorm):
    """A subclass with more arguments and results, which calls its base class by name."""

    def __call__(self, x, shift=0.0, *, train=None):  # pyright: ignore[reportIncompatibleMethodOverride]
        running = None if train is None else not train
        return nnx.BatchNorm.__call__(self, x - shift, running), x


class NnxNet(nnx.Module):
    def __init__(self, norm: Callable[..., Any] = OwnForm) -> None:
        rngs = nnx.Rngs(0)
        self.dense = nnx.Linear(3, 4, rngs=rngs)
        self.bn = norm(4, rngs=rngs)
        self.table = nnx.Variable({"a": jnp.zeros(4), "b": jnp.ones(2)})
        self.calls = nnx.Variable(jnp.zeros((), jnp.int32))

    def __call__(self, x):
        self.calls[...] += 1
        h = self.dense(x)
        self.sow(nnx.Intermediate, "h", h)
        y = self.bn(h, shift=2.0)[0] if isinstance(self.bn, OwnForm) else self.bn(h - 2.0)
        return y + self.table["a"]


def tabulated(model: Any) -> Any:
    nnx.tabulate(model, X, console_kwargs={"force_terminal": False, "width": 200})
    return model


def displayed(model: Any) -> Any:
    nnx.display(model)
    return model


def called(model: Any) -> Any:
    model(X)
    return model


BEFORE = {
    "new": lambda model: model,
    "tabulated": tabulated,
    "displayed": displayed,
    "pickled": lambda model: pickle.loads(pickle.dumps(model)),
    "copied": copy.deepcopy,
    "called": called,
}
NORMS = {
    "own form": OwnForm,
    "flax": nnx.BatchNorm,
    "1d": bnjax.nnx.BatchNorm1d,
    "drop-in": bnjax.nnx.BatchNorm,
}


@pytest.mark.filterwarnings("ignore:Using 'Module.sow")
@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
@pytest.mark.parametrize("before", BEFORE.values(), ids=BEFORE)
def test_every_tool_handles_nnx_layers_whatever_was_done_before(before, norm, capsys):
    model = before(NnxNet(norm))
    h = X.astype(np.float64) @ np.asarray(model.dense.kernel[...], np.float64) - 2
    state = bnjax.recalibrate(model, None, PARTS)
    np.testing.assert_allclose(state["bn"]["mean"][...], h.mean(0), rtol=2e-5, atol=1e-5)
    np.testing.assert_allclose(state["bn"]["var"][...], h.var(0), rtol=2e-5)
    nnx.update(model, state)
    model.eval()
    kinds = [f.kind for f in bnjax.diagnose(model, None, PARTS).findings]
    assert kinds == []
    kept = np.asarray(model.bn.mean[...])
    bnjax.nnx.freeze(model)
    model.train()
    model(X + 1)
    np.testing.assert_array_equal(model.bn.mean[...], kept)
    bnjax.nnx.unfreeze(model)
    model(X + 1)
    assert np.any(np.asarray(model.bn.mean[...]) != kept)
    capsys.readouterr()


def test_frozen_layers_that_call_the_base_class_by_its_name_keep_their_statistics():
    layer = OwnForm(3, rngs=nnx.Rngs(0))
    bnjax.nnx.freeze(layer)
    layer(jnp.asarray(X), train=True)
    np.testing.assert_array_equal(layer.mean[...], np.zeros(3))


class OwnNorm(nnx.Module):
    def __init__(self) -> None:
        self.mean, self.var = nnx.BatchStat(jnp.zeros(3)), nnx.BatchStat(jnp.ones(3))

    def __call__(self, x):
        return (x - self.mean[...]) / jnp.sqrt(self.var[...] + 1e-5)


class WithOwn(nnx.Module):
    def __init__(self) -> None:
        self.bn = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
        self.own = OwnNorm()

    def __call__(self, x):
        return self.own(self.bn(x))


def test_an_unknown_nnx_batch_norm_is_named():
    model = WithOwn()
    with pytest.raises(ValueError, match=re.escape(stranger("own", "OwnNorm"))):
        bnjax.recalibrate(model, None, PARTS)
    new: Any = bnjax.recalibrate(model, None, PARTS, paths="bn")
    np.testing.assert_allclose(new["bn"]["mean"][...], X.mean(0), rtol=1e-5)
    findings = bnjax.diagnose(model, None, PARTS).findings
    assert "not diagnosed" in [finding.kind for finding in findings]


class OfLinen(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.BatchNorm(use_running_average=True, name="bn")(nn.Dense(3, name="fc")(x))


class OfNNX(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.fc = nnx.Linear(3, 3, rngs=rngs)
        self.bn = nnx.BatchNorm(3, use_running_average=True, rngs=rngs)

    def __call__(self, x):
        return self.bn(self.fc(x))


class ToLinen(nn.Module):
    @nn.compact
    def __call__(self, x):
        return bridge.to_linen(OfNNX, name="inner")(x)


class ToNNX(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.inner = bridge.ToNNX(OfLinen(), rngs=rngs)

    def __call__(self, x):
        return self.inner(x)


@pytest.mark.filterwarnings("ignore:Found unknown module paths")  # Flax sees those of a visit
@pytest.mark.parametrize("tool", [bnjax.recalibrate, bnjax.diagnose, bnjax.fold])
@pytest.mark.parametrize("kind", ["ToLinen", "ToNNX"])
def test_layers_that_a_bridge_hides_are_named(tool, kind):
    if kind == "ToLinen":
        net, variables = ToLinen(), ToLinen().init(jax.random.key(0), X)
    else:
        net, variables = bridge.lazy_init(ToNNX(nnx.Rngs(0)), X), None
    data = X if tool is bnjax.fold else PARTS
    why = rf"({kind}\) can't be reached through|{kind} of) flax.nnx.bridge"
    repair = "use the tool on the wrapped module itself, with its own variables"
    with pytest.raises(ValueError, match=f"(?s)inner/bn.*{why}.*{repair}"):
        tool(net, variables, data)


class Noisy(nnx.Module):
    """A model that draws random numbers in evaluation, too."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.bn, self.rngs = nnx.BatchNorm(3, rngs=rngs), rngs

    def __call__(self, x):
        return self.bn(x + 1e-4 * jax.random.normal(self.rngs.noise(), x.shape))


def test_a_model_may_draw_random_numbers_in_evaluation():
    model = Noisy(nnx.Rngs(0, noise=1))
    state: Any = bnjax.recalibrate(model, None, PARTS)
    np.testing.assert_allclose(state["bn"]["mean"][...], X.mean(0), rtol=1e-3)
    nnx.update(model, state)
    model.eval()
    assert bnjax.diagnose(model, None, PARTS).healthy
    assert model.rngs.noise.count[...] == 0
