"""A population of values in parts, and the error text for unknown batch norms."""

import jax.numpy as jnp
import numpy as np

X = np.random.default_rng(0).normal(3, 2, (32, 3)).astype(np.float32)
PARTS = [jnp.asarray(X[:20]), jnp.asarray(X[20:])]


def stranger(path: str, kind: str) -> str:
    """The error text for a module with a mean and a variance that is not a known batch norm."""
    return (
        f"'{path}' ({kind}) keep a mean and a variance, but are not batch norms of bnjax or Flax, "
        "or subclasses of these"
    )
