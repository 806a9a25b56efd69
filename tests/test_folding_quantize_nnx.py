"""Quantization-aware training of nnx models: in place, and in bnjax's step."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import bnjax
from tests.support.folded import close, fake, inputs, trained

pytestmark = pytest.mark.quick_compile


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.conv = nnx.Conv(3, 4, (3, 3), rngs=rngs)
        self.bn = bnjax.nnx.BatchNorm2d(4, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.head(self.dropout(nnx.relu(self.bn(self.conv(x))).mean((1, 2))))


class Quantized(nnx.Module):
    """A module that calls a model with fake-quantized kernels."""

    def __init__(self, model: nnx.Module, folded: Any) -> None:
        self.model, self.folded = model, folded

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.folded.fake_quantize(self.model)(x)


def drawn_net() -> Any:
    model = Net(nnx.Rngs(0))
    nnx.update(model, trained(nnx.state(model, (nnx.Param, nnx.BatchStat))))
    return model


def test_an_nnx_model_trains_in_place_and_shares_all_but_kernels():
    model, x = drawn_net(), inputs((8, 6, 6, 3))
    folded = bnjax.fold(model, None, x, quantize=fake)
    twin = folded.fake_quantize(model)
    assert twin.bn.mean is model.bn.mean
    assert twin.head.kernel is model.head.kernel
    assert np.any(twin.conv.kernel[...] != model.conv.kernel[...])
    state = folded.fake_quantize(nnx.state(model))
    np.testing.assert_array_equal(state["conv"]["kernel"][...], twin.conv.kernel[...])

    @nnx.jit
    def gradients(model, x):
        return nnx.grad(lambda model: jnp.sum(folded.fake_quantize(model)(x) ** 2))(model)

    before, kernel = model.bn.mean[...], model.conv.kernel[...]
    model.train()
    grads = gradients(model, x)
    assert np.any(model.bn.mean[...] != before)
    np.testing.assert_array_equal(model.conv.kernel[...], kernel)
    assert np.all(grads["bn"]["scale"][...])
    assert np.any(grads["conv"]["kernel"][...])
    model.eval()
    again = bnjax.fold(model, None, x, quantize=fake)
    close(folded.fake_quantize(model)(x), again.apply(again.variables, x))
    close(folded.apply(folded.refold(model), x), again.apply(again.variables, x))
    close(folded.apply(folded.refold(nnx.state(model)), x), again.apply(again.variables, x))


def test_the_nnx_step_works_with_a_module_around_the_model():
    model, x = drawn_net(), inputs((8, 6, 6, 3))
    wrapped = Quantized(model, bnjax.fold(model, None, x, quantize=fake))
    wrapped.train()
    optimizer = nnx.Optimizer(wrapped, optax.adam(1e-2), wrt=nnx.Param)
    step = bnjax.nnx.train_step(lambda outputs, batch: jnp.mean((outputs - 1) ** 2, 1))
    before, kernel = model.bn.mean[...], model.conv.kernel[...]
    assert step(wrapped, optimizer, {"x": x})["accepted"]
    assert np.any(model.bn.mean[...] != before)
    assert np.any(model.conv.kernel[...] != kernel)
