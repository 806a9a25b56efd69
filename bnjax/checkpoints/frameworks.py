"""Convert between PyTorch and Flax, in the direction that a template asks for."""

from typing import Any

from flax import nnx
from flax.traverse_util import flatten_dict

from bnjax.checkpoints.conversion import from_torch, to_torch
from bnjax.models.variables import of_variable


def converted_like(tree: dict[str, Any], template: dict[str, Any], options: dict[str, Any]) -> Any:
    """Convert a tree to the names and layouts of a template from the other framework.

    Args:
        tree: a PyTorch state dict, linen variables or an nnx state, as nested dicts of arrays.
        template: the same model in the other framework, likewise.
        options: keyword arguments of `from_torch` and `to_torch`.

    Raises:
        ValueError: both are from the same framework.
    """
    flax, other = map(_is_flax, (tree, template))
    if flax == other:
        names = "Flax names, such as `kernel` and `scale`" if flax else "PyTorch names"
        raise ValueError(
            f"Both files have {names}, so --like changes nothing: leave it out. From a nested "
            "checkpoint, save only the state dict or the variables."
        )
    if other:
        return from_torch(tree, None, _as_variables(template), **options)
    return to_torch(_as_variables(tree), template, **options, numpy=True)


def _is_flax(tree: dict[str, Any]) -> bool:
    """Whether the names are those of linen variables or an nnx state."""
    last = {of_variable(tuple(map(str, names)))[-1] for names in flatten_dict(tree)}
    known = {"kernel", "scale", "embedding", "mean", "var"} & last
    return bool(known or ({"params", "batch_stats"} & {*tree} and not "".join(last).count(".")))


def _as_variables(tree: dict[str, Any]) -> Any:
    """Linen variables unchanged; a saved nnx state as an `nnx.State`."""
    if {"params", "batch_stats"} & {*tree}:
        return tree
    flat = {of_variable(keys): x for keys, x in flatten_dict(tree).items()}
    streams = {keys[:-1] for keys in flat if keys[-1] == "key"}
    kinds = {"mean": nnx.BatchStat, "var": nnx.BatchStat, "count": nnx.BatchStat}

    def kind(keys: tuple[Any, ...]) -> Any:
        return nnx.RngState if keys[:-1] in streams else kinds.get(keys[-1], nnx.Param)

    return nnx.from_flat_state((keys, kind(keys)(x)) for keys, x in flat.items())
