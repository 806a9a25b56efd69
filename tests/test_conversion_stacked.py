"""Layers that nn.scan or nnx.vmap stacks are refused; banks are not taken for them."""

import re
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import bnjax

ONE = (
    "Convert one layer at a time: take its arrays with jax.tree.map(lambda array: array[0], ...). "
    "If these are banks, pass `like`."
)


def linear(rank: int, bias: bool, name: str | None) -> Any:
    if not rank:
        return nn.Dense(4, use_bias=bias, name=name)
    return nn.Conv(4, (3,) * rank, use_bias=bias, name=name)


class Block(nn.Module):
    rank: int
    bias: bool
    name_inside: str | None

    @nn.compact
    def __call__(self, x, _):
        x = linear(self.rank, self.bias, self.name_inside)(x)
        return nn.relu(nn.BatchNorm(use_running_average=False, name="bn")(x)), None


class Stack(nn.Module):
    layers: int
    rank: int = 0
    bias: bool = True
    name_inside: str | None = "linear"
    stem: bool = False

    @nn.compact
    def __call__(self, x):
        if self.stem:
            x = linear(self.rank, True, "stem")(x)
        lifted: Any = nn.scan(
            Block,
            variable_axes={"params": 0, "batch_stats": 0},
            split_rngs={"params": True},
            length=self.layers,
        )
        x, _ = lifted(self.rank, self.bias, self.name_inside, name="blocks")(x, None)
        return nn.Dense(2, name="head")(x)


class Banks(nn.Module):
    banks: int
    rank: int
    affine: Any
    bias: bool = False
    dense: bool = True

    @nn.compact
    def __call__(self, x):
        layer = {1: bnjax.BatchNorm1d, 2: bnjax.BatchNorm2d, 3: bnjax.BatchNorm3d}[self.rank]
        for number in range(2):
            x = linear(self.rank, self.bias, f"conv{number}")(x)
            settings = {"banks": self.banks, "affine": self.affine}
            x = layer(4, **settings, name=f"bn{number}")(x, bank=0)
        return nn.Dense(2, name="head")(x) if self.dense else x


def made(net: Any, rank: int) -> Any:
    variables = jax.eval_shape(net.init, jax.random.key(0), jnp.ones((2, *(3,) * rank, 4)))
    return jax.tree.map(lambda a: np.arange(a.size, dtype="f").reshape(a.shape), variables)


@pytest.mark.parametrize("rank", [0, 1, 2])
@pytest.mark.parametrize(
    ("layers", "bias", "name", "stem"),
    [
        (3, True, "linear", False),
        (4, True, "linear", False),  # each kernel is also that of a DenseGeneral
        (5, False, "linear", False),
        (2, False, "linear", True),
    ],
)
def test_stacked_layers_are_refused(rank, layers, bias, name, stem):
    variables = made(Stack(layers, rank, bias, name, stem), rank)
    shape = variables["params"]["blocks"]["linear"]["kernel"].shape
    message = (
        "`variables` must have separate arrays for each layer, but params/blocks/linear/kernel "
        f"{shape} looks like {layers} layers stacked by nn.scan or nnx.vmap. {ONE}"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        bnjax.to_torch(variables, numpy=True)


def test_names_that_flax_gives_and_the_stem_show_a_stack_of_three():
    for net, rank in (
        (Stack(3, 0, False, None), 0),
        (Stack(3, 1, False, "linear", True), 1),
        (Stack(3, 2, False, "linear", True), 2),
    ):
        with pytest.raises(
            ValueError, match=r"looks like 3 layers stacked by nn\.scan or nnx\.vmap\."
        ):
            bnjax.to_torch(made(net, rank), numpy=True)


def test_one_layer_of_a_stack_converts():
    variables = made(Stack(4, 2), 2)
    one = jax.tree.map(lambda array: array[1], {k: v["blocks"] for k, v in variables.items()})
    found = bnjax.to_torch(one, numpy=True)
    kernel = variables["params"]["blocks"]["linear"]["kernel"][1]
    np.testing.assert_array_equal(found["linear.weight"], np.transpose(kernel, (3, 2, 0, 1)))
    back = bnjax.from_torch(found, None, one)
    jax.tree.map(np.testing.assert_array_equal, back, one)


@pytest.mark.parametrize("affine", [True, False, "own", "both"])
@pytest.mark.parametrize("banks", [1, 3])
@pytest.mark.parametrize("bias", [True, False])
def test_banks_next_to_convs_of_their_size_convert_both_ways(affine, banks, bias):
    net = Banks(banks, 2, affine, bias)
    variables = made(net, 2)
    for norm in variables["params"].values() if affine == "both" else ():
        norm |= {name: 0 * array for name, array in norm.items() if name.startswith("bank_")}
    found = bnjax.to_torch(variables, numpy=True)
    assert found["bn1.running_mean"].shape == (4,)
    assert ("bn1.aux_bn.1.running_mean" in found) == (banks == 3)
    again = bnjax.to_torch(variables, found, numpy=True)
    assert all((again[name] == found[name]).all() for name in found)
    back = bnjax.from_torch(found, net, variables)
    jax.tree.map(np.testing.assert_array_equal, back, variables)


@pytest.mark.parametrize("rank", [1, 3])
def test_what_may_be_banks_or_a_stack_is_converted_with_a_warning(rank):
    variables = made(Banks(3, rank, "own", dense=False), rank)
    message = (
        "`variables` were read as 3 banks and convs of size 3, but params/conv0/kernel may also be "
        "3 layers stacked by nn.scan or nnx.vmap. If so, convert one layer at a time; otherwise, "
        "pass `like`."
    )
    with pytest.warns(UserWarning, match=f"^{re.escape(message)}$"):
        found = bnjax.to_torch(variables, numpy=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bnjax.to_torch(variables, found, numpy=True)


def test_an_nnx_model_shows_its_stack_and_its_banks():
    class Layer(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.conv = nnx.Conv(4, 4, (3, 3), use_bias=False, rngs=rngs)
            self.bn = nnx.BatchNorm(4, rngs=rngs)

    @nnx.split_rngs(splits=3)
    @nnx.vmap
    def stacked(rngs: nnx.Rngs) -> Layer:
        return Layer(rngs)

    class Conv1d(nnx.Module):
        def __init__(self) -> None:
            self.conv = nnx.Conv(4, 4, (3,), use_bias=False, rngs=nnx.Rngs(0))
            self.bn = bnjax.nnx.BatchNorm1d(4, banks=3, affine="own", rngs=nnx.Rngs(0))

    with pytest.raises(ValueError, match=r"^`variables` must have .* looks like 3 layers stacked"):
        bnjax.to_torch(stacked(nnx.Rngs(0)), numpy=True)
    assert bnjax.to_torch(Conv1d(), numpy=True)["conv.weight"].shape == (4, 4, 3)


def test_statistics_with_more_axes_than_banks_are_a_stack():
    stats = {"mean": np.zeros((2, 3, 4), "f"), "var": np.ones((2, 3, 4), "f")}
    message = (
        f"batch_stats/bn/mean (2, 3, 4) looks like 2 layers stacked by nn.scan or nnx.vmap. {ONE}"
    )
    with pytest.raises(ValueError, match=f"{re.escape(message)}$"):
        bnjax.to_torch({"batch_stats": {"bn": stats}}, numpy=True)


def test_the_layers_of_pytorch_do_not_fit_a_stack():
    variables = made(Stack(5, 2), 2)
    one = {
        k: {"blocks": jax.tree.map(lambda array: array[0], v["blocks"])}
        for k, v in variables.items()
    }
    one["params"]["head"] = variables["params"]["head"]
    state = bnjax.to_torch(one, numpy=True)
    lines = (
        "wrong shape: blocks.linear.weight (4, 4, 3, 3) for params/blocks/linear/kernel "
        "(5, 3, 3, 4, 4), which is (4, 4, 5, 3, 3) in PyTorch. Flax stacks 5 such layers (nn.scan, "
        "nnx.vmap): convert one at a time\n",
        "wrong shape: blocks.bn.running_mean (4,) for batch_stats/blocks/bn/mean (5, 4), which is "
        "(5, 4) in PyTorch. Flax has 5: layers stacked by nn.scan or nnx.vmap, or banks, which "
        "bnjax.to_banks makes of one\n",
        "stacked: params/blocks/linear/kernel (5, 3, 3, 4, 4) looks like 5 layers stacked by "
        "nn.scan or nnx.vmap, which PyTorch keeps apart. Convert one layer at a time",
    )
    for line in lines:
        with pytest.raises(ValueError, match=re.escape(line)):
            bnjax.from_torch(state, None, variables)
        with pytest.raises(ValueError, match=re.escape(line)):
            bnjax.to_torch(variables, state)
