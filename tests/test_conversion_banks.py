"""Banks to and from timm's `SplitBatchNorm2d`, which keeps each as a separate batch norm."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import bnjax
from bnjax import policies

pytest.importorskip("torch")

import torch


class Split(torch.nn.BatchNorm2d):
    """Like `timm.layers.SplitBatchNorm2d`: each part of the batch has its own layer."""

    def __init__(self, features, splits):
        super().__init__(features)
        others = (torch.nn.BatchNorm2d(features) for _ in range(splits - 1))
        self.aux_bn = torch.nn.ModuleList(others)

    def forward(self, input):
        x = input
        if not self.training:
            return super().forward(x)
        first, *others = x.split(len(x) // (len(self.aux_bn) + 1))
        rest = (norm(part) for norm, part in zip(self.aux_bn, others, strict=True))
        return torch.cat([super().forward(first), *rest])


class Theirs(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = torch.nn.Conv2d(3, 4, 1), Split(4, 3)

    def forward(self, x):
        return self.bn(self.conv(x))


class Ours(nn.Module):
    momentum: float | None = 0.1
    affine: Any = "own"

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (1, 1), name="conv")(x)
        settings = {"banks": 3, "affine": self.affine, "momentum": self.momentum}
        return bnjax.BatchNorm2d(4, **settings, name="bn")(x)


class OursNNX(nnx.Module):
    def __init__(self):
        self.conv = nnx.Conv(3, 4, (1, 1), rngs=nnx.Rngs(0))
        self.bn = bnjax.nnx.BatchNorm2d(4, banks=3, affine="own", rngs=nnx.Rngs(0))


@pytest.fixture
def trained(rng):
    """A state dict after one step, an input (channels last), and the next output and state dict."""
    torch.manual_seed(0)
    module, x = Theirs(), rng.normal(size=(6, 4, 4, 3)).astype("f") * 2 + 1
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    inputs = torch.tensor(np.moveaxis(x, -1, 1))
    module(inputs)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    return before, x, np.moveaxis(module(inputs).detach().numpy(), 1, -1), module.state_dict()


def test_banks_convert_from_the_layer_and_its_aux_bn(trained):
    before, x, expected, after = trained
    variables = bnjax.from_torch(before, Ours(), Ours().init(jax.random.key(0), x))
    net: Any = Ours()
    with bnjax.bank(np.arange(6) // 2):
        y, moved = net.apply(variables, x, mutable=["batch_stats"])
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    for bank, name in enumerate(("bn", "bn.aux_bn.0", "bn.aux_bn.1")):
        for ours, theirs in (("mean", "running_mean"), ("var", "running_var")):
            found = moved["batch_stats"]["bn"][ours][bank]
            np.testing.assert_allclose(found, after[f"{name}.{theirs}"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("like", [True, False], ids=["like", "alone"])
def test_banks_convert_back_exactly(trained, like):
    before, x, _, _ = trained
    variables = bnjax.from_torch(before, Ours(), Ours().init(jax.random.key(0), x))
    back = bnjax.to_torch(variables, before if like else None)
    Theirs().load_state_dict(back, strict=True)
    counted = {name for name in before if name.endswith("num_batches_tracked")}
    for name in before.keys() - (set() if like else counted):
        assert torch.equal(back[name], before[name]), name
    assert not like or list(back) == list(before)


def test_each_bank_has_its_own_count(trained):
    before, x, _, _ = trained
    before["bn.aux_bn.1.num_batches_tracked"] += 4
    net = Ours(momentum=None)
    variables = bnjax.from_torch(before, net, net.init(jax.random.key(0), x))
    assert variables["batch_stats"]["bn"]["count"].tolist() == [1, 1, 5]
    back = bnjax.to_torch(variables)
    assert back["bn.aux_bn.1.num_batches_tracked"].item() == 5


def test_banks_of_an_nnx_model_convert_both_ways(trained):
    before, _, _, _ = trained
    model = OursNNX()
    nnx.update(model, bnjax.from_torch(before, model))
    np.testing.assert_array_equal(model.bn.mean[...][2], before["bn.aux_bn.1.running_mean"])
    back = bnjax.to_torch(model, before)
    assert all(torch.equal(back[name], before[name]) for name in before)


@pytest.mark.parametrize("affine", [True, "both"])
def test_arrays_that_banks_share_are_copied_into_each(trained, affine):
    before, x, _, _ = trained
    variables = bnjax.from_torch(before, Ours(), Ours().init(jax.random.key(0), x))
    banks = bnjax.to_banks(bnjax.select_bank(variables, 1), 3, affine=affine)
    back = bnjax.to_torch(banks)
    Theirs().load_state_dict(back, strict=True)
    for name in ("bn", "bn.aux_bn.0", "bn.aux_bn.1"):
        assert torch.equal(back[f"{name}.weight"], before["bn.aux_bn.0.weight"])
        assert torch.equal(back[f"{name}.running_mean"], before["bn.aux_bn.0.running_mean"])


def test_the_step_count_of_a_policy_converts_from_pytorch(trained):
    layer = bnjax.BatchNorm2d(3, using=policies.Renorm.paper())
    variables = layer.init(jax.random.key(0), jnp.ones((2, 2, 2, 3)))
    theirs = torch.nn.BatchNorm2d(3).state_dict()
    theirs["num_batches_tracked"] += 7
    new = bnjax.from_torch(theirs, layer, variables)
    assert int(new["batch_stats"]["count"]) == 7


@pytest.mark.parametrize("affine", [True, "both"])
def test_banks_that_share_scale_and_bias_convert_both_ways(trained, affine):
    before, x, _, _ = trained
    for name in ("bn.aux_bn.0", "bn.aux_bn.1"):
        for leaf in ("weight", "bias"):
            before[f"{name}.{leaf}"] = before[f"bn.{leaf}"]
    net = Ours(affine=affine)
    variables = net.init(jax.random.key(0), x)
    new = bnjax.from_torch(before, net, variables)
    np.testing.assert_array_equal(new["params"]["bn"]["scale"], before["bn.weight"])
    assert not affine == "both" or not new["params"]["bn"]["bank_scale"].any()
    for like in (before, None):
        back = bnjax.to_torch(new, like)
        assert all(torch.equal(back[name], before[name]) for name in before if "num" not in name)
    shapes = jax.eval_shape(net.init, jax.random.key(0), x)
    again = bnjax.from_torch(before, net, shapes)
    jax.tree.map(np.testing.assert_array_equal, again, new)


def test_what_banks_add_to_the_shared_scale_converts_both_ways(trained):
    before, x, _, _ = trained
    net = Ours(affine="both")
    new = bnjax.from_torch(before, net, net.init(jax.random.key(0), x))
    scale, added = new["params"]["bn"]["scale"], new["params"]["bn"]["bank_scale"]
    np.testing.assert_array_equal(scale, before["bn.weight"])
    expected = before["bn.aux_bn.1.weight"] - before["bn.weight"]
    np.testing.assert_allclose(added[2], expected, atol=1e-7)
    back = bnjax.to_torch(new, before)
    for name in ("bn.weight", "bn.aux_bn.0.weight", "bn.aux_bn.1.bias"):
        np.testing.assert_allclose(back[name], before[name], rtol=1e-6, atol=1e-7)


def test_scales_that_differ_between_banks_do_not_fit_a_shared_one(trained):
    before, x, _, _ = trained
    net = Ours(affine=True)
    message = (
        "different in each bank: bn.weight, and its aux_bn, for params/bn/scale (4,), which they "
        'share. Make the layer with affine="own"'
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        bnjax.from_torch(before, net, net.init(jax.random.key(0), x))
