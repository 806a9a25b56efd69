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


class ToLinen(nn.Module):
    @nn.compact
    def __call__(self, x):
        return bridge.to_linen(bnjax.nnx.BatchNorm1d, 3, name="bn")(nn.BatchNorm(True)(x))


def test_layers_that_a_bridge_hides_are_named():
    net = ToLinen()
    variables = net.init(jax.random.key(0), X)
    flax_sees_more = pytest.warns(UserWarning, match="Found unknown module paths")
    message = re.escape(stranger("bn", "ToLinen"))
    with flax_sees_more, pytest.raises(ValueError, match=message):
        bnjax.recalibrate(net, variables, PARTS)

    class Hides(nnx.Module):
        def __init__(self) -> None:
            layer = nn.BatchNorm(use_running_average=True)
            self.bn = bridge.ToNNX(layer, rngs=nnx.Rngs(0)).lazy_init(X)

        def __call__(self, x):
            return self.bn(x)

    with pytest.raises(ValueError, match="must call a batch norm"):
        bnjax.recalibrate(Hides(), None, PARTS)
