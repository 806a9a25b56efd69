"""Read and set fields, variables and path of a batch norm from outside."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from flax import linen as nn
from flax import nnx

from bnjax.models.statistics import Path

COLLECTION = "batch_stats"
PATH = "_bnjax_path"  # the attribute that holds the path of an nnx layer


@contextlib.contextmanager
def setting(layer: Any, **fields: Any) -> Iterator[None]:
    """A context that sets fields of a linen or nnx layer."""
    before = {name: getattr(layer, name) for name in fields}
    try:
        # linen modules are frozen; the old fields are restored before anyone else sees this one.
        for name, value in fields.items():
            object.__setattr__(layer, name, value)
        yield
    finally:
        for name, value in before.items():
            object.__setattr__(layer, name, value)


def path_of(layer: Any) -> Path:
    """The path of a layer in its model; for an nnx layer, as recorded by `visits.mark`."""
    if isinstance(layer, nn.Module):
        return layer.path
    path = getattr(layer, PATH, "")
    return tuple(path.split("/")) if path else ()


def variables_of(layer: Any) -> Mapping[str, Mapping[str, Any]]:
    """The variables of a layer, by collection and name."""
    if isinstance(layer, nn.Module):
        return layer.variables
    found: dict[str, dict[str, Any]] = {"params": {}, COLLECTION: {}}
    for name, leaf in vars(layer).items():
        if isinstance(leaf, nnx.Param | nnx.BatchStat):
            found["params" if isinstance(leaf, nnx.Param) else COLLECTION][name] = leaf[...]
    return found
