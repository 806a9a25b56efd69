"""Layouts: bit-exact round trips, nnx models, and transposed convolutions."""

import dataclasses
import re
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import bnjax
from tests.support.state_dicts import F32, batch_norm, mismatch, params

pytestmark = pytest.mark.quick_compile

# Round trips


@st.composite
def layers(draw):
    """A layer of any kind: its state dict, its variables as shapes, and the options."""
    size = st.integers(1, 4)
    kinds = ["conv", "transposed", "linear", "flat", "embedding", "norm"]
    kind = draw(st.sampled_from(kinds))
    groups, i, o = draw(size), draw(size), draw(size)
    spatial = tuple(draw(st.lists(size, min_size=1, max_size=3)))
    options: dict[str, Any] = {}
    if kind == "conv":
        shapes = {"weight": (groups * o, i, *spatial)}, {"kernel": (*spatial, i, groups * o)}
    elif kind == "transposed":
        shapes = {"weight": (i, o, *spatial)}, {"kernel": (*spatial, i, o)}
        options = {"transposed": "m/layer"}
    elif kind in ("linear", "flat"):
        inputs = int(np.prod((i, *spatial)))
        shapes = {"weight": (o, inputs)}, {"kernel": (inputs, o)}
        options = {"flatten": {"m/layer": (i, *spatial)}} if kind == "flat" else {}
    elif kind == "embedding":
        shapes = {"weight": (i, o)}, {"embedding": (i, o)}
    else:
        shapes = {"weight": (o,)}, {"scale": (o,)}
    if draw(st.booleans()) and kind != "embedding":
        shapes = {**shapes[0], "bias": (o,)}, {**shapes[1], "bias": (o,)}
    dtype = draw(st.sampled_from([np.float16, np.float32, jnp.bfloat16]))
    rng = np.random.default_rng(draw(st.integers(0, 9)))
    state_dict = {
        f"m.layer.{n}": rng.standard_normal(s).astype(dtype) for n, s in shapes[0].items()
    }
    flax = {n: jax.ShapeDtypeStruct(s, dtype) for n, s in shapes[1].items()}
    return state_dict, params(m={"layer": flax}), options


@st.composite
def batch_norms(draw):
    """A batch norm with a counter, likewise."""
    channels, affine = draw(st.integers(1, 4)), draw(st.booleans())
    rng = np.random.default_rng(draw(st.integers(0, 9)))
    names = ("running_mean", "running_var") + ("weight", "bias") * affine
    state_dict = {f"m.layer.{n}": rng.uniform(0, 9, channels).astype(F32) for n in names}
    state_dict["m.layer.num_batches_tracked"] = np.array(draw(st.integers(0, 2**31 - 1)))
    array, count = jax.ShapeDtypeStruct((channels,), F32), jax.ShapeDtypeStruct((), np.int32)
    template = params(m={"layer": {"scale": array, "bias": array}}) if affine else {}
    template["batch_stats"] = {"m": {"layer": {"mean": array, "var": array, "count": count}}}
    return state_dict, template, {}


@settings(max_examples=60)
@given(layers() | batch_norms())
def test_round_trips_are_bit_exact(layer):
    state_dict, template, options = layer
    new = bnjax.from_torch(state_dict, None, template, **options)
    assert jax.tree.map(jnp.shape, new) == jax.tree.map(jnp.shape, template)
    for like in (state_dict, None):
        back = bnjax.to_torch(new, like, **options, numpy=True)
        assert back.keys() == state_dict.keys()
        for name, array in state_dict.items():
            assert back[name].dtype == array.dtype
            assert back[name].tobytes() == array.tobytes()


# nnx


class Small(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.convs = nnx.List([nnx.Conv(3, 4, (3, 3), rngs=rngs)])
        self.bn = bnjax.nnx.BatchNorm2d(4, momentum=None, rngs=rngs)
        self.up = nnx.ConvTranspose(4, 4, (2, 2), (2, 2), rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)


def small_state_dict() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    shapes = {"convs.0": (4, 3, 3, 3), "up": (4, 4, 2, 2)}
    weights = {f"{n}.weight": rng.standard_normal(s).astype(F32) for n, s in shapes.items()}
    biases = {f"{n}.bias": rng.standard_normal(4).astype(F32) for n in shapes}
    return weights | biases | batch_norm(4)


def test_an_nnx_model_returns_a_new_state_and_stays_unchanged():
    model: Any = Small(nnx.Rngs(0))
    state_dict = small_state_dict()
    before = jax.device_get(nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.RngState))))
    state = bnjax.from_torch(state_dict, model)
    chex.assert_trees_all_equal(nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.RngState))), before)
    nnx.update(model, state)
    kernel = state_dict["convs.0.weight"].transpose(2, 3, 1, 0)
    np.testing.assert_array_equal(model.convs[0].kernel[...], kernel)
    # An nnx model knows which of its convolutions are transposed.
    flipped = state_dict["up.weight"][:, :, ::-1, ::-1].transpose(2, 3, 0, 1)
    np.testing.assert_array_equal(model.up.kernel[...], flipped)
    assert int(model.bn.count[...]) == 7
    chex.assert_trees_all_equal(bnjax.to_torch(model, state_dict, numpy=True), state_dict)
    chex.assert_trees_all_equal(bnjax.to_torch(state, numpy=True, transposed="up"), state_dict)


# Transposed convolutions in linen models


class Up(nn.Module):
    transpose_kernel: bool = False

    @nn.compact
    def __call__(self, x):
        make = partial(nn.ConvTranspose, 3, (2, 2), (2, 2), transpose_kernel=self.transpose_kernel)
        return make(name="up")(x)


class OurTranspose(nn.ConvTranspose):
    """A user's subclass."""


class UpByHelpers(nn.Module):
    config: Any = None

    @staticmethod
    def make(**options):
        return OurTranspose(3, (2, 2), (2, 2), **options)

    @property
    def up(self):
        return self.make(name="up")

    @nn.compact
    def __call__(self, x):
        return self.up(x)


@dataclasses.dataclass(frozen=True)
class Config:
    layer: Any = OurTranspose


class UpByConfig(nn.Module):
    config: Any = Config()

    @nn.compact
    def __call__(self, x):
        return self.config.layer(3, (2, 2), (2, 2), name="up")(x)


class Net(nn.Module):
    parts: Any = (Up,)

    @nn.compact
    def __call__(self, x):
        return self.parts[0](name="net")(x)


@pytest.mark.parametrize(
    "net",
    [
        Net(),
        Net((nn.remat(Up),)),
        Net((partial(Up),)),
        Net((UpByHelpers,)),
        Net((partial(UpByConfig, config=Config()),)),
    ],
)
def test_transposed_is_required_for_linen_models_with_transposed_convolutions(net):
    weight = {"net.up.weight": np.zeros((3, 3, 2, 2), F32), "net.up.bias": np.zeros(3, F32)}
    variables = net.init(jax.random.key(0), jnp.ones((1, 2, 2, 3)))
    message = (
        "`transposed` must say which layers are a `flax.linen.ConvTranspose` with "
        "transpose_kernel=False, the default: the model uses ConvTranspose, and kernels do not "
        "show where. Pass globs for them among ['net/up'], or () if all have "
        "transpose_kernel=True."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        bnjax.from_torch(weight, net, variables)
    bnjax.from_torch(weight, net, variables, transposed="net/up")
    bnjax.from_torch(weight, net, variables, transposed=())
    named = {"params": {"ConvTranspose_0": variables["params"]["net"]["up"]}}
    with pytest.raises(ValueError, match=r"Pass globs for them among \['ConvTranspose_0'\], or"):
        bnjax.to_torch(named)


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        ((4, 6, 2), ". That is the shape of a transposed convolution: is `transposed` right?"),
        ((4, 2, 2), ""),
    ],
)
def test_errors_recognize_the_shape_of_a_transposed_convolution(shape, reason):
    variables = params(up={"kernel": np.zeros((2, 4, 6), F32)})
    line = f"wrong shape: up.weight {shape} for params/up/kernel (2, 4, 6), which is (6, 4, 2) in "
    with pytest.raises(ValueError, match=mismatch(f"{line}PyTorch{reason}")):
        bnjax.from_torch({"up.weight": np.zeros(shape, F32)}, None, variables)


@pytest.mark.parametrize(
    ("channels", "reason"),
    [(3, ". Flax's ConvTranspose does not support groups"), (0, "")],
)
def test_transposed_convolutions_with_groups_are_refused(channels, reason):
    variables = params(up={"kernel": np.zeros((2, 4, 6), F32)})
    line = (
        f"wrong shape: up.weight (4, {channels}, 2) for params/up/kernel (2, 4, 6), which is "
        f"(4, 6, 2) in PyTorch{reason}"
    )
    weight = {"up.weight": np.zeros((4, channels, 2), F32)}
    with pytest.raises(ValueError, match=mismatch(line)):
        bnjax.from_torch(weight, None, variables, transposed="up")
