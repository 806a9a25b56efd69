"""Every tool on models that import flax and know nothing of bnjax: linen and nnx."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from flax.traverse_util import flatten_dict

import bnjax
from tests.support.folded import reasons, trained
from tests.support.models import NnxResNet, ResNet, Siamese

pytestmark = pytest.mark.quick_compile

LINEN = {
    "residual": (ResNet((1,), width=4), "stage0*/**"),
    "residual under remat": (ResNet((1,), width=4, remat=True), "stage0*/**"),
    "setup, shared, remat": (Siamese(), "encoder/**"),
}
NNX = {"nnx": nnx.BatchNorm, "nnx with bnjax's layers": bnjax.nnx.BatchNorm2d}
X = jnp.asarray(np.random.default_rng(0).normal(1, 2, (6, 8, 8, 3)), jnp.float32)
linen_models = pytest.mark.parametrize(("model", "part"), LINEN.values(), ids=LINEN)
nnx_models = pytest.mark.parametrize("norm", NNX.values(), ids=NNX)


def variables_of(model: nn.Module) -> Any:
    return trained(jax.eval_shape(model.init, jax.random.key(0), X))


def nnx_model(norm: Any) -> NnxResNet:
    model = NnxResNet(nnx.Rngs(0), norm)
    nnx.update(model, trained(nnx.state(model, (nnx.Param, nnx.BatchStat))))
    return model


def flatten(state: nnx.State) -> dict[str, np.ndarray]:
    return {"/".join(map(str, k)): np.array(v[...]) for k, v in nnx.to_flat_state(state)}


def moved(before: Any, after: Any) -> set[str]:
    """The paths of the modules with an array that is another one now."""
    assert before.keys() == after.keys()
    return {k.rpartition("/")[0] for k in before if not np.array_equal(before[k], after[k])}


def train(model: nn.Module, variables: Any) -> set[str]:
    apply = jax.jit(partial(model.apply, mutable=["batch_stats"], train=True))
    after = apply(variables, X)[1]
    return moved(*(flatten_dict(tree["batch_stats"], sep="/") for tree in (variables, after)))


@linen_models
def test_freeze_keeps_the_statistics_of_a_part(model, part):
    variables = variables_of(model)
    everything = train(model, variables)
    with bnjax.freeze(part):
        rest = train(model, variables)
    assert rest == {path for path in everything if not path.startswith(part[:6])}
    assert set() < rest < everything


@linen_models
def test_override_sets_the_momentum_of_a_part(model, part):
    variables = variables_of(model)
    with bnjax.override(part, momentum=1.0):
        rest = train(model, variables)
    assert rest == {path for path in train(model, variables) if not path.startswith(part[:6])}


@nnx_models
def test_freeze_keeps_the_statistics_of_a_part_of_an_nnx_model(norm):
    model = nnx_model(norm)
    bnjax.nnx.freeze(model, "blocks/**")
    model.train()
    before = flatten(nnx.state(model, nnx.BatchStat))
    nnx.jit(lambda model, x: model(x))(model, X)
    assert moved(before, flatten(nnx.state(model, nnx.BatchStat))) == {
        "stem_bn",
        "shared/bn1",
        "shared/bn2",
    }


def assert_of_the_batch(before: Any, after: Any, flaxs: Any) -> None:
    """All statistics are new, and Flax's own of the batch where a layer is used once."""
    assert moved(before, after) == {path.rpartition("/")[0] for path in before}
    for path in before.keys() - {path for path in before if path.startswith(("enc", "shared"))}:
        np.testing.assert_allclose(after[path], flaxs[path], rtol=1e-4, atol=1e-5)


@linen_models
def test_recalibrate_gives_each_layer_the_statistics_of_its_inputs(model, part):
    variables = variables_of(model)
    new = bnjax.recalibrate(model, variables, [X])
    with bnjax.override("**", momentum=0.0):
        flaxs = model.apply(variables, X, train=True, mutable=["batch_stats"])[1]
    trees = [flatten_dict(tree["batch_stats"], sep="/") for tree in (variables, new, flaxs)]
    assert_of_the_batch(*trees)
    assert new["params"] is variables["params"]


@nnx_models
def test_recalibrate_gives_each_layer_of_an_nnx_model_the_statistics_of_its_inputs(norm):
    model = nnx_model(nnx.BatchNorm)
    new = bnjax.recalibrate(nnx_model(norm), None, [X])
    before = flatten(nnx.state(model, nnx.BatchStat))
    model.set_attributes(nnx.BatchNorm, momentum=0.0)
    nnx.jit(lambda model, x: model(x))(model, X)
    flaxs = flatten(nnx.state(model, nnx.BatchStat))
    assert_of_the_batch(before, flatten(nnx.filter_state(new, nnx.BatchStat)), flaxs)


@linen_models
def test_fold_keeps_the_outputs(model, part):
    variables = variables_of(model)
    folded = bnjax.fold(model, variables, X)
    expected = model.apply(variables, X)
    actual = jax.jit(folded.apply)(folded.variables, X)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    assert None in reasons(folded).values()


@nnx_models
def test_fold_keeps_the_outputs_of_an_nnx_model(norm):
    model = nnx_model(norm)
    folded = bnjax.fold(model, None, X)
    model.eval()
    expected = model(X)
    actual = jax.jit(folded.apply)(folded.variables, X)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    assert [layer for (layer, _), why in reasons(folded).items() if why] == ["head"]
    assert len(folded.report.rows) == 1 + 8
    assert folded.variables.keys() == {"params"}
