"""The variables of a model in the tree that a training has saved, found by name."""

import dataclasses
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

Path = tuple[str, ...]
MODEL = ("params", "batch_stats")
# What a training keeps beside them, by the usual names; what is no dict is none of theirs either.
TRAINING = ("opt_state", "optimizer", "step", "rng", "loss_scale", "dynamic_scale", "ema_params")

_OF_STATES = ("params", "variables")  # a dataclass with one of these is a state, not a model


def variables_in(tree: Any) -> Any:
    """The only variables of a linen model in a tree; or the tree, if there are none or several."""
    found = linen(tree)
    return next(iter(found.values())) if len(found) == 1 else tree


def linen(tree: Any, path: str = "") -> dict[str, Any]:
    """The variables of each linen model in a tree, by path, none inside another."""
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
    """The parts of a state, with statistics that lie in another one beside the parameters.

    Some trainings keep all variables in `params`, others all collections in `model_state`.
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
    """The parts of a tree by name; none of a leaf."""
    if type(tree) is dict:
        return tree
    if "flax" in sys.modules:  # only then can it be of nnx
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
    """The path of an nnx variable, of which orbax may have saved {"value": array}."""
    return names[:-1] if len(names) > 1 and names[-1] == "value" else names


def flat(tree: Any) -> dict[Path, Any]:
    """The leaves by path."""
    found: dict[Path, Any] = {}
    for key, part in parts(tree).items():
        inner = flat(part) if parts(part) else {(): part}
        found |= {(str(key), *path): leaf for path, leaf in inner.items()}
    return {of_variable(path): leaf for path, leaf in found.items()}


def _has_arrays(part: Any) -> bool:
    """Whether it is a tree of parameters, or empty; the `params` of a PyTorch optimizer count."""
    held = parts(part).values()
    if held:
        return any(map(_has_arrays, held))
    is_number = not getattr(part, "ndim", 0) and "int" in str(getattr(part, "dtype", "int"))
    return not is_number or part == {}


def _slow(params: Any, trained: bool) -> Any:
    """Of the two sets of parameters that `optax.lookahead` keeps the one to evaluate with."""
    held = parts(params)
    if trained and {*held} == {"fast", "slow"}:
        fast, slow = ({k: np.shape(x) for k, x in flat(each).items()} for each in held.values())
        return held["slow"] if fast == slow else params
    return params
