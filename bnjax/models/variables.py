"""Find the variables of a model by name in what a training run has saved."""

import dataclasses
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

Path = tuple[str, ...]
MODEL = ("params", "batch_stats")
# What is usually saved next to them. Entries that are not dicts are not collections either.
TRAINING = ("opt_state", "optimizer", "step", "rng", "loss_scale", "dynamic_scale", "ema_params")

_OF_STATES = ("params", "variables")  # a dataclass with one of these is a state, not a model


def variables_in(tree: Any) -> Any:
    """The variables of the only linen model in a tree; the tree itself if there is not just one."""
    found = linen(tree)
    return next(iter(found.values())) if len(found) == 1 else tree


def linen(tree: Any, path: str = "") -> dict[str, Any]:
    """The variables of each linen model in a tree, by path; not those inside other variables."""
    held = _together(parts(tree))
    if not any(_has_arrays(held[name]) for name in MODEL if name in held):
        inner = ((f"{path}/{key}" if path else str(key), part) for key, part in held.items())
        return {name: found for each in inner for name, found in linen(each[1], each[0]).items()}
    others = held.get("collections", {})
    others = others if isinstance(others, Mapping) and "params" in held else {}
    mine = {
        name: part
        for name, part in held.items()
        if (isinstance(part, Mapping) or name in MODEL)
        and name not in TRAINING
        and (part or name == "params")
        and not (name == "collections" and others)
    }
    if "params" in mine:
        mine["params"] = _slow(mine["params"], "opt_state" in held)
    is_plain = isinstance(tree, Mapping) and mine.keys() >= {k for k in tree if k not in MODEL}
    return {path: tree if is_plain and not others else {**mine, **others}}


def _together(held: Mapping[Any, Any]) -> Mapping[Any, Any]:
    """The parts of a state, with nested statistics moved next to the parameters.

    Some training loops keep all variables in `params`, others all collections in `model_state`.
    """
    if "params" not in held or "batch_stats" in held:
        return held
    params = parts(held["params"])
    inside = {"params": params} if "params" in params else {}
    inside |= {
        name: parts(part) for name, part in held.items() if name not in ("params", *TRAINING)
    }
    found = [name for name, part in inside.items() if _has_arrays(part.get("batch_stats", 0))]
    if len(found) != 1:
        return held
    return {**{k: part for k, part in held.items() if k != found[0]}, **inside[found[0]]}


def parts(tree: Any) -> Mapping[Any, Any]:
    """The children of a tree by name; a leaf has none."""
    if type(tree) is dict:
        return tree
    if "flax" in sys.modules:  # otherwise it can't be from nnx
        from flax import nnx

        tree = nnx.state(tree) if isinstance(tree, nnx.Pytree) else tree
        tree = nnx.to_pure_dict(tree) if isinstance(tree, nnx.State) else tree
    if isinstance(tree, Mapping):
        return tree
    if dataclasses.is_dataclass(tree) and any(hasattr(tree, name) for name in _OF_STATES):
        return {each.name: getattr(tree, each.name) for each in dataclasses.fields(tree)}
    if as_dict := getattr(tree, "_asdict", None):  # a named tuple
        return as_dict()
    return dict(enumerate(tree)) if isinstance(tree, list | tuple) else {}


def of_variable(names: Path) -> Path:
    """The path of an nnx variable, which orbax may have saved as {"value": array}."""
    return names[:-1] if len(names) > 1 and names[-1] == "value" else names


def flat(tree: Any) -> dict[Path, Any]:
    """The leaves by path."""
    found: dict[Path, Any] = {}
    for key, part in parts(tree).items():
        inner = flat(part) if parts(part) else {(): part}
        found |= {(str(key), *path): leaf for path, leaf in inner.items()}
    return {of_variable(path): leaf for path, leaf in found.items()}


def _has_arrays(part: Any) -> bool:
    """Whether it is an empty tree or one of arrays; a PyTorch optimizer's `params` are indices."""
    held = parts(part).values()
    if held:
        return any(map(_has_arrays, held))
    is_number = not getattr(part, "ndim", 0) and "int" in str(getattr(part, "dtype", "int"))
    return not is_number or part == {}


def _slow(params: Any, trained: bool) -> Any:
    """The set to evaluate with, if these are the two sets of parameters of `optax.lookahead`."""
    held = parts(params)
    if trained and {*held} == {"fast", "slow"}:
        fast, slow = ({k: np.shape(x) for k, x in flat(each).items()} for each in held.values())
        return held["slow"] if fast == slow else params
    return params
