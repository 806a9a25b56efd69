"""Fold batch norms into every kind of layer before them, in every kind of model."""

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.core import freeze
from jax import export

import bnjax
from tests.support.folded import EVAL, IMAGES, divisions, inputs, outputs, prepare, reasons, trained
from tests.support.models import ResNet, Siamese

pytestmark = pytest.mark.quick_compile


def assert_folded(model: Any, variables: Any, x: Any, rtol: float = 1e-5) -> Any:
    """Assert that variables and program have no batch norm left, and that outputs agree."""
    folded = bnjax.fold(model, variables, x)
    expected, actual = outputs(model, variables, folded, x)
    assert np.std(expected) > 0.01
    np.testing.assert_allclose(actual, expected, rtol=0, atol=rtol * np.abs(expected).max())
    assert actual.dtype == expected.dtype
    assert divisions(model.apply, variables, x) > 0 == divisions(folded.apply, folded.variables, x)
    assert "batch_stats" not in folded.variables
    return folded


def test_a_wrong_fold_is_noticed():
    model, variables, x = prepare(nn.Sequential([nn.Dense(4), EVAL()]), (5, 3))
    folded = assert_folded(model, variables, x)
    kernel = folded.variables["params"]["layers_0"]["kernel"]
    for moved in (kernel * 1.001, jnp.roll(kernel, 1, 1)):
        wrong = {**folded.variables["params"]["layers_0"], "kernel": moved}
        actual = folded.apply({"params": {"layers_0": wrong}}, x)
        assert np.abs(actual - model.apply(variables, x)).max() > 1e-4


# Layers


CONV = partial(nn.Conv, 4, (3, 3))
LAYERS: dict[str, tuple[Callable[..., nn.Module], tuple[int, ...]]] = {
    "1d": (partial(nn.Conv, 4, (3,)), (2, 8, 3)),
    "2d": (CONV, IMAGES),
    "3d": (partial(nn.Conv, 4, (3, 2, 3)), (2, 4, 5, 6, 3)),
    "grouped": (partial(nn.Conv, 6, (3, 3), feature_group_count=3), IMAGES),
    "depthwise": (partial(nn.Conv, 3, (3, 3), feature_group_count=3), IMAGES),
    "dilated": (partial(CONV, kernel_dilation=2), IMAGES),
    "input dilated": (partial(CONV, input_dilation=(2, 1), padding=1), IMAGES),
    "strided": (partial(CONV, strides=2, padding="VALID"), IMAGES),
    "grouped, dilated and strided": (
        partial(nn.Conv, 6, (2, 3), (2, 1), kernel_dilation=(1, 2), feature_group_count=3),
        IMAGES,
    ),
    "circular": (partial(CONV, padding="CIRCULAR"), IMAGES),
    "causal": (partial(nn.Conv, 4, (3,), padding="CAUSAL"), (2, 8, 3)),
    "masked": (partial(CONV, mask=jnp.tri(9, 12, 5).reshape(3, 3, 3, 4)), IMAGES),
    "two batch axes": (CONV, (2, 2, 6, 6, 3)),
    "no batch axis": (CONV, (6, 6, 3)),
    "transposed": (partial(nn.ConvTranspose, 4, (3, 3), (2, 2)), IMAGES),
    "transposed 1d": (partial(nn.ConvTranspose, 4, (4,), (2,)), (2, 5, 3)),
    "transposed 3d": (partial(nn.ConvTranspose, 4, (2, 2, 2)), (2, 3, 4, 5, 3)),
    "transposed kernel": (
        partial(nn.ConvTranspose, 4, (3, 3), (2, 2), transpose_kernel=True),
        IMAGES,
    ),
    "transposed circular": (partial(nn.ConvTranspose, 4, (3, 3), padding="CIRCULAR"), IMAGES),
    "local": (partial(nn.ConvLocal, 4, (3, 3)), IMAGES),
    "dense": (partial(nn.Dense, 4), (5, 3)),
    "dense of a sequence": (partial(nn.Dense, 4), (2, 5, 3)),
    "general": (partial(nn.DenseGeneral, 4, axis=(1, 2)), (5, 2, 3)),
    "general with heads": (partial(nn.DenseGeneral, (2, 4)), (5, 3)),
    "general with batch axes": (partial(nn.DenseGeneral, 4, batch_dims=(0,)), (5, 2, 3)),
}


@pytest.mark.parametrize("use_bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_folds_with_and_without_bias(name, use_bias):
    layer, shape = LAYERS[name]
    model, variables, x = prepare(nn.Sequential([layer(use_bias=use_bias), EVAL()]), shape)
    folded = assert_folded(model, variables, x)
    old, new = variables["params"]["layers_0"], folded.variables["params"]["layers_0"]
    assert new["kernel"].shape == old["kernel"].shape
    assert new.keys() == {"kernel", "bias"}


NORMS: dict[str, tuple[Callable[..., nn.Module], tuple[int, ...]]] = {
    "flax": (partial(EVAL, epsilon=0.1), IMAGES),
    "flax without scale": (partial(EVAL, use_scale=False), IMAGES),
    "flax without bias": (partial(EVAL, use_bias=False), IMAGES),
    "flax with neither": (partial(EVAL, use_scale=False, use_bias=False), IMAGES),
    "drop-in": (partial(bnjax.linen.BatchNorm, True, epsilon=0.1), IMAGES),
    "1d": (partial(bnjax.BatchNorm1d, 3, eps=0.1), (2, 6, 3)),
    "2d": (partial(bnjax.BatchNorm2d, 3, eps=0.1), IMAGES),
    "3d": (partial(bnjax.BatchNorm3d, 3), (2, 2, 6, 6, 3)),
    "not affine": (partial(bnjax.BatchNorm2d, affine=False), IMAGES),
    "frozen": (partial(bnjax.BatchNorm2d, use_running_average=True), IMAGES),
}


@pytest.mark.parametrize("name", NORMS)
def test_every_batch_norm_folds_into_a_dense_layer(name):
    norm, shape = NORMS[name]
    assert_folded(*prepare(nn.Sequential([nn.Dense(3), norm()]), shape))


def test_a_batch_norm_with_a_cumulative_average_folds():
    _, variables, x = prepare(nn.Sequential([nn.Dense(3), bnjax.BatchNorm1d(3)]), (5, 3))
    variables["batch_stats"]["layers_1"]["count"] = jnp.array(7)
    assert_folded(nn.Sequential([nn.Dense(3), bnjax.BatchNorm1d(3, momentum=None)]), variables, x)


def test_a_batch_norm_over_all_features_of_a_general_dense_layer_folds():
    both: Any = (-2, -1)
    layers = [nn.DenseGeneral((2, 4), use_bias=False), EVAL(axis=both)]
    assert_folded(*prepare(nn.Sequential(layers), (5, 3)))


def test_channels_are_followed_through_a_transpose():
    to_nchw = partial(jnp.transpose, axes=(0, 3, 1, 2))
    for norm in (bnjax.BatchNorm2d(axis=1), EVAL(axis=1)):
        assert_folded(*prepare(nn.Sequential([CONV(), to_nchw, norm])))


def test_axis_1_of_a_dense_layer_is_its_channels():
    assert_folded(*prepare(nn.Sequential([nn.Dense(4), EVAL(axis=1)]), (5, 3)))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_kernels_and_outputs_keep_their_dtype(dtype):
    layers = [nn.Dense(4, dtype=dtype, param_dtype=dtype), EVAL(dtype=jnp.float32)]
    model, variables, x = prepare(nn.Sequential(layers), (64, 3))
    folded = assert_folded(model, variables, x, rtol=3e-2)
    assert {leaf.dtype for leaf in jax.tree.leaves(folded.variables)} == {jnp.dtype(dtype)}


class MixedClassifier(nn.Module):
    """A folded layer in float32 and a head in bfloat16, with logits and classes as outputs."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(EVAL()(nn.Dense(64)(x)))
        logits = nn.Dense(10, dtype=jnp.bfloat16)(x)
        return logits, logits.argmax(-1)


@pytest.mark.parametrize("seed", range(5))
def test_the_tolerance_is_that_of_the_coarsest_dtype(seed):
    x = jax.random.normal(jax.random.key(seed), (256, 32))
    model = MixedClassifier()
    folded = bnjax.fold(model, model.init(jax.random.key(seed), x), x)
    assert folded.report.tolerance == pytest.approx(2**-3.5)


@pytest.mark.quick_compile(False)
@pytest.mark.usefixtures("x64")
def test_float64_keeps_its_precision():
    layers = [
        nn.Dense(4, param_dtype=jnp.float64),
        EVAL(param_dtype=jnp.float64, force_float32_reductions=False),
    ]
    folded = assert_folded(*prepare(nn.Sequential(layers), (5, 3)), rtol=1e-13)
    assert folded.report.tolerance == pytest.approx(1.5e-8, rel=0.01)


# Models


@pytest.mark.parametrize("norm", [nn.BatchNorm, bnjax.linen.BatchNorm], ids=["flax", "drop-in"])
def test_a_resnet_of_18_layers_keeps_its_outputs(norm):
    model, variables, x = prepare(ResNet(norm=norm), (2, 32, 32, 3))
    folded = assert_folded(model, variables, x, rtol=1e-4)
    assert [row.reason for row in folded.report.rows].count(None) == 20
    assert folded.max_difference <= 1e-4 * folded.report.scale


def test_blocks_under_remat_fold():
    plain, variables, x = prepare(ResNet((1, 1), remat=False))
    folded = assert_folded(ResNet((1, 1), remat=True), variables, x)
    assert reasons(folded) == reasons(bnjax.fold(plain, variables, x))


def test_a_shared_encoder_folds_and_a_layer_between_two_batch_norms_does_not():
    model, variables, x = prepare(Siamese(), (4, 8, 8, 3))
    folded = bnjax.fold(model, variables, x)
    expected, actual = outputs(model, variables, folded, x)
    np.testing.assert_allclose(actual, expected, rtol=1e-5)
    twice = "it is used 2 times, before 'domains_0' and 'domains_1'"
    assert reasons(folded) == {
        ("encoder/layers_0", "encoder/norms_0"): None,
        ("encoder/layers_1", "encoder/norms_1"): None,
        ("shared", "domains_0"): twice,
        ("shared", "domains_1"): twice,
        ("head", ""): "its output goes into the model's output, not into a batch norm",
    }
    assert folded.variables["batch_stats"].keys() == {"domains_0", "domains_1"}


def test_the_folded_model_runs_under_jit_and_exported():
    model, variables, x = prepare(ResNet((1, 1)))
    folded = bnjax.fold(model, variables, x)
    expected = jax.jit(model.apply)(variables, x)
    any_batch = jax.ShapeDtypeStruct((*export.symbolic_shape("b"), *x.shape[1:]), x.dtype)
    exported = export.export(jax.jit(folded.apply))(folded.variables, any_batch)
    assert "rsqrt" not in exported.mlir_module()
    for apply in (jax.jit(folded.apply), exported.call):
        actual = apply(folded.variables, x)
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_folding_does_not_affect_functions_that_were_jitted_before():
    class Jitted(nn.Module):
        @nn.jit
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return EVAL(name="bn")(nn.Dense(4, name="dense")(x))

    model, variables, x = prepare(Jitted(), (5, 3))
    before = model.apply(variables, x)
    assert_folded(model, variables, x)
    assert_folded(model, trained(variables, seed=1), x)
    np.testing.assert_array_equal(model.apply(variables, x), before)


def test_other_batch_sizes_and_gradients_work():
    model, variables, x = prepare(nn.Sequential([CONV(), EVAL()]))
    folded, more = bnjax.fold(model, variables, x), inputs((5, 6, 6, 3))
    np.testing.assert_allclose(
        folded.apply(folded.variables, more), model.apply(variables, more), atol=1e-5
    )
    gradient = jax.grad(lambda v: jnp.sum(folded.apply(v, x) ** 2))(folded.variables)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(gradient))


def test_the_given_variables_are_not_modified():
    model, variables, x = prepare(ResNet((1,)))
    before = jax.tree.map(np.array, variables)
    assert_folded(model, freeze(variables), x)
    assert_folded(model, variables, x)
    chex.assert_trees_all_equal(variables, before)


def test_partitioned_kernels_stay_partitioned():
    boxed = nn.with_partitioning(nn.initializers.lecun_normal(), ("in", "out"))
    model = nn.Sequential([nn.Dense(4, kernel_init=boxed), EVAL()])
    folded = assert_folded(*prepare(model, (5, 3)))
    kernel = folded.variables["params"]["layers_0"]["kernel"]
    assert isinstance(kernel, nn.Partitioned)
    assert kernel.names == ("in", "out")


def test_the_report_is_a_table():
    model, variables, x = prepare(nn.Sequential([CONV(), EVAL(), nn.relu, EVAL()]))
    folded = bnjax.fold(model, variables, x)
    lines = [re.sub(r"[ │┃]+", " ", line).strip() for line in str(folded.report).splitlines()]
    assert lines[0] == "1 layer folded"
    assert lines[2] == "layer batch norm result"
    assert lines[4] == "layers_0 layers_1 folded"
    reason = "its input comes from max, not from a conv or dense layer"
    assert lines[5] == f"- layers_3 not folded: {reason}"
    assert lines[7] == (
        f"largest output difference {folded.max_difference:.2g}, for outputs up to "
        f"{folded.report.scale:.3g}"
    )
