"""Flatten linen variables or an nnx state to arrays by name, and rebuild them with new arrays."""

import contextlib
import functools
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import linen as nn
from flax import nnx, traverse_util
from flax.core import meta, unfreeze

from bnjax.checkpoints.conversion.names import Name

_STATISTICS = "batch_stats"
_NOT_CONVERTED = (nnx.RngState, nnx.Cache, nnx.Intermediate, nnx.Perturbation)


class Leaf(NamedTuple):
    """An array of a model, or its shape and dtype, with its full path for messages."""

    path: str
    value: Any


class Tree(NamedTuple):
    """The arrays that can have counterparts in PyTorch, and a function that replaces them."""

    leaves: dict[Name, Leaf]
    replaced: Callable[[Mapping[Name, Any]], Any]


def tree(model: Any, variables: Any) -> Tree:
    """The arrays of linen variables or an nnx state; for an nnx model, by default its own."""
    if not isinstance(model, (nn.Module, nnx.Module, type(None))):
        raise TypeError(
            "`model` must be a flax.linen.Module or flax.nnx.Module instance, or None, got "
            f"{type(model).__name__}."
        )
    if variables is None and isinstance(model, nnx.Module):
        variables = nnx.state(model)
    if isinstance(variables, nnx.State):
        return _nnx_tree(variables)
    if not isinstance(variables, Mapping) or not {"params", _STATISTICS} & set(variables):
        got = sorted(variables) if isinstance(variables, Mapping) else type(variables).__name__
        raise ValueError(
            "`variables` must be a dict with the collections `params` and `batch_stats`, as "
            f"returned by `model.init`, or an `nnx.State`, got {got}."
        )
    return _linen_tree(variables)


def _linen_tree(variables: Mapping[str, Any]) -> Tree:
    flat = traverse_util.flatten_dict(unfreeze(dict(variables)), keep_empty_nodes=True)
    keys = {
        Name(tuple(map(str, key[1:-1])), str(key[-1]), key[0] == _STATISTICS): key
        for key, value in flat.items()
        if key[0] in ("params", _STATISTICS) and hasattr(meta.unbox(value), "shape")
    }
    leaves = {
        name: Leaf("/".join(map(str, key)), meta.unbox(flat[key])) for name, key in keys.items()
    }

    def replaced(arrays: Mapping[Name, Any]) -> Any:
        boxed = {
            keys[name]: meta.replace_boxed(flat[keys[name]], _like(array, leaves[name].value))
            for name, array in arrays.items()
        }
        return traverse_util.unflatten_dict(flat | boxed)

    return Tree(leaves, replaced)


def _nnx_tree(state: nnx.State) -> Tree:
    flat: list[tuple[tuple, Any]] = list(nnx.to_flat_state(state))
    names = {
        path: Name(tuple(map(str, path[:-1])), str(path[-1]), isinstance(variable, nnx.BatchStat))
        for path, variable in flat
        if isinstance(variable, nnx.Variable) and not isinstance(variable, _NOT_CONVERTED)
    }
    leaves = {
        names[path]: Leaf("/".join(map(str, path)), variable.get_value())
        for path, variable in flat
        if path in names
    }

    def replaced(arrays: Mapping[Name, Any]) -> Any:
        # A state shares its variables with the model, so copy each.
        new = dict(flat)
        for path, variable in flat:
            if path in names and names[path] in arrays:
                name = names[path]
                new[path] = variable.replace(_like(arrays[name], leaves[name].value))
            elif isinstance(variable, nnx.Variable):
                new[path] = variable.copy()
        return nnx.from_flat_state(list(new.items()))

    return Tree(leaves, replaced)


def _like(array: np.ndarray, leaf: Any) -> Any:
    """A copy of the array: in NumPy if the leaf is, otherwise on the leaf's devices."""
    if isinstance(leaf, np.ndarray):
        return np.array(array, order="C")
    # JAX may alias an aligned NumPy array, whose memory PyTorch may later write to.
    new = jax.numpy.array(np.asarray(array, order="C"), copy=True)
    if isinstance(leaf, jax.Array) and leaf.committed:
        new = jax.device_put(new, leaf.sharding)
    return new


def flipped_layers(model: nnx.Module) -> set[str]:
    """The paths of transposed convolutions whose kernels are flipped relative to PyTorch's."""
    return {
        "/".join(map(str, path))
        for path, module in nnx.iter_modules(model)
        if isinstance(module, nnx.ConvTranspose) and not module.transpose_kernel
    }


def mentions_conv_transpose(model: nn.Module) -> bool:
    """Whether the code of a linen model mentions `ConvTranspose`, as far as it can be followed.

    A linen model reveals its layers only when called, and a conversion has no input to call it on.
    """
    seen: dict[int, Any] = {}  # keeps the items alive, so that no id is reused
    waiting: list[Any] = [model]
    while waiting:
        item = waiting.pop()
        if isinstance(item, type) and issubclass(item, nn.ConvTranspose):
            return True
        if id(item) not in seen:
            seen[id(item)] = item
            waiting.extend(_reached(item))
    return False


def _reached(item: Any) -> Iterator[Any]:
    """Everything that a model, class or function refers to, except inside libraries."""
    if isinstance(item, functools.partial):
        yield from (item.func, *item.args, *item.keywords.values())
    elif isinstance(item, (list, tuple)):
        yield from item
    elif isinstance(item, Mapping):
        yield from item.values()
    elif isinstance(item, types.FunctionType) and not _of_library(item.__module__):
        yield from _named(item.__code__, item.__globals__)
        for cell in item.__closure__ or ():
            with contextlib.suppress(ValueError):  # an empty cell
                yield cell.cell_contents
        yield from (getattr(item, "__wrapped__", None), item.__defaults__, item.__kwdefaults__)
    elif isinstance(item, type) and issubclass(item, nn.Module):
        yield from (vars(base) for base in item.__mro__ if not _of_library(base.__module__))
    elif isinstance(item, (staticmethod, classmethod)):
        yield item.__func__
    elif isinstance(item, property):
        yield item.fget
    elif isinstance(item, nn.Module):
        yield type(item)
        for name in type(item).__dataclass_fields__:
            value = getattr(item, name, None)
            yield value
            if hasattr(value, "__dict__") and not _of_library(type(value).__module__):
                yield dict(vars(value))  # a configuration


def _named(code: types.CodeType, scope: Mapping[str, Any]) -> Iterator[Any]:
    if "ConvTranspose" in code.co_names:
        yield nn.ConvTranspose
    reached = [scope[name] for name in code.co_names if name in scope]
    yield from reached
    for module in (item for item in reached if isinstance(item, types.ModuleType)):
        if not _of_library(module.__name__):
            yield from (getattr(module, name, None) for name in code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _named(constant, scope)


def _of_library(module: str | None) -> bool:
    root = (module or "").partition(".")[0]
    return root in ("flax", "jax", "jaxlib", "numpy", "builtins")
