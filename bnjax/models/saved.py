"""Extract the variables of a model from what a training run has saved."""

from typing import Any

from flax import linen as nn
from flax import nnx
from flax.traverse_util import unflatten_dict

from bnjax.models.nnx_copies import restored
from bnjax.models.variables import TRAINING, flat, linen, parts


def variables_of_model(model: nn.Module | nnx.Module, tree: Any) -> Any:
    """Extract the variables of a model from what a training run has saved.

    Args:
        model: a linen or nnx model.
        tree: its variables, which are returned unchanged, or a tree that contains them: for linen,
            a `TrainState` or the result of `bnjax.load`; for nnx, a dict or tuple of states, in
            memory or loaded. None for an nnx model's own variables.

    Raises:
        ValueError: the tree holds the variables of several models or of a PyTorch model.
    """
    if isinstance(model, nnx.Module):
        if tree is None or isinstance(tree, nnx.State) or not parts(tree):
            return tree
        return restored(model, _of_nnx(model, tree))
    found = linen(tree)
    if len(found) > 1:
        raise ValueError(
            f"`variables` must be those of one model, but hold several, at {sorted(found)}. Pass "
            "one of them."
        )
    if not found and _is_torch(tree):
        raise ValueError(
            "`variables` must be those of a Flax model, got the state dict of a PyTorch model. "
            "Convert it first, with `bnjax.from_torch(state_dict, model, variables)` or "
            "`bnjax convert FILE --like FLAX`."
        )
    return next(iter(found.values()), tree)


def _of_nnx(model: nnx.Module, tree: Any) -> Any:
    """The part of a tree that has all arrays of an nnx model, except its random keys."""
    states = nnx.state(model, nnx.RngState, ...)
    random, wanted = ({*map("/".join, flat(state))} for state in states)
    level = {"": tree}
    while level:
        leaves = {path: flat(part) for path, part in level.items()}
        fitting = [path for path, held in leaves.items() if wanted <= {*map("/".join, held)}]
        if len(fitting) > 1:
            raise ValueError(
                f"`variables` must be those of one model, but hold several, at {fitting}. Pass one "
                "of them."
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
