"""A batch norm before conv and dense layers is folded into each, or the report says why not."""

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import export

import bnjax
from tests.support.folded import (
    EVAL,
    IMAGES,
    assert_folded,
    divisions,
    inputs,
    outputs,
    prepare,
    reasons,
)

pytestmark = pytest.mark.quick_compile


CONV = partial(nn.Conv, 4, (3, 3))
LAYERS: dict[str, tuple[Callable[..., nn.Module], tuple[int, ...]]] = {
    "1x1": (partial(nn.Conv, 4, (1, 1), strides=2), IMAGES),
    "valid": (partial(CONV, padding="VALID"), IMAGES),
    "same": (CONV, IMAGES),
    "same and strided": (partial(CONV, strides=(2, 3)), IMAGES),
    "explicit": (partial(CONV, padding=((2, 0), (1, 3))), IMAGES),
    "even kernel": (partial(nn.Conv, 4, (2, 4)), IMAGES),
    "grouped": (partial(nn.Conv, 6, (3, 3), feature_group_count=3), IMAGES),
    "two in a group": (partial(nn.Conv, 6, (3, 3), feature_group_count=2), (2, 6, 6, 4)),
    "depthwise": (partial(nn.Conv, 3, (3, 3), feature_group_count=3), IMAGES),
    "dilated": (partial(CONV, kernel_dilation=(2, 1)), IMAGES),
    "circular": (partial(CONV, padding="CIRCULAR"), IMAGES),
    "reflected": (partial(CONV, padding="REFLECT"), IMAGES),
    "causal": (partial(nn.Conv, 4, (3,), kernel_dilation=2, padding="CAUSAL"), (2, 8, 3)),
    "3d": (partial(nn.Conv, 4, (3, 2, 3)), (2, 4, 5, 6, 3)),
    "masked": (partial(CONV, mask=jnp.tri(9, 12, 5).reshape(3, 3, 3, 4)), IMAGES),
    "two batch axes": (CONV, (2, 2, 6, 6, 3)),
    "dense": (partial(nn.Dense, 4), (5, 3)),
    "dense of images": (partial(nn.Dense, 4), IMAGES),
    "general": (partial(nn.DenseGeneral, 4, axis=(1, 2)), (5, 2, 3)),
    "general, axes in another order": (partial(nn.DenseGeneral, (2, 4), axis=(-1, 1)), (5, 2, 3)),
    "general with heads": (partial(nn.DenseGeneral, (2, 4)), (5, 3)),
    "general with batch axes": (partial(nn.DenseGeneral, 4, batch_dims=(0,)), (1, 2, 3)),
}


@pytest.mark.parametrize("use_bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_batch_norm_folds_into_every_layer_after_it(name, use_bias):
    layer, shape = LAYERS[name]
    model, variables, x = prepare(nn.Sequential([EVAL(), layer(use_bias=use_bias)]), shape)
    folded = bnjax.fold(model, variables, x)
    expected, actual = outputs(model, variables, folded, x)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-5 * np.abs(expected).max())
    assert reasons(folded) == {("layers_1", "layers_0"): None}
    assert divisions(folded.apply, folded.variables, x) == 0
    old, new = variables["params"]["layers_1"], folded.variables["params"]["layers_1"]
    assert new["kernel"].shape == old["kernel"].shape
    assert new.keys() - {"pad_value"} == {"kernel", "bias"}


def test_the_borders_are_those_of_padding_after_the_batch_norm():
    """In float64 NumPy, the output of the batch norm is padded with zeros."""
    model, variables, x = prepare(nn.Sequential([EVAL(), nn.Conv(1, (3,), padding=1)]), (1, 5, 2))
    norm, conv = (variables["params"][f"layers_{i}"] for i in range(2))
    stats = variables["batch_stats"]["layers_0"]
    mean, var, scale, bias, kernel, image = (
        np.asarray(each, np.float64)
        for each in (
            stats["mean"],
            stats["var"],
            norm["scale"],
            norm["bias"],
            conv["kernel"][..., 0],
            x[0],
        )
    )
    y = np.pad((image - mean) / np.sqrt(var + 1e-5) * scale + bias, ((1, 1), (0, 0)))
    expected = [np.sum(y[i : i + 3] * kernel) + float(conv["bias"][0]) for i in range(5)]
    folded = bnjax.fold(model, variables, x)
    np.testing.assert_allclose(folded.apply(folded.variables, x)[0, :, 0], expected, rtol=1e-5)


@pytest.mark.parametrize("size", [5, 8, 11])
def test_inputs_of_another_size_are_padded_as_in_the_model(size):
    model, variables, x = prepare(nn.Sequential([EVAL(), nn.Conv(4, (4, 4), strides=4)]), IMAGES)
    folded, more = bnjax.fold(model, variables, x), inputs((3, size, size + 1, 3))
    expected, actual = outputs(model, variables, folded, more)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


class Around(nn.Module):
    """A batch norm and dense or conv layers, called by a function."""

    way: Callable[..., Any]
    layer: Callable[..., nn.Module] = partial(nn.Dense, 3)
    norm: Callable[..., nn.Module] = EVAL

    @nn.compact
    def __call__(self, x: jax.Array) -> Any:
        x = nn.relu(EVAL(name="other_bn")(nn.Dense(x.shape[-1], name="other")(x)))
        return self.way(self.norm(name="bn"), self.layer(name="a"), self.layer(name="b"), x)


A: Any = ("a", "bn")
BOTH: dict[str, Any] = {"back": (1, -1), "turned": (2, 1)}
FOLDED: dict[str, tuple[Any, tuple[int, ...]]] = {
    "two consumers": (Around(lambda bn, a, b, x: a(y := bn(x)) * b(y)), (5, 4)),
    "reshape": (Around(lambda bn, a, b, x: a(bn(x).reshape(x.shape[0], -1))), (5, 2, 3, 4)),
    "flatten after a transpose": (
        Around(lambda bn, a, b, x: a(bn(x).transpose(0, 3, 1, 2).reshape(x.shape[0], -1))),
        (5, 2, 3, 4),
    ),
    "heads": (
        Around(
            lambda bn, a, b, x: a(bn(x).reshape(*x.shape[:-1], 2, 2)[:, None]),
            partial(nn.DenseGeneral, 3, axis=(-1, 2)),
        ),
        (5, 4),
    ),
    "tokens": (Around(lambda bn, a, b, x: a(bn(x).reshape(-1, 4))), (5, 2, 3, 4)),
    "class token": (Around(lambda bn, a, b, x: a(bn(x)[:, 0])), (5, 6, 4)),
    "last frame": (Around(lambda bn, a, b, x: a(bn(x)[:, -1])), (5, 6, 4)),
    "strided": (Around(lambda bn, a, b, x: a(bn(x)[:, ::2])), (5, 6, 4)),
    "parts": (
        Around(lambda bn, a, b, x: a((y := jnp.split(bn(x), 2, -1))[0]) + b(y[1])),
        (5, 4),
    ),
    "some channels": (Around(lambda bn, a, b, x: a(bn(x)[..., 1:3])), (5, 4)),
    "reversed": (Around(lambda bn, a, b, x: a(bn(x)[..., ::-1])), (5, 4)),
    "squeezed": (Around(lambda bn, a, b, x: a(bn(x[:, None, None]).squeeze((1, 2)))), (5, 4)),
    "mean": (Around(lambda bn, a, b, x: a(bn(x).mean((1, 2)))), (5, 2, 3, 4)),
    "average pool": (
        Around(lambda bn, a, b, x: a(nn.avg_pool(bn(x), (2, 2), (1, 2)))),
        (5, 4, 6, 4),
    ),
    "channels first": (
        Around(
            lambda bn, a, b, x: a(jnp.moveaxis(bn(jnp.moveaxis(x, -1, 1)), 1, -1)),
            norm=partial(EVAL, axis=1),
        ),
        (5, 3, 4),
    ),
    "several feature axes": (
        Around(
            lambda bn, a, b, x: a(bn(x).reshape(x.shape[0], -1)),
            norm=partial(EVAL, axis=BOTH["back"]),
        ),
        (5, 2, 3, 4),
    ),
    "several feature axes of a general layer": (
        Around(
            lambda bn, a, b, x: a(bn(x)),
            partial(nn.DenseGeneral, 3, axis=(1, 2)),
            partial(EVAL, axis=BOTH["turned"]),
        ),
        (5, 2, 4),
    ),
    "remat": (Around(lambda bn, a, b, x: nn.remat(lambda m, x: m(x))(a, bn(x))), (5, 4)),
    "called twice": (Around(lambda bn, a, b, x: a(bn(x)) + a(bn(x + 1))), (5, 4)),
    "dropout in evaluation": (
        Around(lambda bn, a, b, x: a(nn.Dropout(0.5, deterministic=True)(bn(x)))),
        (5, 4),
    ),
    "frozen": (
        Around(
            lambda bn, a, b, x: a(bn(x)), norm=partial(bnjax.BatchNorm1d, use_running_average=True)
        ),
        (5, 4),
    ),
    "between two": (Around(lambda bn, a, b, x: b(nn.relu(x)) + a(bn(nn.gelu(x)))), (5, 4)),
}


@pytest.mark.parametrize("name", FOLDED)
def test_it_folds_into_every_consumer_through_operations_that_move_values(name):
    model, shape = FOLDED[name]
    model, variables, x = prepare(model, shape)
    scale = variables["params"]["bn"]["scale"]
    if scale.ndim == 1:
        variables["params"]["bn"]["scale"] = scale.at[0].set(0).at[1].set(-1)
    folded = assert_folded(model, variables, x)
    found = reasons(folded)
    assert found[A] is None
    assert ("", "bn") not in found


GOES = "its input comes from max, not from a conv or dense layer, and its output goes into {}"
REFUSALS: dict[str, tuple[Any, str]] = {
    "relu": (Around(lambda bn, a, b, x: a(nn.relu(bn(x)))), GOES.format("max")),
    "max pool": (
        Around(lambda bn, a, b, x: a(nn.max_pool(bn(x)[..., None], (2,), (1,)))),
        GOES.format("reduce_window_max"),
    ),
    "skip": (Around(lambda bn, a, b, x: a(y := bn(x)).sum() + y), GOES.format("add")),
    "returned too": (
        Around(lambda bn, a, b, x: (a(y := bn(x)), y)),
        "its input comes from max, not from a conv or dense layer",
    ),
    "another batch norm": (
        Around(lambda bn, a, b, x: nn.relu(EVAL(name="next")(bn(x)))),
        GOES.format("'next'"),
    ),
    "unused": (
        Around(lambda bn, a, b, x: (bn(x), x)[1]),
        GOES.removesuffix("goes into {}") + "is not used",
    ),
    "another input of the layer": (
        Around(lambda bn, a, b, x: a(bn(x)) + a(x)),
        GOES.removesuffix("its output goes into {}") + "'a' is also used for another input",
    ),
    "other channels of the layer": (
        Around(lambda bn, a, b, x: a(y := bn(x)) + a(y[..., ::-1])),
        GOES.removesuffix("its output goes into {}")
        + "'a' is also used for its channels in another order",
    ),
    "zeros beside it": (
        Around(lambda bn, a, b, x: a(jnp.pad(bn(x), ((0, 0), (0, 1))))),
        GOES.format("pad"),
    ),
    "a factor": (
        Around(lambda bn, a, b, x: a(bn(x) * 2)),
        GOES.removesuffix("its output goes into {}") + "its output is multiplied by 2 before 'a'",
    ),
    "a sum of one": (
        Around(lambda bn, a, b, x: a(bn(x)[:, None].sum(1))),
        GOES.removesuffix("its output goes into {}") + "its output is summed before 'a'",
    ),
    "tied kernel": (
        Around(lambda bn, a, b, x: a(bn(x)) @ a.variables["params"]["kernel"].T),
        GOES.removesuffix("its output goes into {}") + "the kernel of 'a' is used outside it",
    ),
    "an axis that is not summed over": (
        Around(lambda bn, a, b, x: a(bn(x)[..., None])),
        GOES.removesuffix("its output goes into {}")
        + "its channels are axis 1 of the input of 'a', which does not sum over it",
    ),
    "transposed": (
        Around(lambda bn, a, b, x: a(bn(x)[:, None]), partial(nn.ConvTranspose, 3, (3,))),
        GOES.format("'a', and a ConvTranspose can only fold what follows it"),
    ),
    "dilated input": (
        Around(
            lambda bn, a, b, x: a(bn(x)[:, None]),
            partial(nn.Conv, 3, (3,), padding=1, input_dilation=2),
        ),
        GOES.format("'a', which dilates it with zeros"),
    ),
    "no input gives zero": (
        Around(lambda bn, a, b, x: a(bn(x)[:, None]), partial(nn.Conv, 3, (3,))),
        GOES.format("'a', which pads it with zeros, and in 1 channel no input gives zero"),
    ),
    "a function of its own": (
        Around(
            lambda bn, a, b, x: a(bn(x)),
            partial(nn.Dense, 3, dot_general=lambda *a, **k: jax.lax.dot_general(*a, **k) ** 2),
        ),
        GOES.format("'a', which computes with a custom function"),
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_fold_that_would_be_wrong_is_refused_with_a_reason(name):
    model, reason = REFUSALS[name]
    model, variables, x = prepare(model, (5, 4))
    scale = variables["params"]["bn"]["scale"]
    variables["params"]["bn"]["scale"] = scale.at[0].set(0)
    folded = bnjax.fold(model, variables, x)
    found = reasons(folded)
    assert found.pop(("other", "other_bn")) is None
    assert found["", "bn"] == reason
    assert None not in found.values()
    expected, actual = outputs(model, variables, folded, x)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), actual, expected)
    assert "bn" in folded.variables["params"]


def test_a_batch_norm_between_two_layers_folds_backward():
    model, variables, x = prepare(nn.Sequential([nn.Dense(4), EVAL(), nn.Dense(2)]), (5, 3))
    folded = assert_folded(model, variables, x)
    assert reasons(folded)["layers_0", "layers_1"] is None
    assert ("layers_2", "layers_1") not in reasons(folded)


def test_a_layer_between_two_batch_norms_absorbs_both():
    model = nn.Sequential([EVAL(), CONV(), EVAL(), nn.relu, EVAL(), CONV()])
    folded = assert_folded(*prepare(model))
    assert [tuple(row) for row in folded.report.rows] == [
        ("layers_1", "layers_0", None),
        ("layers_1", "layers_2", None),
        ("layers_5", "layers_4", None),
    ]


def test_a_batch_norm_that_cannot_fold_backward_folds_forward():
    model = Around(lambda bn, a, b, x: b(bn(y := a(x))) + y)
    folded = assert_folded(*prepare(model, (5, 4)))
    assert reasons(folded)["a", ""] == (
        "its output goes into 'bn' and add, not only into a batch norm"
    )
    assert reasons(folded)["b", "bn"] is None


def test_the_folded_model_is_exported_for_any_batch():
    model, variables, x = prepare(nn.Sequential([EVAL(), CONV(strides=2), nn.relu]))
    folded = bnjax.fold(model, variables, x)
    any_batch = jax.ShapeDtypeStruct((*export.symbolic_shape("b"), *x.shape[1:]), x.dtype)
    exported = export.export(jax.jit(folded.apply))(folded.variables, any_batch)
    more = inputs((5, *x.shape[1:]))
    np.testing.assert_allclose(
        exported.call(folded.variables, more), model.apply(variables, more), atol=1e-5
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_keeps_its_dtype(dtype):
    layers = [EVAL(dtype=dtype), CONV(dtype=dtype, param_dtype=dtype)]
    folded = assert_folded(*prepare(nn.Sequential(layers)), rtol=3e-2)
    assert folded.variables["params"]["layers_1"]["kernel"].dtype == dtype


def test_padding_that_does_not_fit_half_precision_is_refused():
    layers = [EVAL(dtype="float16"), CONV(dtype="float16"), nn.Dense(3), EVAL()]
    model, variables, x = prepare(nn.Sequential(layers))
    norm = variables["params"]["layers_0"]
    variables["params"]["layers_0"] = {
        "scale": norm["scale"].at[:2].set(1e-6),
        "bias": norm["bias"],
    }
    reason = reasons(bnjax.fold(model, variables, x))["", "layers_0"]
    assert reason is not None
    assert reason.endswith(
        "'layers_1', which pads it with zeros, and in 2 channels no input gives zero"
    )


@pytest.mark.quick_compile(False)
@pytest.mark.usefixtures("x64")
def test_float64_keeps_its_precision():
    float64 = {"param_dtype": jnp.float64, "dtype": jnp.float64}
    layers = [EVAL(force_float32_reductions=False, **float64), CONV(**float64)]
    model, variables, x = prepare(nn.Sequential(layers))
    assert_folded(model, variables, x.astype(jnp.float64), rtol=1e-13)


def test_a_model_with_nothing_to_fold_is_an_error_with_reasons():
    model, variables, x = prepare(nn.Sequential([EVAL(), nn.relu, nn.Dense(3)]), (5, 3))
    message = (
        "`model` must have a batch norm that can be folded.\n"
        "  -, layers_0: its input comes from an input of the model, not from a conv or dense "
        "layer, and its output goes into max.\n"
        "  layers_2, -: its output goes into the model's output, not into a batch norm."
    )
    with pytest.raises(ValueError, match=rf"\A{re.escape(message)}\Z"):
        bnjax.fold(model, variables, x)
