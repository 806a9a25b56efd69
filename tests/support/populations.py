"""Values that layers see in parts, and what is said of a layer that can't be seen."""

import jax.numpy as jnp
import numpy as np

X = np.random.default_rng(0).normal(3, 2, (32, 3)).astype(np.float32)
PARTS = [jnp.asarray(X[:20]), jnp.asarray(X[20:])]


def stranger(path: str, kind: str) -> str:
    """The message about an unknown module that keeps a mean and a variance."""
    return (
        f"'{path}' ({kind}) keep a mean and a variance, but are not batch norms of bnjax or Flax, "
        f"or subclasses of these"
    )
