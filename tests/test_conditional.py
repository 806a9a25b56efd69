"""Class-conditional batch norm, against PyTorch's layer without an affine map and embeddings."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import bnjax

pytest.importorskip("torch")

import torch

CLASSES = np.array([0, 2, 1, 0, 2, 2, 3, 3])
KINDS = {
    "1d": ((8, 4), bnjax.ConditionalBatchNorm1d, torch.nn.BatchNorm1d),
    "2d": ((8, 5, 6, 4), bnjax.ConditionalBatchNorm2d, torch.nn.BatchNorm2d),
    "3d": ((8, 3, 4, 2, 4), bnjax.ConditionalBatchNorm3d, torch.nn.BatchNorm3d),
}


def first(x):
    """Channels first, as PyTorch has them."""
    return torch.tensor(np.moveaxis(np.asarray(x), -1, 1), dtype=torch.float32)


@pytest.fixture
def arrays(rng):
    scale, bias = rng.normal(size=(2, 5, 4)).astype("f")
    return {"scale": scale, "bias": bias}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_results_and_gradients_are_those_of_torch_and_embeddings(rng, arrays, kind, training):
    shape, layer, theirs = KINDS[kind]
    x, dy = rng.normal(size=(2, *shape)).astype("f") * 2 + 3
    ours = layer(4, 5)
    stats = ours.init(jax.random.key(0), x, CLASSES)["batch_stats"]
    mutable = ["batch_stats"] if training else False

    def loss(params, x):
        variables = {"params": params, "batch_stats": stats}
        found = ours.apply(variables, x, CLASSES, mutable=mutable)
        y, moved = found if training else (found, {"batch_stats": stats})
        return jnp.sum(y * dy), (y, moved["batch_stats"]["norm"])

    (_, (y, moved)), grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(arrays, x)

    norm = theirs(4, affine=False).train(training)
    scale, bias = (torch.tensor(arrays[name], requires_grad=True) for name in ("scale", "bias"))
    inputs, each = first(x).requires_grad_(), (slice(None), slice(None), *(None,) * (x.ndim - 2))
    outputs = norm(inputs) * scale[CLASSES][each] + bias[CLASSES][each]
    (outputs * first(dy)).sum().backward()
    close: Any = {"rtol": 2e-5, "atol": 2e-4}
    torch.testing.assert_close(first(y), outputs.detach(), rtol=2e-6, atol=2e-5)
    torch.testing.assert_close(first(grads[1]), inputs.grad, **close)
    for found, expected in (("scale", scale.grad), ("bias", bias.grad)):
        torch.testing.assert_close(torch.tensor(np.array(grads[0][found])), expected, **close)
    for found, expected in (("mean", norm.running_mean), ("var", norm.running_var)):
        value = torch.tensor(np.array(moved[found]))
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_layer_is_a_batch_norm(rng, kind):
    shape, layer, _ = KINDS[kind]
    x = rng.normal(size=shape).astype("f")
    plain = getattr(bnjax.linen, f"BatchNorm{kind}")(4)
    expected, _ = plain.init_with_output(jax.random.key(0), x)
    y, variables = layer(4, 5).init_with_output(jax.random.key(0), x, CLASSES)
    np.testing.assert_array_equal(y, expected)
    assert jax.tree.map(jnp.shape, variables) == {
        "params": {"scale": (5, 4), "bias": (5, 4)},
        "batch_stats": {"norm": {"mean": (4,), "var": (4,)}},
    }
    mode = {"use_running_average": False}
    made = getattr(bnjax.nnx, f"ConditionalBatchNorm{kind}")(4, 5, rngs=nnx.Rngs(0))
    trained, _ = layer(4, 5, **mode).apply(variables, x, CLASSES, mutable=["batch_stats"])
    np.testing.assert_allclose(made(x, CLASSES), trained, rtol=1e-6)
    assert float(jnp.abs(made.norm.mean[...]).max()) > 0


def test_channels_first_take_the_batch_axis_too(rng, arrays):
    x = rng.normal(size=(8, 5, 6, 4)).astype("f")
    last: Any = bnjax.ConditionalBatchNorm2d(4, 5)
    variables = {**last.init(jax.random.key(0), x, CLASSES), "params": arrays}
    first_axis: Any = bnjax.ConditionalBatchNorm2d(4, 5, axis=1)
    y = first_axis.apply(variables, np.moveaxis(x, -1, 1), CLASSES)
    np.testing.assert_allclose(np.moveaxis(y, 1, -1), last.apply(variables, x, CLASSES), rtol=1e-6)


def test_tools_reach_the_norm_inside(rng, arrays):
    layer, x = bnjax.ConditionalBatchNorm2d(4, 5), rng.normal(size=(8, 5, 6, 4)).astype("f") + 2
    variables = layer.init(jax.random.key(0), x, CLASSES)
    with bnjax.freeze("norm"):
        _, updates = layer.apply(variables, x, CLASSES, mutable=["batch_stats"])
    np.testing.assert_array_equal(updates["batch_stats"]["norm"]["mean"], np.zeros(4))
    batch = {"x": x, "classes": CLASSES}
    new = bnjax.recalibrate(layer, variables, [batch], inputs=("x", "classes"))
    np.testing.assert_allclose(new["batch_stats"]["norm"]["mean"], x.mean((0, 1, 2)), rtol=1e-5)


def test_a_traced_class_that_is_out_of_range_gives_nan_there_alone(rng, arrays):
    layer, x = bnjax.ConditionalBatchNorm2d(4, 5), rng.normal(size=(3, 2, 2, 4)).astype("f")
    variables = layer.init(jax.random.key(0), x, np.zeros(3, int))
    y = jax.jit(layer.apply)(variables, x, np.array([0, 7, 1]))
    assert np.isnan(y).all((1, 2, 3)).tolist() == [False, True, False]


WRONG = [
    (
        np.zeros(3, int),
        ValueError,
        "`classes` must hold one class for each of the 8 examples, of shape (8,), got shape (3,).",
    ),
    (np.full(8, 5), ValueError, "`classes` must lie between 0 and 4, got [5]."),
    (
        np.zeros(8),
        TypeError,
        "`classes` must be integers, got float64. For a scale and bias of "
        "your own for each example, call a batch norm as in norm(x, scale=g, bias=b).",
    ),
]


@pytest.mark.parametrize(("classes", "error", "message"), WRONG)
def test_each_mistake_raises_its_message(rng, classes, error, message):
    layer, x = bnjax.ConditionalBatchNorm2d(4, 5), rng.normal(size=(8, 2, 2, 4)).astype("f")
    with pytest.raises(error, match=re.escape(message)):
        layer.init(jax.random.key(0), x, classes)
