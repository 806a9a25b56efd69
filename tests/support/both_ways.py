"""Convert a PyTorch model to its twin in Flax and back, and compare outputs and arrays."""

from typing import Any

import jax
import numpy as np
import torch
from flax import nnx

import bnjax
from tests.support.state_dicts import F32

INPUTS = np.random.default_rng(0).standard_normal((2, 7, 6)).astype(F32)


def outputs(theirs: Any, *inputs: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        y = theirs.eval()(*map(torch.tensor, inputs))
    return (y[0] if isinstance(y, tuple) else y).numpy()


def converts_both_ways(theirs: Any, model: Any, **options: Any) -> None:
    """Outputs agree, the state dict survives a round trip, and other values convert back too."""
    state_dict = theirs.state_dict()
    if isinstance(model, nnx.Module):
        variables: Any = bnjax.from_torch(state_dict, model, **options)
        nnx.update(model, variables)
        found = model(INPUTS)  # type: ignore[operator]
    else:
        shapes = jax.eval_shape(model.init, jax.random.key(0), INPUTS)
        variables = bnjax.from_torch(state_dict, model, shapes, **options)
        found = model.apply(variables, INPUTS)
    wanted = outputs(theirs, INPUTS)
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    back = bnjax.to_torch(variables, state_dict, **options)
    assert list(back) == list(state_dict)
    assert all(torch.equal(back[key], tensor) for key, tensor in state_dict.items())
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter)
    theirs.load_state_dict(bnjax.to_torch(variables, theirs.state_dict(), **options))
    np.testing.assert_allclose(outputs(theirs, INPUTS), wanted, atol=1e-6)
