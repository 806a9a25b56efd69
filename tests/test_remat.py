"""`remat_policy`: what is kept between the passes, and what is not done twice."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import PartitionSpec as P

import bnjax
from tests.support.hlo import collectives, compiled
from tests.support.oracle import assert_close

pytestmark = pytest.mark.quick_compile

AXIS = "devices"
BLOCKS = 3
NORMS = {
    "torch": functools.partial(bnjax.BatchNorm2d, 32),
    "flax": functools.partial(bnjax.linen.BatchNorm, False),
}
each_norm = pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)


class Blocks(nn.Module):
    """Convolution, batch norm and relu, a few times."""

    norm: Any
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x):
        for _ in range(BLOCKS):
            x = nn.Conv(32, (3, 3), use_bias=False, dtype=x.dtype)(x)
            x = nn.relu(self.norm(axis_name=self.axis_name, dtype=x.dtype)(x))
        return x


def make(norm: Any, dtype: Any = jnp.float32, axis_name: str | None = None):
    """A loss by policy, None for a plain network, its parameters, and the images."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 16, 16, 32)), dtype)
    variables = Blocks(norm).init(jax.random.key(0), x)

    def loss(params, x, policy=None):
        network = Blocks if policy is None else nn.remat(Blocks, policy=policy)
        variables_now = {**variables, "params": params}
        y, updates = network(norm, axis_name).apply(variables_now, x, mutable=["batch_stats"])
        return jnp.mean(jnp.square(y.astype(jnp.float32))), updates

    return loss, variables["params"], x


def kept_bytes(function: Any, *arguments: Any) -> int:
    """What a backward pass holds besides the arguments, outside of jit."""
    held = jax.tree.leaves(jax.vjp(function, *arguments, has_aux=True)[1])
    buffers = {
        leaf.unsafe_buffer_pointer(): leaf.nbytes for leaf in held if hasattr(leaf, "nbytes")
    }
    given = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(arguments)}
    return sum(size for pointer, size in buffers.items() if pointer not in given)


@each_norm
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_half_as_much_is_kept_and_that_in_the_dtype_of_the_images(norm, dtype):
    loss, params, x = make(norm, dtype)
    plain = kept_bytes(loss, params, x)
    kept = kept_bytes(functools.partial(loss, policy=bnjax.remat_policy()), params, x)
    parameters = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert kept - parameters < (plain - parameters) / 2
    # The images, the outputs of the convolutions, and a few numbers for each channel.
    assert kept - parameters < (1 + BLOCKS * 1.1) * x.nbytes


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_a_layer_keeps_its_input_once_and_in_its_own_dtype(dtype):
    x = jnp.ones((8, 8, 8, 32), dtype)
    params, stats = bnjax.init(32)
    held = kept_bytes(lambda *trees: bnjax.batch_norm(*trees, mutable=True), params, stats, x)
    assert x.nbytes <= held < 1.1 * x.nbytes


@each_norm
def test_outputs_gradients_and_statistics_are_the_same(norm):
    loss, params, x = make(norm)
    again = functools.partial(loss, policy=bnjax.remat_policy())
    plain, remade = (
        jax.jit(jax.value_and_grad(f, (0, 1), has_aux=True))(params, x) for f in (loss, again)
    )
    assert_close(remade, plain, rtol=1e-5)


@pytest.mark.quick_compile(False)
@pytest.mark.parametrize(
    ("policy", "gathers"),
    [
        (None, {BLOCKS}),
        (bnjax.remat_policy(), {BLOCKS}),
        # XLA may merge the two of the last block, which is differentiated at once.
        (jax.checkpoint_policies.nothing_saveable, {2 * BLOCKS - 1, 2 * BLOCKS}),
    ],
    ids=["plain", "bnjax", "nothing_saveable"],
)
def test_devices_do_not_talk_again_in_the_backward_pass(policy, gathers):
    loss, params, x = make(NORMS["torch"], axis_name=AXIS)
    mesh = jax.make_mesh((8,), (AXIS,), axis_types=(jax.sharding.AxisType.Auto,))
    step = jax.shard_map(
        jax.grad(functools.partial(loss, policy=policy), (0, 1), has_aux=True),
        mesh=mesh,
        in_specs=(P(), P(AXIS)),
        out_specs=((P(), P(AXIS)), P()),
    )
    found = [kind for kind, _ in collectives(jax.jit(step), (params, x))]
    assert found.count("all-gather") in gathers
    assert found.count("all-reduce") == BLOCKS + 1  # and one of the parameters' gradients


@pytest.mark.quick_compile(False)
def test_no_sum_over_the_batch_is_made_again():
    loss, params, x = make(NORMS["torch"])

    def reductions(policy: Any) -> int:
        step = jax.grad(functools.partial(loss, policy=policy), has_aux=True)
        return len(compiled(jax.jit(step), params, x).instructions("reduce"))

    assert reductions(bnjax.remat_policy()) <= reductions(None)
    assert reductions(jax.checkpoint_policies.nothing_saveable) > reductions(None)
