"""Fold nnx models, and models under an override."""

from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax import export

import bnjax
from tests.support.folded import IMAGES, divisions, inputs, prepare, reasons, trained
from tests.support.nnx_layers import held

pytestmark = pytest.mark.quick_compile

RNGS = nnx.Rngs(0)
CONV = partial(nnx.Conv, 3, 4, (3, 3), rngs=RNGS)
UP = partial(nnx.ConvTranspose, 3, 4, (3, 3), (2, 2), rngs=RNGS)
LAYERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "1d": (partial(nnx.Conv, 3, 4, (3,), rngs=RNGS), (2, 8, 3)),
    "2d": (CONV, IMAGES),
    "grouped and dilated": (
        partial(nnx.Conv, 3, 6, (3, 3), feature_group_count=3, kernel_dilation=2, rngs=RNGS),
        IMAGES,
    ),
    "masked": (partial(CONV, mask=jnp.tri(9, 12, 5).reshape(3, 3, 3, 4)), IMAGES),
    "transposed": (UP, IMAGES),
    "transposed kernel": (partial(UP, transpose_kernel=True), IMAGES),
    "linear": (partial(nnx.Linear, 3, 4, rngs=RNGS), (5, 3)),
    "general": (partial(nnx.LinearGeneral, (2, 3), 4, axis=(1, 2), rngs=RNGS), (5, 2, 3)),
}
NORMS = {
    "flax": partial(nnx.BatchNorm, 4, epsilon=0.1, rngs=RNGS),
    "without scale": partial(nnx.BatchNorm, 4, use_scale=False, rngs=RNGS),
    "drop-in": partial(bnjax.nnx.BatchNorm, 4, use_bias=False, rngs=RNGS),
    "1d": partial(bnjax.nnx.BatchNorm1d, 4, eps=0.1, momentum=None, rngs=RNGS),
    "not affine": partial(bnjax.nnx.BatchNorm1d, 4, affine=False, rngs=RNGS),
}


def drawn(model: Any) -> Any:
    nnx.update(model, trained(nnx.state(model, (nnx.Param, nnx.BatchStat))))
    return model


def assert_folded(model: Any, x: jax.Array) -> Any:
    """Assert that no batch norm is left, that outputs agree, and that the model is unchanged."""
    before, graphdef = held(model), nnx.graphdef(model)
    folded = bnjax.fold(model, None, x)
    chex.assert_trees_all_equal(held(model), before)
    assert nnx.graphdef(model) == graphdef
    expected = nnx.view(model, use_running_average=True, raise_if_not_found=False)(x)
    actual = folded.apply(folded.variables, x)
    assert np.std(expected) > 0.01
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    assert divisions(folded.apply, folded.variables, x) == 0
    assert folded.variables.keys() == {"params"}
    return folded


@pytest.mark.parametrize("use_bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_folds_with_and_without_bias(name, use_bias):
    layer, shape = LAYERS[name]
    layer = layer(use_bias=use_bias)
    channels = layer.out_features[-1] if name == "general" else layer.out_features
    model = nnx.Sequential(layer, nnx.BatchNorm(channels, rngs=RNGS))
    folded = assert_folded(drawn(model), inputs(shape))
    assert folded.variables["params"]["layers"]["0"].keys() == {"kernel", "bias"}


@pytest.mark.parametrize("name", NORMS)
def test_every_batch_norm_folds(name):
    assert_folded(drawn(nnx.Sequential(nnx.Linear(3, 4, rngs=RNGS), NORMS[name]())), inputs((5, 3)))


def test_references_fold_and_stay():
    with nnx.var_defaults(ref=True):
        model = nnx.Sequential(CONV(use_bias=False), nnx.BatchNorm(4, rngs=RNGS))
    assert_folded(drawn(model), inputs(IMAGES))


def test_a_frozen_model_folds():
    model = drawn(nnx.Sequential(CONV(), nnx.BatchNorm(4, rngs=RNGS)))
    bnjax.nnx.freeze(model)
    assert_folded(model, inputs(IMAGES))


class Around(nnx.Module):
    """A layer and a batch norm, called by a function, and a pair that folds."""

    def __init__(self, way: Any, layer: Any = nnx.Linear) -> None:
        self.way = way
        self.other = nnx.Sequential(nnx.Linear(3, 3, rngs=RNGS), nnx.BatchNorm(3, rngs=RNGS))
        self.layer, self.bn = layer(3, 3, rngs=RNGS), nnx.BatchNorm(3, rngs=RNGS)

    def __call__(self, x: jax.Array) -> Any:
        return self.way(self.layer, self.bn, self.other(x))


class Standardized(nnx.Linear):
    def __call__(self, inputs: Any, out_sharding: Any = None) -> Any:
        return super().__call__(inputs * 2)


REFUSALS: dict[str, tuple[Any, str]] = {
    "residual under remat": (
        Around(lambda f, bn, x: (y := f(x)) + nnx.remat(lambda bn, y: bn(y))(bn, y)),
        "its output goes into 'bn' and add, not only into a batch norm",
    ),
    "tied kernel": (
        Around(lambda f, bn, x: bn(f(x)) @ f.kernel[...].T),
        "the kernel of 'layer' is used outside it",
    ),
    "computed kernel": (
        Around(lambda f, bn, x: (setattr(f, "kernel", nnx.Param(f.kernel[...] * 2)), bn(f(x)))[1]),
        "the kernel of 'layer' is computed in the model",
    ),
    "another layer": (
        Around(lambda f, bn, x: bn(f(x)), Standardized),
        "Standardized changes what Linear computes",
    ),
    "vmap": (
        Around(
            lambda f, bn, x: nnx.vmap(lambda f, bn, x: bn(f(x)), in_axes=(None, None, 0))(f, bn, x)
        ),
        "mapped by vmap",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_fold_that_would_be_wrong_is_refused_with_a_reason(name):
    model, reason = REFUSALS[name]
    folded, x = bnjax.fold(model, None, inputs((5, 3))), inputs((5, 3))
    found = reasons(folded)
    assert found.pop(("other/layers/0", "other/layers/1")) is None
    assert next(iter(found.values())) == reason
    assert None not in found.values()
    assert "bn" in folded.variables["params"]
    model.eval()
    np.testing.assert_allclose(folded.apply(folded.variables, x), model(x), rtol=1e-4, atol=1e-5)


def test_the_folded_model_runs_under_jit_and_grad_and_exported_to_bytes():
    model = drawn(nnx.Sequential(CONV(), nnx.BatchNorm(4, rngs=RNGS), nnx.Dropout(0.5, rngs=RNGS)))
    x, more = inputs(IMAGES), inputs((5, *IMAGES[1:]))
    folded = bnjax.fold(model, nnx.state(model), x)
    any_batch = jax.ShapeDtypeStruct((*export.symbolic_shape("b"), *x.shape[1:]), x.dtype)
    exported = export.export(jax.jit(folded.apply))(folded.variables, any_batch)
    exported = export.deserialize(exported.serialize())
    assert "rsqrt" not in exported.mlir_module()
    model.eval()
    for apply in (jax.jit(folded.apply), exported.call):
        np.testing.assert_allclose(apply(folded.variables, more), model(more), atol=1e-5)
    gradient = jax.grad(lambda v: jnp.sum(folded.apply(v, x) ** 2))(folded.variables)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(gradient))


def test_variables_other_than_the_folded_ones_are_refused():
    model = nnx.Sequential(nnx.Linear(3, 4, rngs=RNGS), nnx.BatchNorm(4, rngs=RNGS))
    folded = bnjax.fold(model, None, inputs((5, 3)))
    message = (
        r"^`variables` do not fit the model: missing \['params/layers/0/bias', "
        r"'params/layers/0/kernel'\]\. Are they another model's\?$"
    )
    with pytest.raises(ValueError, match=message):
        folded.apply({"params": {}}, inputs((5, 3)))


# Overrides


def two_norms() -> tuple[Any, Any, jax.Array]:
    """One batch norm that folds and one that does not, both in training mode."""
    norms = [nn.BatchNorm(use_running_average=False) for _ in range(2)]
    return prepare(nn.Sequential([nn.Dense(4), *norms]), (5, 3))


def test_a_freeze_around_fold_is_active_in_the_folded_model():
    model, variables, x = two_norms()
    with bnjax.freeze("**"):
        expected = model.apply(variables, x)
        folded = bnjax.fold(model, variables, x)
    for apply in (folded.apply, jax.jit(folded.apply)):
        np.testing.assert_allclose(apply(folded.variables, x), expected, atol=1e-5)


def test_an_override_around_fold_is_active_in_the_folded_model_and_inner_ones_win():
    model, variables, x = two_norms()
    with bnjax.freeze("**"), bnjax.override("**", epsilon=3.0):
        folded = bnjax.fold(model, variables, x)
        with bnjax.override("layers_2", epsilon=9.0):
            inner = model.apply(variables, x)
    with bnjax.override("layers_2", epsilon=9.0):
        np.testing.assert_allclose(folded.apply(folded.variables, x), inner, atol=1e-5)
    with bnjax.freeze("**"), bnjax.override("**", epsilon=3.0):
        outer = model.apply(variables, x)
    np.testing.assert_allclose(folded.apply(folded.variables, x), outer, atol=1e-5)
    assert np.abs(outer - inner).max() > 0.01
