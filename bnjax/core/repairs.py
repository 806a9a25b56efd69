"""Suggest how to fix a collection with the wrong keys."""

from collections.abc import Mapping
from typing import Any

_TORCH = {"weight": "scale", "running_mean": "mean", "running_var": "var"}
COUNT = (
    "`count` is the number of training steps so far: momentum=None averages over as many batches, "
    "and schedules and limits are functions of it. Add it to each layer, such as {'mean': mean, "
    "'var': var, 'count': jnp.array(1000)}."
)


def other_keys(name: str, value: Any) -> str:
    """How to get the right keys of `params` or `batch_stats`, judging by those present."""
    if not isinstance(value, Mapping):
        return "bnjax.init makes it."
    if name in value:
        return f"These are all variables: pass variables[{name!r}]."
    if theirs := [f"`{key}` is `{ours}`" for key, ours in _TORCH.items() if key in value]:
        return f"PyTorch's {' and '.join(theirs)} here; bnjax.from_torch converts a state dict."
    return "bnjax.init makes it."
