"""Branches with the same input that are added become one conv."""

import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax import export

import bnjax
from tests.support.folded import (
    EVAL,
    IMAGES,
    assert_same,
    branches,
    convolutions,
    divisions,
    inputs,
    outputs,
    prepare,
    trained,
)

pytestmark = pytest.mark.quick_compile


class Sum(nn.Module):
    """The sum of layers with the same input, each with a batch norm, and of a lone batch norm."""

    layers: Any
    identity: bool = False

    @nn.compact
    def __call__(self, x):
        found = [EVAL(name=f"{k}_bn")(make(name=k)(x)) for k, make in self.layers.items()]
        found += [EVAL(name="identity")(x)] if self.identity else []
        return nn.relu(sum(found))


C = nn.Conv
SUMS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "repvgg": (Sum({"a": partial(C, 3, (3, 3)), "b": partial(C, 3, (1, 1))}, True), IMAGES),
    "the small one first": (
        Sum({"b": partial(C, 3, (1, 1)), "a": partial(C, 3, (3, 3))}, True),
        IMAGES,
    ),
    "torch's padding and stride": (
        Sum(
            {
                "a": partial(C, 4, (3, 3), 2, padding=1),
                "b": partial(C, 4, (1, 1), 2, padding=0),
            }
        ),
        IMAGES,
    ),
    "same, strided": (
        Sum({"a": partial(C, 4, (3, 3), 2), "b": partial(C, 4, (1, 1), 2)}),
        IMAGES,
    ),
    "same, strided, odd": (
        Sum({"a": partial(C, 4, (3, 3), 2), "b": partial(C, 4, (1, 1), 2)}),
        (2, 7, 6, 3),
    ),
    "depthwise": (
        Sum(
            {
                "a": partial(C, 3, (3, 3), feature_group_count=3),
                "b": partial(C, 3, (1, 1), feature_group_count=3),
            },
            True,
        ),
        IMAGES,
    ),
    "several overparameterized": (
        Sum({**{f"a{i}": partial(C, 3, (3, 3)) for i in range(4)}, "b": partial(C, 3, (1, 1))}),
        IMAGES,
    ),
    "grouped, and the identity": (
        Sum({"a": partial(C, 6, (3, 3), feature_group_count=2)}, True),
        (2, 6, 6, 6),
    ),
    "groups of other sizes": (
        Sum(
            {
                "a": partial(C, 8, (3, 3), feature_group_count=2),
                "b": partial(C, 8, (3, 3), feature_group_count=4),
                "c": partial(C, 8, (1, 1), feature_group_count=8),
            }
        ),
        (2, 6, 6, 8),
    ),
    "a depthwise branch of a full conv": (
        Sum({"a": partial(C, 6, (3, 3)), "b": partial(C, 6, (3, 3), feature_group_count=3)}),
        IMAGES,
    ),
    "asymmetric": (
        Sum(
            {
                "a": partial(C, 4, (3, 3)),
                "b": partial(C, 4, (1, 3)),
                "c": partial(C, 4, (3, 1)),
                "d": partial(C, 4, (2, 2), padding=((1, 0), (1, 0))),
            }
        ),
        IMAGES,
    ),
    "a dilated branch of a large kernel": (
        Sum({"a": partial(C, 4, (7, 7)), "b": partial(C, 4, (3, 3), kernel_dilation=3)}),
        (2, 9, 9, 3),
    ),
    "dilated alike": (
        Sum(
            {
                "a": partial(C, 4, (5, 5), kernel_dilation=2),
                "b": partial(C, 4, (3, 3), kernel_dilation=2),
                "c": partial(C, 4, (1, 1)),
            }
        ),
        (2, 9, 9, 3),
    ),
    "valid": (
        Sum(
            {
                "a": partial(C, 4, (3, 3), padding="VALID"),
                "b": partial(C, 4, (3, 3), padding="VALID"),
            }
        ),
        IMAGES,
    ),
    "circular": (
        Sum(
            {
                "a": partial(C, 3, (5, 5), padding="CIRCULAR"),
                "b": partial(C, 3, (3, 3), padding="CIRCULAR"),
                "c": partial(C, 3, (1, 1)),
            },
            True,
        ),
        IMAGES,
    ),
    "1d and causal": (
        Sum({"a": partial(C, 3, (5,), padding="CAUSAL"), "b": partial(C, 3, (1,))}, True),
        (2, 8, 3),
    ),
    "3d": (
        Sum({"a": partial(C, 3, (3, 3, 3)), "b": partial(C, 3, (1, 1, 1))}, True),
        (2, 4, 4, 4, 3),
    ),
    "dilated input": (
        Sum(
            {
                "a": partial(C, 4, (3, 3), padding=1, input_dilation=2),
                "b": partial(C, 4, (1, 1), padding=0, input_dilation=2),
            }
        ),
        IMAGES,
    ),
    "a mask on a branch": (
        Sum({"a": partial(C, 3, (3, 3)), "b": partial(C, 3, (1, 1), mask=jnp.tri(3)[None, None])}),
        IMAGES,
    ),
    "two batch axes": (
        Sum({"a": partial(C, 3, (3, 3)), "b": partial(C, 3, (1, 1))}, True),
        (2, 2, 6, 6, 3),
    ),
    "no biases": (
        Sum(
            {
                "a": partial(C, 3, (3, 3), use_bias=False),
                "b": partial(C, 3, (1, 1), use_bias=False),
            },
            True,
        ),
        IMAGES,
    ),
    "dense": (Sum({"a": partial(nn.Dense, 3), "b": partial(nn.Dense, 3)}, True), (5, 3)),
}


@pytest.mark.parametrize("name", SUMS)
def test_branches_become_one_layer(name):
    model, shape = SUMS[name]
    model, variables, x = prepare(model, shape)
    for norm in ("a_bn", "identity"):
        if norm in variables["params"]:
            scale = variables["params"][norm]["scale"]
            variables["params"][norm]["scale"] = scale.at[0].set(-1).at[1].set(0)
    folded = assert_same(model, variables, x)
    assert convolutions(folded, x) == 1
    assert divisions(folded.apply, folded.variables, x) == 0
    assert len(folded.variables["params"]) == 1
    assert set(branches(folded).values()) == {None}
    assert len(branches(folded)) == len(model.layers) + model.identity - 1


def test_the_kernel_is_the_sum_of_the_padded_ones_in_float64():
    model, variables, x = prepare(SUMS["repvgg"][0])
    params, stats = variables["params"], variables["batch_stats"]

    def factor_and_shift(name: str) -> tuple[np.ndarray, np.ndarray]:
        scale, bias, mean, var = (
            np.asarray(each, np.float64)
            for each in (
                *(params[name][key] for key in ("scale", "bias")),
                *(stats[name][key] for key in ("mean", "var")),
            )
        )
        factor = scale / np.sqrt(var + 1e-5)
        return factor, bias - mean * factor

    (a, ta), (b, tb), (c, tc) = map(factor_and_shift, ("a_bn", "b_bn", "identity"))
    kernels = [np.asarray(params[name]["kernel"], np.float64) for name in "ab"]
    kernel = kernels[0] * a + np.pad(kernels[1] * b, ((1, 1), (1, 1), (0, 0), (0, 0)))
    kernel[1, 1] += np.diag(c)
    biases = [np.asarray(params[name]["bias"], np.float64) for name in "ab"]
    found = bnjax.fold(model, variables, x).variables["params"]["a"]
    np.testing.assert_allclose(found["kernel"], kernel, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(found["bias"], biases[0] * a + ta + biases[1] * b + tb + tc, 1e-5)


def test_a_long_sum_is_one_layer():
    layers = {f"l{i}": partial(nn.Dense, 3) for i in range(3)}

    class Long(nn.Module):
        @nn.compact
        def __call__(self, x):
            y = sum(EVAL(name=f"{k}_bn")(make(name=k)(x)) for k, make in layers.items())
            for _ in range(1200):
                y = y + 0.0
            return y

    model, variables, x = prepare(Long(), (5, 3))
    assert len(bnjax.fold(model, variables, x).variables["params"]) == 1


def test_the_sum_is_gone_from_the_compiled_program():
    model, variables, x = prepare(SUMS["repvgg"][0])
    folded = bnjax.fold(model, variables, x)
    text = jax.jit(folded.apply).lower(folded.variables, x).compile().as_text()
    assert len(re.findall(r"= \S+ convolution\(|custom-call\(.*conv", text or "")) == 1
    one = nn.Sequential([C(3, (3, 3)), nn.relu])
    plain = jax.jit(one.apply).lower({"params": {"layers_0": folded.variables["params"]["a"]}}, x)
    count = lambda text: len(re.findall(r" add\(", text or ""))  # noqa: E731 - twice the same
    assert count(text) == count(plain.compile().as_text())


def test_a_size_with_other_padding_is_an_error():
    model, variables, x = prepare(SUMS["same, strided"][0])
    folded = bnjax.fold(model, variables, x)
    message = (
        "`x` must be padded at 'a' as `example_x` was, because 'b' was merged into it, but its "
        "shape there is (2, 7, 6, 3), not (2, 6, 6, 3). Fold the model with an input of this size."
    )
    with pytest.raises(ValueError, match=rf"(?m)\A{re.escape(message)}$"):
        folded.apply(folded.variables, inputs((2, 7, 6, 3)))
    more = inputs((3, 8, 10, 3))
    expected, actual = outputs(model, variables, folded, more)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_the_report_names_what_was_merged():
    model, variables, x = prepare(SUMS["repvgg"][0])
    text = re.sub(r"[ │┃\n]+", " ", str(bnjax.fold(model, variables, x).report))
    assert "3 layers folded, 2 branches merged" in text
    assert "identity - merged into a" in text


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_keeps_its_dtype(dtype):
    both = {"dtype": dtype, "param_dtype": dtype}
    layers = {"a": partial(C, 3, (3, 3), **both), "b": partial(C, 3, (1, 1), **both)}
    model, variables, x = prepare(Sum(layers, True))
    folded = assert_same(model, variables, x, 3e-2)
    assert folded.variables["params"]["a"]["kernel"].dtype == dtype


# Models


class RepVGG(nn.Module):
    """RepVGG of Ding et al. 2021, with groups in every other block."""

    @nn.compact
    def __call__(self, x):
        for i, (width, stride) in enumerate(((8, 2), (8, 1), (8, 1), (16, 2), (16, 1))):
            groups = 2 if i % 2 else 1
            conv = partial(
                nn.Conv, width, strides=stride, use_bias=False, feature_group_count=groups
            )
            y = EVAL(name=f"dense_bn{i}")(conv(kernel_size=(3, 3), padding=1, name=f"dense{i}")(x))
            y += EVAL(name=f"point_bn{i}")(conv(kernel_size=(1, 1), padding=0, name=f"point{i}")(x))
            if stride == 1:
                y += EVAL(name=f"identity{i}")(x)
            x = nn.relu(y)
        return nn.Dense(5)(x.mean((1, 2)))


def test_repvgg_becomes_a_vgg():
    model, variables, x = prepare(RepVGG(), (2, 16, 16, 3))
    folded = assert_same(model, variables, x)
    assert convolutions(folded, x) == 6
    assert folded.variables["params"].keys() == {"Dense_0", *(f"dense{i}" for i in range(5))}
    any_batch = jax.ShapeDtypeStruct((*export.symbolic_shape("b"), *x.shape[1:]), x.dtype)
    exported = export.export(jax.jit(folded.apply))(folded.variables, any_batch)
    more = inputs((5, *x.shape[1:]))
    np.testing.assert_allclose(
        exported.call(folded.variables, more), model.apply(variables, more), rtol=1e-3, atol=1e-4
    )


class RepBlock(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, groups: int = 1) -> None:
        conv = partial(nnx.Conv, 4, 4, use_bias=False, feature_group_count=groups, rngs=rngs)
        self.dense, self.point = conv(kernel_size=(3, 3)), conv(kernel_size=(1, 1))
        self.norms = nnx.List(nnx.BatchNorm(4, rngs=rngs) for _ in range(3))

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.norms[0](self.dense(x)) + self.norms[1](self.point(x)) + self.norms[2](x)
        return nnx.relu(y)


def test_an_nnx_model_merges_its_branches():
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(RepBlock(rngs), RepBlock(rngs, 4), nnx.Linear(4, 2, rngs=rngs))
    nnx.update(model, trained(nnx.state(model, (nnx.Param, nnx.BatchStat))))
    x = inputs((2, 6, 6, 4))
    folded = bnjax.fold(model, None, x)
    model.eval()
    np.testing.assert_allclose(folded.apply(folded.variables, x), model(x), rtol=1e-4, atol=1e-5)
    assert convolutions(folded, x) == 3
    assert folded.variables["params"]["layers"]["0"].keys() == {"dense"}
    assert divisions(folded.apply, folded.variables, x) == 0
