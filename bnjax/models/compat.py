"""The private or unstable parts of flax that the tools rely on."""

from typing import Any

import jax
from flax import nnx
from flax.core.scope import in_filter, union_filters
from jax.core import Tracer

from bnjax.core.compat import is_traced

__all__ = [
    "in_filter",
    "is_mapped",
    "is_pytree",
    "is_traced",
    "is_tracing",
    "modules_of",
    "plain_arrays",
    "union_filters",
]


def plain_arrays(model: nnx.Module) -> nnx.Module:
    """The model with arrays instead of references, which a copy would share."""
    return nnx.with_vars(model, ref=False)


def modules_of(model: nnx.Module) -> list[tuple[tuple[Any, ...], nnx.Module]]:
    """All modules with their paths; a shared one has the first of its paths."""
    graph = list(nnx.iter_graph(model))
    return [(path, node) for path, node in graph if isinstance(node, nnx.Module)]


def is_mapped(axis_name: str) -> bool:
    """Whether an axis of that name is mapped here, as by `vmap`, `pmap` or `shard_map`."""
    try:
        jax.lax.axis_size(axis_name)
    except NameError:
        return False
    return True


def is_tracing() -> bool:
    """Whether a program is being traced here, rather than run."""
    return isinstance(jax.lax.add(0, 0), Tracer)


def is_pytree(kind: type[nnx.Module]) -> bool:
    """Whether modules of a type are pytrees, as they are unless made with `pytree=False`."""
    return kind._pytree__is_pytree
