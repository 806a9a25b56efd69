"""Small state dicts, matching variables, and the error if they do not match."""

import re
from typing import Any

import numpy as np
import pytest

import bnjax

F32 = np.float32
MISMATCH = (
    "The PyTorch state dict and `variables` do not match, so nothing was converted. Map names with "
    "`rename`, or skip them with `ignore`."
)


def mismatch(*lines: str) -> str:
    """A pattern for the whole error with these lines."""
    return "^" + re.escape("\n  ".join((MISMATCH, *lines))) + "$"


def params(**modules: Any) -> dict[str, Any]:
    return {"params": modules}


def batch_norm(channels: int = 2) -> dict[str, np.ndarray]:
    """A PyTorch batch norm whose arrays all differ."""
    names = ("weight", "bias", "running_mean", "running_var")
    values = {f"bn.{n}": np.arange(channels, dtype=F32) + i for i, n in enumerate(names, 1)}
    return {**values, "bn.num_batches_tracked": np.array(7)}


def batch_norm_variables(channels: int = 2, **more: Any) -> dict[str, Any]:
    ones = np.ones(channels, F32)
    stats = {"mean": ones, "var": ones, **more}
    return {"params": {"bn": {"scale": ones, "bias": ones}}, "batch_stats": {"bn": stats}}


def refused(state_dict: Any, variables: Any, **options: Any) -> list[str]:
    """The lines of the error, without the first."""
    with pytest.raises(ValueError, match="do not match, so nothing was converted") as caught:
        bnjax.from_torch(state_dict, None, variables, **options)
    return [line.strip() for line in str(caught.value).splitlines()[1:]]
