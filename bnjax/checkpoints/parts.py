"""Find the model in a checkpoint, and the arrays that can be written."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from bnjax.checkpoints.contents import ContentError, is_path, joined, leaves
from bnjax.models.variables import linen

# Matches names in a PyTorch state dict, but not files, an optimizer's `exp_avg` or Flax's `bias`.
_NAME = re.compile(r"[^/=]+\.\w+|weight|running_mean|running_var")
_SHOWN = 10


def model_in(tree: Mapping[str, Any]) -> tuple[str, Any]:
    """The name and the contents of the only model in a checkpoint; the name of the whole is "".

    A model is a PyTorch state dict or the variables of a linen model. If there is none, as in an
    nnx state, it is the whole checkpoint.

    Raises:
        ContentError: there are several.
    """
    found = linen(tree) or _state_dicts(tree, "")
    if len(found) > 1:
        raise ContentError(f"it holds several models: {', '.join(found)}.")
    return next(iter(found.items()), ("", tree))


def arrays_in(tree: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The arrays of a checkpoint, which can be written, and the names of everything else.

    Numbers count as arrays, except in a vocabulary whose keys are not valid paths.
    """
    left: list[str] = []
    return _arrays(tree, "", left), left


def named(left: list[str]) -> str:
    """The names of what was left out, on one line."""
    more = f" and {len(left) - _SHOWN} more" if len(left) > _SHOWN else ""
    return f"{', '.join(left[:_SHOWN])}{more}"


def _state_dicts(tree: Mapping[str, Any], path: str) -> dict[str, Any]:
    if any(_NAME.fullmatch(name) and np.ndim(part) for name, part in _own(tree)):
        return {path: tree}
    inner = {joined(path, k): part for k, part in tree.items() if isinstance(part, Mapping)}
    return {k: x for name, part in inner.items() for k, x in _state_dicts(part, name).items()}


def _own(tree: Mapping[str, Any]) -> list[tuple[str, np.ndarray]]:
    return [(name, part) for name, part in tree.items() if isinstance(part, np.ndarray)]


def _arrays(tree: Mapping[str, Any], path: str, left: list[str]) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    numbers_count = all(map(is_path, tree))
    for name, part in tree.items():
        full = joined(path, name)
        if isinstance(part, Mapping):
            inside: list[str] = []
            new = _arrays(part, full, inside)
            if is_path(name) and (new or not part):
                kept[name] = new
                left += inside
            else:
                number = sum(1 for _ in leaves(part))
                left.append(f"{full} ({number} {'entry' if number == 1 else 'entries'})")
        elif is_path(name) and _is_array(part, numbers_count):
            kept[name] = part
        else:
            left.append(full)
    return kept


def _is_array(value: Any, numbers_count: bool) -> bool:
    if value is None:  # such as the loss scale of a state without one
        return True
    if isinstance(value, np.ndarray):
        return value.dtype.kind in "biufcV"  # V: bfloat16 and similar
    if not numbers_count or not isinstance(value, (bool, int, float, complex, np.generic)):
        return False
    return np.asarray(value).dtype.kind in "biufcV"
