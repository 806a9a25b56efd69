"""Whole models whose batch norms fold into the layers after them."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import bnjax
from tests.support.folded import (
    EVAL,
    IMAGES,
    assert_folded,
    divisions,
    inputs,
    prepare,
    reasons,
    trained,
)

pytestmark = pytest.mark.quick_compile


class PreActivation(nn.Module):
    """A ResNet v2 (He et al. 2016), which has a relu between each batch norm and conv."""

    @nn.compact
    def __call__(self, x):
        x = EVAL(name="data_bn")(x)
        x = nn.Conv(8, (3, 3), use_bias=False, name="stem")(x)
        for i in range(2):
            y = nn.relu(EVAL(name=f"a{i}")(x))
            y = nn.Conv(8, (3, 3), use_bias=False, name=f"conv_a{i}")(y)
            y = nn.relu(EVAL(name=f"b{i}")(y))
            x = x + nn.Conv(8, (3, 3), use_bias=False, name=f"conv_b{i}")(y)
        return nn.Dense(5, name="head")(nn.relu(EVAL(name="last")(x)).mean((1, 2)))


def test_a_pre_activation_resnet_reports_the_relus_in_between():
    model, variables, x = prepare(PreActivation())
    folded = assert_folded(model, variables, x, bare=False)
    found = reasons(folded)
    assert found["stem", "data_bn"] is None
    assert found["conv_a0", "b0"] is found["conv_a1", "b1"] is None
    added = "its input comes from add, not from a conv or dense layer, and its output goes into max"
    assert found["", "a1"] == found["", "last"] == added
    assert found["stem", "a0"] == "its output goes into 'a0' and add, not only into a batch norm"


class DenseLayer(nn.Module):
    @nn.compact
    def __call__(self, x):
        y = nn.Conv(8, (1, 1), use_bias=False, name="conv1")(nn.relu(EVAL(name="norm1")(x)))
        y = nn.Conv(4, (3, 3), use_bias=False, name="conv2")(nn.relu(EVAL(name="norm2")(y)))
        return jnp.concatenate([x, y], -1)


def test_a_densenet_folds_half_of_its_batch_norms():
    model = nn.Sequential([nn.Conv(4, (3, 3)), DenseLayer(), DenseLayer(), nn.Dense(3)])
    found = reasons(assert_folded(*prepare(model), bare=False))
    assert found["layers_1/conv1", "layers_1/norm2"] is None
    assert found["layers_2/conv1", "layers_2/norm2"] is None
    assert found["", "layers_2/norm1"] == (
        "its input comes from concatenate, not from a conv or dense layer, and its output goes "
        "into max"
    )


class Transformer(nn.Module):
    """A vision transformer with batch norms instead of layer norms."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (4, 4), strides=4, name="patches")(x).reshape(x.shape[0], -1, 8)
        x = x + self.param("positions", nn.initializers.normal(), x.shape[1:])
        y = EVAL(name="norm1")(x)
        query, key, value = (nn.DenseGeneral((2, 4), name=name)(y) for name in ("q", "k", "v"))
        y = nn.dot_product_attention(query, key, value)
        x = x + nn.DenseGeneral(8, axis=(-2, -1), name="out")(y)
        x = x + nn.Dense(8, name="down")(nn.gelu(nn.Dense(16, name="up")(EVAL(name="norm2")(x))))
        return nn.Dense(5, name="head")(EVAL(name="norm")(x)[:, 0])


def test_a_vision_transformer_folds_every_batch_norm():
    folded = assert_folded(*prepare(Transformer(), (2, 8, 8, 3)), bare=False)
    assert "batch_stats" not in folded.variables  # the attention has its own square root
    found = reasons(folded)
    assert all(found[name, "norm1"] is None for name in ("q", "k", "v"))
    assert found["up", "norm2"] is found["head", "norm"] is None


def test_an_nnx_model_folds_forward():
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(
        nnx.BatchNorm(3, rngs=rngs),
        nnx.Conv(3, 6, (3, 3), feature_group_count=3, use_bias=False, rngs=rngs),
        nnx.relu,
        nnx.BatchNorm(6, rngs=rngs),
        lambda x: x.reshape(x.shape[0], -1),
        nnx.Linear(216, 2, rngs=rngs),
    )
    nnx.update(model, trained(nnx.state(model, (nnx.Param, nnx.BatchStat))))
    x = inputs(IMAGES)
    folded = bnjax.fold(model, None, x)
    model.eval()
    np.testing.assert_allclose(folded.apply(folded.variables, x), model(x), rtol=1e-4, atol=1e-5)
    assert folded.variables.keys() == {"params"}
    assert divisions(folded.apply, folded.variables, x) == 0
