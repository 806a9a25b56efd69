"""The variables of a given model in what a training has saved, as its tools take them."""

from typing import Any

from flax import linen as nn
from flax import nnx
from flax.traverse_util import unflatten_dict

from bnjax.models.nnx_copies import restored
from bnjax.models.variables import TRAINING, flat, linen, parts


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
        if tree is None or isinstance(tree, nnx.State) or not parts(tree):
            return tree
        return restored(model, _of_nnx(model, tree))
    found = linen(tree)
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


def _of_nnx(model: nnx.Module, tree: Any) -> Any:
    """The part of a tree with all arrays of an nnx model, but for its random keys."""
    states = nnx.state(model, nnx.RngState, ...)
    random, wanted = ({*map("/".join, flat(state))} for state in states)
    level = {"": tree}
    while level:
        leaves = {path: flat(part) for path, part in level.items()}
        fitting = [path for path, held in leaves.items() if wanted <= {*map("/".join, held)}]
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
            for key, inner in parts(part).items()
            if parts(inner)
        }
    beside = {name for name in TRAINING if name not in {each.split("/")[0] for each in wanted}}
    held = {k: leaf for k, leaf in flat(tree).items() if "/".join(k) not in random}
    return unflatten_dict({k: leaf for k, leaf in held.items() if k[0] not in beside})


def _is_torch(tree: Any) -> bool:
    return any(k[-1].endswith("running_mean") for k in flat(tree))
