"""Which moments normalize: those of the batch, or the running ones."""

from collections.abc import Mapping

import chex
import jax.numpy as jnp

from bnjax.core.moments import Moments, at_least
from bnjax.core.partition import Parts


def choose(batch: Moments | None, batch_stats: Mapping[str, chex.Array], parts: Parts) -> Moments:
    """The moments of the batch where it was measured, otherwise the running ones."""
    if batch is not None:
        return batch
    mean, var = (at_least(parts.x.dtype, batch_stats[key]) for key in ("mean", "var"))
    # No offset: the origin is the mean itself, and an evaluation computes nothing with it.
    return Moments(jnp.ones((), var.dtype), mean, None, var)  # pyright: ignore[reportArgumentType]
