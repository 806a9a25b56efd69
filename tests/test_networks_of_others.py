"""Trained networks that nobody here wrote, from PyTorch to Flax and back.

`python -m tests.test_networks_of_others` prints how far their outputs are apart.
"""

import ast
import re
from typing import Any

import jax
import numpy as np
import pytest

import bnjax
from tests.support.networks import NETWORKS, Network, imported

torch = pytest.importorskip("torch", reason="PyTorch is pinned for Python < 3.12 only")
pytestmark = pytest.mark.quick_compile


def proposed(state_dict: Any, network: Network, variables: Any) -> dict[str, Any]:
    """What the error says to pass, if there is one."""
    try:
        bnjax.from_torch(state_dict, network.flax, variables, **network.options)
    except ValueError as error:
        rename = re.search(r"rename=(\{.*?\})", str(error))
        if rename is None:
            raise
        return {"rename": ast.literal_eval(rename[1])}
    return {}


def converted(name: str) -> tuple[Any, dict[str, Any], Any, float]:
    """A network, the options, its Flax variables, and how far the outputs are apart."""
    network = NETWORKS[name]
    theirs = network.torch(imported(network.package)).eval()
    x = network.inputs(np.random.default_rng(0))
    shapes: Any = jax.eval_shape(network.flax.init, jax.random.key(0), network.last(x))
    state_dict = theirs.state_dict()
    options = {**network.options, **proposed(state_dict, network, shapes)}
    variables = bnjax.from_torch(state_dict, network.flax, shapes, **options)
    with torch.no_grad():
        wanted = network.logits(theirs(torch.tensor(x)))
    with jax.default_matmul_precision("highest"):
        found = jax.jit(network.flax.apply)(variables, network.last(x))
    pairs = zip(jax.tree.leaves(wanted), jax.tree.leaves(found), strict=True)
    error = max(np.abs(np.asarray(b) - a.numpy()).max() / max(1, a.abs().max()) for a, b in pairs)
    return theirs, options, variables, float(error)


@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_are_those_of_the_network_and_its_state_dict_comes_back(name):
    theirs, options, variables, error = converted(name)
    assert error < 1e-5
    state_dict = theirs.state_dict()
    back = bnjax.to_torch(variables, state_dict, **options)
    assert list(back) == list(state_dict)
    assert all(torch.equal(back[key], tensor) for key, tensor in state_dict.items())


def main() -> None:
    """Print the differences, relative to the largest output where that is above 1."""
    for name in NETWORKS:
        print(f"{name}: {converted(name)[-1]:.1e}", flush=True)


if __name__ == "__main__":
    main()
