"""Everything runs where JAX mixes no dtypes by itself (`jax_numpy_dtype_promotion="strict"`)."""

import contextlib
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import bnjax
from bnjax.training import eval_step, evaluate, init_state, train_step
from tests.support.cases import as_on_accelerators

pytestmark = pytest.mark.quick_compile

X = np.random.default_rng(0).standard_normal((8, 4, 4, 3)).astype(np.float32)
each_dtype = pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])


@pytest.fixture(autouse=True)
def strict():
    with jax.numpy_dtype_promotion("strict"):
        yield


@each_dtype
@pytest.mark.parametrize("platform", [contextlib.nullcontext, as_on_accelerators])
def test_the_core(dtype, platform):
    x = jnp.asarray(X, dtype)
    masks = None, jnp.arange(8).reshape(-1, 1, 1, 1) < 7
    groups, modes = (None, 3), (True, False)
    for momentum, mask, size, mutable in itertools.product((0.1, None), masks, groups, modes):
        params, stats = bnjax.init(3, momentum=momentum, dtype=dtype)
        settings = {"momentum": momentum, "mask": mask, "virtual_batch_size": size}

        def loss(params, x, stats=stats, mutable=mutable, settings=settings):
            y, moved = bnjax.batch_norm(params, stats, x, mutable=mutable, **settings)
            return jnp.sum(y.astype("float32") ** 2), moved

        with platform():
            step = jax.grad(loss, (0, 1), has_aux=True)
            gradient, moved = jax.eval_shape(step, params, x)
        assert jax.tree.map(jnp.result_type, gradient) == (
            {"scale": x.dtype, "bias": x.dtype},
            x.dtype,
        )
        assert jax.tree.map(jnp.result_type, moved) == jax.tree.map(jnp.result_type, stats)


class Net(nn.Module):
    dtype: str

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3), use_bias=False, dtype=self.dtype)(x)
        x = nn.relu(bnjax.BatchNorm2d(dtype=self.dtype)(x))
        return nn.Dense(2)(x.mean((1, 2)).astype("float32"))


def loss_fn(logits, batch):
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])
    return loss, {"accuracy": logits.argmax(-1) == batch["y"]}


@each_dtype
def test_training_and_the_tools(dtype):
    net, batch = Net(dtype), {"x": jnp.asarray(X, dtype), "y": jnp.arange(8) % 2}
    state = init_state(net, optax.sgd(0.1), jax.random.key(0), batch["x"])
    for microbatches in (1, 2):
        state, metrics = train_step(loss_fn, microbatches=microbatches)(state, batch)
        assert metrics["accepted"]
    assert sorted(evaluate(eval_step(loss_fn), state, [batch])) == ["accuracy", "loss"]
    variables = bnjax.recalibrate(net, state.variables, [batch["x"]])
    assert bnjax.fold(net, variables, batch["x"]).report.rows[0].reason is None
    assert len(bnjax.diagnose(net, variables, [batch], loss_fn=loss_fn).layers) == 1


@each_dtype
def test_nnx_layers(dtype):
    conv = nnx.Conv(3, 4, (3, 3), dtype=dtype, rngs=nnx.Rngs(0))
    model = nnx.Sequential(conv, bnjax.nnx.BatchNorm2d(4, rngs=nnx.Rngs(0)))
    x = jnp.asarray(X, dtype)
    model.train()
    assert model(x).dtype == dtype
    model.eval()
    nnx.update(model, bnjax.recalibrate(model, None, [x]))
    assert bnjax.fold(model, None, x).report.rows[0].reason is None
