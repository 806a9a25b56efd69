"""Checks of batches, and of what a loss function returns."""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh


def inputs(value: Any) -> None:
    """Require names of entries, or a function of the batch."""
    names = value.values() if isinstance(value, Mapping) else value
    several = isinstance(value, Mapping | tuple | list) and names
    if callable(value) or isinstance(value, str):
        return
    if several and all(isinstance(name, str) for name in names):
        return
    raise TypeError(
        "`inputs` must be a name in the batch, several of them, a dict of names by keyword, or a "
        f"function of the batch, got {value!r}."
    )


def batch_as_dict(batch: Any) -> dict[str, Any]:
    """The batch as a dict; a bare array becomes its `x`."""
    if isinstance(batch, Mapping):
        return dict(batch)
    if not hasattr(batch, "shape"):
        raise TypeError(
            "A batch must be an array or a dict with the model's input as `x`, got "
            f'{type(batch).__name__}. Write {{"x": images, "y": labels}}.'
        )
    return {"x": batch}


def batch_holds(batch: Mapping[str, Any], names: Collection[str]) -> None:
    """Require the entries that the model is called with."""
    missing = [name for name in names if name not in batch]
    if missing == ["x"]:
        raise ValueError(
            f"A batch must hold the model's input as `x`, got {sorted(batch)}. Rename it, as in "
            '{"x": images, "y": labels}, or name it: inputs="image", inputs=("obs", "action").'
        )
    if missing:
        raise ValueError(f"A batch must hold the `inputs` {missing}, got {sorted(batch)}.")


def arrays_of_batch(batch: Any) -> None:
    """Check that JAX accepts the arrays of a batch, unlike tensors of other frameworks."""
    for keys, leaf in jax.tree.leaves_with_path(batch):
        known = isinstance(leaf, jax.Array | np.ndarray | np.generic)
        if not known and hasattr(leaf, "__array__") and not hasattr(leaf, "__jax_array__"):
            kind = type(leaf)
            raise TypeError(
                "A batch must hold arrays of NumPy or JAX, got a "
                f"{kind.__module__.partition('.')[0]}.{kind.__name__} as "
                f"`{jax.tree_util.keystr(keys, simple=True, separator='/')}`. Convert it, as with "
                "np.asarray, where the batches are loaded."
            )


def bank_of_examples(bank: Any) -> None:
    """Check the bank in a batch, which is passed to a compiled program."""
    listed = isinstance(bank, list | tuple) and all(isinstance(each, str | int) for each in bank)
    if isinstance(bank, str) or listed:
        name = bank if isinstance(bank, str) else "target"
        raise TypeError(
            "The `bank` of a batch must be a number or an array of int32, one for each example, "
            f"got {bank!r}. Convert it, as in np.array(bank), or give a name for all examples: "
            f'`with bnjax.bank("{name}"):` around the call.'
        )


def mask_of_examples(mask: Any, size: int) -> None:
    """Require a boolean mask with one entry per example."""
    shape, dtype = getattr(mask, "shape", None), getattr(mask, "dtype", None)
    if shape != (size,) or dtype != np.bool_:
        raise ValueError(
            f"The `mask` of a batch of {size} examples must be a boolean array of shape ({size},), "
            f"got {dtype or type(mask).__name__} of shape {shape}. Convert it first, as in "
            "`mask != 0`."
        )


def per_example(batch: Mapping[str, Any], names: Collection[str], size: int) -> None:
    """Require that the entries in `per_example` exist and have one value per example."""
    there = [name for name in names if name in batch]
    if not there:
        raise ValueError(
            f"A batch must hold an entry named in `per_example`, {list(names)}, got "
            f"{sorted(batch)}."
        )
    for name in there:
        shapes = [np.shape(leaf) for leaf in jax.tree.leaves(batch[name])]
        if any(shape[:1] != (size,) for shape in shapes):
            raise ValueError(
                f"`{name}` is named in `per_example`, so its leading axis must be the {size} "
                f"examples of the batch, got shapes {shapes}."
            )


def leading_axis(lengths: list[int], shapes: list[tuple[int, ...]]) -> int:
    """The number of examples: the leading axis of the first input."""
    if not lengths:
        raise ValueError(
            "The inputs in a batch must be arrays with examples along the leading axis, got shapes "
            f"{shapes}."
        )
    return lengths[0]


def mesh(value: Any) -> None:
    """Require a JAX mesh."""
    if not isinstance(value, Mesh):
        raise TypeError(
            f"`mesh` must be a jax.sharding.Mesh, such as jax.make_mesh((4,), ('data',)), got "
            f"{type(value).__name__}."
        )


def loss_and_metrics(result: Any) -> tuple[Any, dict[str, Any]]:
    """The loss and the dict of metrics, possibly empty, that a loss function returned."""
    loss, metrics = result if isinstance(result, tuple) and len(result) == 2 else (result, {})
    if isinstance(loss, tuple | list | Mapping) or not isinstance(metrics, Mapping):
        what = type(result).__name__
        got = f"{what} of {len(result)}" if isinstance(result, tuple | list) else what
        raise TypeError(
            "`loss_fn` must return the loss or (loss, metrics), an array and a dict of arrays, got "
            f"a {got}. Write return loss, {{'accuracy': accuracy}}."
        )
    for name, value in {"loss": loss, **metrics}.items():
        if not isinstance(value, jax.Array | np.ndarray | np.number | int | float):
            raise TypeError(
                f"`loss_fn` must return arrays, but its `{name}` is of type "
                f"{type(value).__name__}. Does it end with `return loss` or `return loss, metrics`?"
            )
    return loss, dict(metrics)


def mean_or_each(name: str, value: Any, size: int) -> Any:
    """Require a mean, or one entry per example."""
    if value.shape not in ((), (size,)):
        raise ValueError(
            f"`loss_fn` must return `{name}` as a mean, of shape (), or per example, of shape "
            f"({size},), got shape {value.shape}. Take the mean over the other axes."
        )
    return value


def several_batches(batches: Any) -> None:
    """Require several batches rather than one."""
    if isinstance(batches, Mapping) or hasattr(batches, "shape"):
        shape = getattr(batches, "shape", None)
        got = "a dict" if shape is None else f"an array of shape {tuple(shape)}"
        raise TypeError(
            f"`batches` must be a list or an iterator of batches, got {got}: write [batch]."
        )


def some_batch(some: bool | float, what: str = "batch") -> None:
    """Require at least one batch, or one example that counts."""
    if not some:
        raise ValueError(
            f"`batches` must hold at least one {what}, got none. An iterator can be used only "
            "once: pass a list, or create it again."
        )


def iterable_again(batches: Any) -> None:
    """Require something that can be iterated over more than once."""
    if isinstance(batches, Iterator):
        raise ValueError(
            f"`batches` must be iterable once per layer, got a {type(batches).__name__}, which can "
            "be used only once. Pass a list, or use sequential=False."
        )
