"""Where an array lies: what its type says of meshes and mapped axes."""

from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P


def explicit_axes(x: jax.Array) -> tuple[Any, ...]:
    """For each axis of x the explicit mesh axes that its type says it is split over, or None."""
    spec = tuple(jax.typeof(x).sharding.spec)
    return spec + (None,) * (x.ndim - len(spec))


def split_as(x: jax.Array, spec: Sequence[Any]) -> NamedSharding | None:
    """A sharding over the explicit mesh of x; None where x is split over none."""
    split = any(axis is not None for axis in explicit_axes(x))
    return NamedSharding(jax.typeof(x).sharding.mesh, P(*spec)) if split else None


def varying_axes(x: jax.Array) -> frozenset[str]:
    """The axes of a `shard_map` with `check_vma=True` along which `x` differs between devices."""
    return jax.typeof(x).mat.varying
