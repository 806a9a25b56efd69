"""Attention, DenseGeneral and PReLU, converted and compared with PyTorch live, and back."""

from typing import Any

import jax
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import bnjax
from tests.support.state_dicts import F32, mismatch, params, refused

pytest.importorskip("torch", reason="PyTorch is pinned for Python < 3.12 only")

import torch

from tests.support.both_ways import INPUTS, converts_both_ways, outputs

pytestmark = pytest.mark.quick_compile


class Attention(nn.Module):
    bias: bool = True

    @nn.compact
    def __call__(self, x):
        make = nn.MultiHeadDotProductAttention(2, use_bias=self.bias, name="attn")
        return make(x)


class NnxAttention(nnx.Module):
    def __init__(self) -> None:
        self.attn = nnx.MultiHeadAttention(2, 6, 6, decode=False, rngs=nnx.Rngs(0))

    def __call__(self, x: Any) -> Any:
        return self.attn(x)


class TorchAttention(torch.nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attn = torch.nn.MultiheadAttention(6, 2, batch_first=True, **options)
        for name, parameter in self.attn.named_parameters():
            torch.nn.init.normal_(parameter, std=0.3) if "bias" in name else None

    def forward(self, x: Any) -> Any:
        return self.attn(x, x, x)[0]


class Projections(torch.nn.Module):
    """Attention as in vision transformers."""

    def __init__(self, stacked: bool) -> None:
        super().__init__()
        self.attn = torch.nn.Module()
        sizes: dict[str, int] = (
            {"qkv": 18} if stacked else dict.fromkeys(("q_proj", "k_proj", "v_proj"), 6)
        )
        for name, size in {**sizes, "proj" if stacked else "out_proj": 6}.items():
            setattr(self.attn, name, torch.nn.Linear(6, size))

    def forward(self, x: Any) -> Any:
        *inner, out = self.attn.children()
        heads = torch.cat([layer(x) for layer in inner], -1).unflatten(-1, (3, 2, 3))
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        return out(y.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("model", [Attention(), NnxAttention()])
@pytest.mark.parametrize(
    "theirs",
    [TorchAttention(), TorchAttention(kdim=6, vdim=6), Projections(True), Projections(False)],
)
def test_attention_converts_both_ways(model, theirs):
    converts_both_ways(theirs, model)


def test_attention_without_biases_and_with_an_automatic_name():
    converts_both_ways(TorchAttention(bias=False), Attention(bias=False))
    shapes: Any = jax.eval_shape(Attention().init, jax.random.key(0), INPUTS)
    auto = params(MultiHeadDotProductAttention_0=shapes["params"]["attn"])
    first, second, *_ = refused(TorchAttention().state_dict(), auto)
    rename = {"attn": "MultiHeadDotProductAttention_0"}
    assert first == 'names match with rename={"attn": "MultiHeadDotProductAttention_0"}'
    arrays = "attn.in_proj_weight, attn.in_proj_bias, attn.out_proj.weight, attn.out_proj.bias"
    assert second == f"only in PyTorch: attention attn (6, 6), in {arrays}"
    bnjax.from_torch(TorchAttention().state_dict(), None, auto, rename=rename)


def test_without_like_attention_and_dense_general_become_linear_layers():
    variables: Any = Attention().init(jax.random.key(0), INPUTS)
    shapes = {k: v.shape for k, v in bnjax.to_torch(variables, numpy=True).items()}
    names = ("key", "out", "query", "value")
    assert shapes == {
        f"attn.{name}.{leaf}": shape
        for name in names
        for leaf, shape in (("bias", (6,)), ("weight", (6, 6)))
    }
    wide = params(
        fc=nn.DenseGeneral((2, 3), axis=(-2, -1)).init(jax.random.key(0), INPUTS)["params"]
    )
    shapes = {k: v.shape for k, v in bnjax.to_torch(wide, numpy=True).items()}
    assert shapes == {"fc.bias": (6,), "fc.weight": (6, 42)}


def test_a_linear_layer_converts_to_a_dense_general():
    theirs = torch.nn.Linear(42, 6)
    model = nn.DenseGeneral((2, 3), axis=(-2, -1), use_bias=True)
    variables: Any = model.init(jax.random.key(0), INPUTS)
    variables = bnjax.from_torch(theirs.state_dict(), model, variables)
    found: Any = model.apply(variables, INPUTS)
    np.testing.assert_allclose(
        found.reshape(2, 6), outputs(theirs, INPUTS.reshape(2, 42)), atol=1e-6
    )
    back = bnjax.to_torch(variables, theirs.state_dict())
    assert all(torch.equal(back[key], tensor) for key, tensor in theirs.state_dict().items())


# PReLU


@pytest.mark.parametrize("framework", ["linen", "nnx"])
def test_prelu_slopes_convert(framework):
    theirs = torch.nn.PReLU(init=0.375)
    model: Any = nn.PReLU() if framework == "linen" else nnx.PReLU()
    variables = nnx.state(model) if framework == "nnx" else model.init(jax.random.key(0), INPUTS)
    variables = bnjax.from_torch(theirs.state_dict(), model, variables)
    nnx.update(model, variables) if framework == "nnx" else None
    found = model(INPUTS) if framework == "nnx" else model.apply(variables, INPUTS)
    np.testing.assert_array_equal(found, outputs(theirs, INPUTS))
    for like in (theirs.state_dict(), None):
        back = bnjax.to_torch(variables, like)
        assert back["weight"].tolist() == [0.375]
    scalar = {"weight": torch.tensor(0.5)}
    assert jax.tree.leaves(bnjax.from_torch(scalar, None, params(negative_slope=F32(0)))) == [0.5]


def test_a_slope_per_channel_is_refused():
    message = mismatch(
        "wrong shape: act.weight (3,) for params/act/negative_slope (), which is (1,) in PyTorch. "
        "Flax's PReLU has one slope for all channels"
    )
    with pytest.raises(ValueError, match=message):
        bnjax.from_torch(
            {"act.weight": np.ones(3, F32)}, None, params(act={"negative_slope": F32(0)})
        )
