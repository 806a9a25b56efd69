"""What in the tree that a training has saved are the variables of a model."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from flax import linen as nn
from flax import nnx
from flax.traverse_util import unflatten_dict

from bnjax.models.nnx_copies import restored
from bnjax.models.statistics import Path

_MODEL = ("params", "batch_stats")
# What a training keeps beside them, by the usual names; what is no dict is none of theirs either.
_TRAINING = ("opt_state", "optimizer", "step", "rng", "loss_scale", "dynamic_scale", "ema_params")


def variables_of_model(model: nn.Module | nnx.Module, tree: Any) -> Any:
    """The variables of a model in what a training has saved, as its tools take them.

    Args:
        model: a linen or nnx model.
        tree: its variables, which are returned as they are; or a `TrainState`, or a tree around
            one, such as `bnjax.load` gives it; for nnx a dict or tuple of states, or of what was
            saved of them. None for the variables that an nnx model has.

    Raises:
        ValueError: there are the variables of several models, or those of a PyTorch model.
    """
    if isinstance(model, nnx.Module):
        if tree is None or isinstance(tree, nnx.State) or not _parts(tree):
            return tree
        return restored(model, _of_nnx(model, tree))
    found = _linen(tree)
    if len(found) > 1:
        raise ValueError(
            f"`variables` hold those of several models, at {sorted(found)}: pass one of them."
        )
    if not found and _is_torch(tree):
        raise ValueError(
            "`variables` are the state dict of a PyTorch model. Convert them before, by "
            "`bnjax.from_torch(state_dict, model, variables)` or `bnjax convert FILE --like FLAX`."
        )
    return next(iter(found.values()), tree)


def variables_in(tree: Any) -> Any:
    """The only variables of a linen model in a tree; or the tree, if there are none or several."""
    found = _linen(tree)
    return next(iter(found.values())) if len(found) == 1 else tree


def _linen(tree: Any, path: str = "") -> dict[str, Any]:
    """The variables of each linen model in a tree, by path, none inside another."""
    parts = _parts(tree)
    if not {*_MODEL} & {*parts}:
        inner = ((f"{path}/{key}" if path else str(key), part) for key, part in parts.items())
        return {name: found for each in inner for name, found in _linen(each[1], each[0]).items()}
    others = parts.get("collections", {})
    others = others if isinstance(others, Mapping) and "params" in parts else {}
    held = {
        name: part
        for name, part in parts.items()
        if (isinstance(part, Mapping) or name in _MODEL)
        and name not in _TRAINING
        and (part or name == "params")
        and not (name == "collections" and others)
    }
    if "params" in held:
        held["params"] = _slow(held["params"], "opt_state" in parts)
    is_plain = isinstance(tree, Mapping) and held.keys() >= {k for k in tree if k not in _MODEL}
    return {path: tree if is_plain and not others else {**held, **others}}


def _parts(tree: Any) -> Mapping[Any, Any]:
    """The parts of a tree by name; none of a leaf."""
    if isinstance(tree, nnx.Pytree):
        tree = nnx.state(tree)
    if isinstance(tree, nnx.State):
        tree = nnx.to_pure_dict(tree)
    if isinstance(tree, Mapping):
        return tree
    if dataclasses.is_dataclass(tree) and hasattr(tree, "params"):
        return {each.name: getattr(tree, each.name) for each in dataclasses.fields(tree)}
    if as_dict := getattr(tree, "_asdict", None):  # a named tuple
        return as_dict()
    return dict(enumerate(tree)) if isinstance(tree, list | tuple) else {}


def _slow(params: Any, trained: bool) -> Any:
    """Of the two sets of parameters that `optax.lookahead` keeps the one to evaluate with."""
    parts = _parts(params)
    if trained and {*parts} == {"fast", "slow"}:
        alike = [jax.tree.map(jax.numpy.shape, part) for part in parts.values()]
        return parts["slow"] if alike[0] == alike[1] else params
    return params


def _of_nnx(model: nnx.Module, tree: Any) -> Any:
    """The part of a tree with all arrays of an nnx model, but for its random keys."""
    states = nnx.state(model, nnx.RngState, ...)
    random, wanted = ({*map("/".join, _flat(state))} for state in states)
    level = {"": tree}
    while level:
        flat = {path: _flat(part) for path, part in level.items()}
        fitting = [path for path, held in flat.items() if wanted <= {*map("/".join, held)}]
        if len(fitting) > 1:
            raise ValueError(
                f"`variables` hold those of several models, at {fitting}: pass one of them."
            )
        if fitting:
            tree = level[fitting[0]]
            break
        level = {
            f"{path}/{key}".lstrip("/"): inner
            for path, part in level.items()
            for key, inner in _parts(part).items()
            if _parts(inner)
        }
    beside = {name for name in _TRAINING if name not in {each.split("/")[0] for each in wanted}}
    held = {k: leaf for k, leaf in _flat(tree).items() if "/".join(k) not in random}
    return unflatten_dict({k: leaf for k, leaf in held.items() if k[0] not in beside})


def of_variable(names: Path) -> Path:
    """The path of an nnx variable, of which orbax may have saved {"value": array}."""
    return names[:-1] if len(names) > 1 and names[-1] == "value" else names


def _flat(tree: Any) -> dict[Path, Any]:
    """The leaves by path."""
    found: dict[Path, Any] = {}
    for key, part in _parts(tree).items():
        inner = _flat(part) if _parts(part) else {(): part}
        found |= {(str(key), *path): leaf for path, leaf in inner.items()}
    return {of_variable(path): leaf for path, leaf in found.items()}


def _is_torch(tree: Any) -> bool:
    return any(k[-1].endswith("running_mean") for k in _flat(tree))
