"""Error of a training-mode output against float64, beside Flax's and PyTorch's.

Run it as `python tests/benchmarks/numerics.py`. The input is float32, x ~ N(mean, 1), of shape
(4096, 64); the error is the largest one of any output, which is of the order of 1.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from rich.console import Console
from rich.table import Table

import bnjax

MEANS = (0, 1e2, 1e3, 1e4, 1e5)


def _linen(layer: nn.Module) -> Callable[[np.ndarray], np.ndarray]:
    def run(x: np.ndarray) -> np.ndarray:
        variables = layer.init(jax.random.key(0), x)
        return np.asarray(jax.jit(lambda v, x: layer.apply(v, x, mutable=True)[0])(variables, x))

    return run


def contenders() -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    """The layers that are installed here, in training mode."""
    layers = {
        "bnjax": _linen(bnjax.BatchNorm1d()),
        "flax": _linen(nn.BatchNorm(False)),
        "flax, use_fast_variance=False": _linen(nn.BatchNorm(False, use_fast_variance=False)),
    }
    try:
        import torch
    except ImportError:
        return layers
    layers["torch"] = lambda x: torch.nn.BatchNorm1d(x.shape[1])(torch.tensor(x)).detach().numpy()
    return layers


def main() -> None:
    """Print the table."""
    table = Table(title="largest output error, float32, x ~ N(mean, 1)")
    layers = contenders()
    for column in ("mean", *layers):
        table.add_column(column, justify="right")
    rng = np.random.default_rng(0)
    for mean in MEANS:
        x = jnp.asarray(rng.normal(mean, 1, (4096, 64)), jnp.float32)
        exact = np.asarray(x, np.float64)
        exact = (exact - exact.mean(0)) / np.sqrt(exact.var(0) + 1e-5)
        errors = [np.abs(layer(np.array(x)) - exact).max() for layer in layers.values()]
        table.add_row(f"{mean:.0e}" if mean else "0", *(f"{error:.1e}" for error in errors))
    Console().print(table)


if __name__ == "__main__":
    main()
