"""Models as other people write them: what the tools say of their habits."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import linen as nn

import bnjax
from bnjax.training import init_state, train_step

BATCHES = [jax.random.normal(jax.random.key(i), (64, 4)) + 1 for i in range(8)]


def found(model: Any, variables: Any) -> list[Any]:
    return list(bnjax.diagnose(model, variables, BATCHES).findings)


class StartsAsIdentity(nn.Module):
    """A residual branch whose last scale is zero at first, so that the block is the identity."""

    @nn.compact
    def __call__(self, x, train=False):
        running = not train
        x = nn.Dense(16)(x)
        y = nn.relu(nn.BatchNorm(running, momentum=0.9)(nn.Dense(16)(x)))
        zeros = nn.initializers.zeros
        y = nn.BatchNorm(running, momentum=0.9, scale_init=zeros, name="last")(nn.Dense(16)(y))
        return nn.Dense(2)(nn.relu(x + y))


@pytest.mark.parametrize("steps", [0, 3])
def test_scales_that_start_at_zero_are_not_dead(steps):
    # Said "dead channels", "train anew", of a new residual network.
    net = StartsAsIdentity()
    state = init_state(net, optax.adam(1e-3), jax.random.key(9), BATCHES[0])
    step = train_step(lambda y, _: (y**2).sum(-1), apply_kwargs={"train": True})
    for x in BATCHES[:steps]:
        state, _ = step(state, {"x": x})
    assert found(net, bnjax.recalibrate(net, state.variables, BATCHES)) == []


def test_scales_of_zero_beside_others_are_dead():
    net = StartsAsIdentity()
    variables = bnjax.recalibrate(net, net.init(jax.random.key(0), BATCHES[0]), BATCHES)
    variables["params"]["last"]["scale"] = jnp.full(16, 0.01).at[:4].set(1e-6)
    (finding,) = found(net, variables)
    assert (finding.kind, finding.layer, finding.numbers["constant"]) == (
        "dead channels",
        "last",
        4,
    )
