"""Each kind of layer, converted and compared with PyTorch live, and converted back."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import bnjax

pytestmark = pytest.mark.quick_compile

torch = pytest.importorskip("torch", reason="PyTorch is pinned for Python < 3.12 only")

CONVS = (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
TRANSPOSED = (torch.nn.ConvTranspose1d, torch.nn.ConvTranspose2d, torch.nn.ConvTranspose3d)
NORMS = (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d, torch.nn.BatchNorm3d)
each_rank = pytest.mark.parametrize("rank", [1, 2, 3])


def channels_last(x: np.ndarray) -> np.ndarray:
    return np.moveaxis(x, 1, -1)


def compare(theirs, model, x, *, last=channels_last, **options):
    """Outputs agree, and the state dict survives a round trip through linen."""
    theirs = theirs.eval()
    with torch.no_grad():
        expected = theirs(torch.tensor(x)).numpy()
    state_dict = theirs.state_dict()
    shapes = jax.eval_shape(model.init, jax.random.key(0), last(x))
    variables = bnjax.from_torch(state_dict, model, shapes, **options)
    np.testing.assert_allclose(model.apply(variables, last(x)), last(expected), atol=1e-5)
    back = bnjax.to_torch(variables, state_dict, **options)
    assert list(back) == list(state_dict)
    assert all(torch.equal(back[name], tensor) for name, tensor in state_dict.items())
    theirs.load_state_dict(bnjax.to_torch(variables, **options), strict=True)


@each_rank
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("bias", [False, True])
def test_convolutions(rng, rank, groups, bias):
    theirs = CONVS[rank - 1](4, 6, 3, 2, 1, groups=groups, bias=bias)
    kernel, strides = (3,) * rank, (2,) * rank
    model = nn.Conv(6, kernel, strides, padding=1, feature_group_count=groups, use_bias=bias)
    compare(theirs, model, rng.standard_normal((2, 4, *(7, 6, 5)[:rank])).astype("f"))


@each_rank
@pytest.mark.parametrize("transpose_kernel", [False, True])
@pytest.mark.parametrize(
    ("k", "s", "p", "o", "d"),
    [(3, 2, 1, 1, 1), (4, 2, 1, 0, 1), (2, 3, 0, 1, 1), (3, 1, 2, 0, 2), (2, 2, 0, 0, 1)],
)
def test_transposed_convolutions(rng, rank, transpose_kernel, k, s, p, o, d):
    theirs = TRANSPOSED[rank - 1](3, 3, k, s, p, o, dilation=d)
    model = nn.ConvTranspose(
        3,
        (k,) * rank,
        (s,) * rank,
        padding=[(d * (k - 1) - p, d * (k - 1) - p + o)] * rank,
        kernel_dilation=(d,) * rank,
        transpose_kernel=transpose_kernel,
    )
    x = rng.standard_normal((2, 3, *(5, 4, 3)[:rank])).astype("f")
    compare(theirs, model, x, transposed=() if transpose_kernel else "")


@each_rank
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("affine", [False, True])
def test_batch_norms(rng, rank, momentum, affine):
    theirs = NORMS[rank - 1](4, momentum=momentum, affine=affine)
    x = rng.normal(3, 2, (6, 4, *(5, 4, 3)[:rank])).astype("f")
    theirs(torch.tensor(x))
    layer = getattr(bnjax, type(theirs).__name__)
    compare(theirs, layer(4, momentum=momentum, affine=affine), x)


def test_layer_norm_linear_and_embedding(rng):
    x = rng.standard_normal((2, 5)).astype("f")
    theirs = torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.LayerNorm(3))
    torch.nn.init.normal_(theirs[1].weight)
    model = nn.Sequential([nn.Dense(3), nn.LayerNorm(epsilon=1e-5)])
    state_dict = theirs.state_dict()
    variables = bnjax.from_torch(state_dict, model, model.init(jax.random.key(0), x))
    with torch.no_grad():
        expected = theirs(torch.tensor(x)).numpy()
    actual: Any = model.apply(variables, x)
    np.testing.assert_allclose(actual, expected, atol=1e-5)
    compare(torch.nn.Embedding(7, 3), nn.Embed(7, 3), np.array([1, 6]), last=lambda x: x)


class Flat(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(3, (3, 3), padding=1, name="conv")(x)
        return nn.Dense(4, name="fc")(x.reshape(len(x), -1))


def test_flatten_permutes_a_linear_layer(rng):
    x = rng.standard_normal((2, 2, 4, 5)).astype("f")
    theirs = torch.nn.Sequential()
    theirs.add_module("conv", torch.nn.Conv2d(2, 3, 3, padding=1))
    theirs.add_module("flat", torch.nn.Flatten())
    theirs.add_module("fc", torch.nn.Linear(60, 4))
    compare(theirs, Flat(), x, flatten={"fc": (3, 4, 5)})
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        compare(theirs, Flat(), x, flatten={})


def test_nnx_models(rng):
    theirs = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3, 2, 1, bias=False),
        torch.nn.BatchNorm2d(4),
        torch.nn.ConvTranspose2d(4, 4, 2, 2),
    )
    x = rng.standard_normal((4, 3, 8, 8)).astype("f")
    theirs(torch.tensor(x))
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(
        nnx.Conv(3, 4, (3, 3), 2, padding=1, use_bias=False, rngs=rngs),
        bnjax.nnx.BatchNorm2d(4, rngs=rngs),
        nnx.ConvTranspose(4, 4, (2, 2), (2, 2), padding="VALID", rngs=rngs),
    )
    nnx.update(model, bnjax.from_torch(theirs.state_dict(), model))
    model.eval()
    with torch.no_grad():
        expected = theirs.eval()(torch.tensor(x)).numpy()
    np.testing.assert_allclose(model(channels_last(x)), channels_last(expected), atol=1e-5)
    theirs.load_state_dict(bnjax.to_torch(model, theirs.state_dict()), strict=True)


def test_bfloat16_tensors_survive_a_round_trip_bit_for_bit():
    weight = torch.randn(4, 3, dtype=torch.bfloat16)
    template = {"params": {"kernel": jax.ShapeDtypeStruct((3, 4), jnp.bfloat16)}}
    new = bnjax.from_torch({"weight": weight}, None, template)
    assert torch.equal(bnjax.to_torch(new)["weight"], weight)


def test_strided_tensors_that_require_gradients_convert():
    weight = torch.randn(3, 4, requires_grad=True).T
    new = bnjax.from_torch({"weight": weight}, None, {"params": {"kernel": np.zeros((3, 4), "f")}})
    np.testing.assert_array_equal(new["params"]["kernel"], weight.detach().numpy().T)


def test_sparse_and_meta_tensors_are_refused_by_name():
    sparse = torch.eye(3).to_sparse()
    message = (
        r"^`state_dict` must hold only dense arrays of numbers, but these are not: {'a': 'Tensor', "
        r"'b': 'Tensor'}\.$"
    )
    with pytest.raises(TypeError, match=message):
        bnjax.from_torch({"a": sparse, "b": torch.ones(2, device="meta")}, None, {"params": {}})
