"""Banks, which timm's `SplitBatchNorm2d` keeps as separate batch norms.

The first bank has `bn.weight`, the second `bn.aux_bn.0.weight`.
"""

import functools
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bnjax.checkpoints.conversion.names import Name
from bnjax.checkpoints.conversion.trees import Leaf

_AUX = re.compile(r"(?P<path>.+\.)?aux_bn\.(?P<number>\d+)\.(?P<leaf>\w+)")
_LEAVES = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def joined(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Stack the arrays of all banks into one, with a row for each."""
    rows = _rows(arrays)
    new = {name: array for name, array in arrays.items() if not _AUX.fullmatch(name)}
    for name, others in rows.items():
        new[name] = np.stack([arrays[name], *(arrays[other] for other in others)])
    return new


def parted(arrays: Mapping[str, np.ndarray], like: Iterable[str] | None) -> dict[str, np.ndarray]:
    """Split arrays of several banks into one batch norm per bank; arrays they share go into each.

    With `like`, exactly the batch norms named there.
    """
    if like is not None:
        rows = _rows(like)
        new = dict(arrays)
        for name, others in rows.items():
            for number, other in enumerate((name, *others)):
                new[other] = arrays[name][number]
        return {name: new[name] for name in like}
    new = {}
    for name, array in arrays.items():
        path, _, leaf = name.rpartition(".")
        mean = arrays.get(f"{path}.running_mean" if path else "running_mean")
        if mean is None or mean.ndim < 2 or leaf not in _LEAVES:
            new[name] = array
            continue
        own = array.ndim == (1 if leaf == "num_batches_tracked" else mean.ndim)
        each = list(array) if own else [array] * len(mean)
        new[name] = each[0]
        for number, row in enumerate(each[1:]):
            new[".".join(filter(None, (path, f"aux_bn.{number}", leaf)))] = row
    return new


class _Affine(NamedTuple):
    """A scale or bias that banks share, and what each adds to it, if it does."""

    name: Name
    added: Name
    banks: int


def apart(leaves: Mapping[Name, Leaf], several: bool = True) -> dict[Name, Leaf]:
    """The arrays as if each bank had its own scale and bias; shapes only, if that is all given.

    Without `several`, as for a state dict that has no `aux_bn`, only those of single banks.
    """
    new = dict(leaves)
    for name, added, banks in _affine(leaves):
        if banks > 1 and not several:
            continue
        values = [new.pop(each).value for each in (name, added) if each in leaves]
        rows = functools.partial(_in_each, shape=(banks, *values[0].shape))
        known = all(isinstance(value, jax.Array | np.ndarray) for value in values)
        value = rows(*values) if known else jax.eval_shape(rows, *values)
        new[name] = Leaf(leaves[name].path, value)
    return {name: new[name] for name in leaves if name in new}


def unshared(
    arrays: Mapping[str, np.ndarray], pairs: Mapping[str, Any], leaves: Mapping[Name, Leaf]
) -> Iterator[str]:
    """A line for each scale or bias that differs between banks, but is one array in Flax."""
    keys = {name: key for key, (name, _) in pairs.items()}
    for name, added, _ in _affine(leaves):
        each = arrays[keys[name]] if name in keys else np.zeros(())
        if added not in leaves and each.ndim > 1 and not _equal(each):
            yield (
                f"different in each bank: {keys[name]}, and its aux_bn, for {leaves[name].path} "
                f"{tuple(leaves[name].value.shape)}, which they share. Make the layer with "
                'affine="own"'
            )


def shared(
    arrays: Mapping[Name, np.ndarray], leaves: Mapping[Name, Leaf]
) -> dict[Name, np.ndarray]:
    """The arrays with those of the first bank as the shared ones; others add the difference."""
    new = dict(arrays)
    for name, added, _ in _affine(leaves):
        if name in new and new[name].ndim > len(leaves[name].value.shape):
            each = new[name]
            new[name] = each[0]
            if added in leaves:
                new[added] = each - each[0]
    return new


def _affine(leaves: Mapping[Name, Leaf]) -> Iterator[_Affine]:
    """The scales and biases of layers with banks that have fewer axes than the statistics."""
    for name, leaf in leaves.items():
        mean = leaves.get(Name(name.module, "mean", True))
        if name.leaf in ("scale", "bias") and mean is not None:
            if len(mean.value.shape) == 2 and len(leaf.value.shape) == 1:
                added = name._replace(leaf=f"bank_{name.leaf}")
                yield _Affine(name, added, mean.value.shape[0])


def _in_each(*values: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jnp.broadcast_to(sum(values), shape)


def _equal(rows: np.ndarray) -> bool:
    return all(np.array_equal(rows[0], row, equal_nan=True) for row in rows[1:])


def _rows(names: Iterable[str]) -> dict[str, list[str]]:
    """For each name in a first bank, the names in the others, in order."""
    found: dict[str, dict[int, str]] = {}
    known = set(names)
    for name in known:
        if match := _AUX.fullmatch(name):
            first = (match["path"] or "") + match["leaf"]
            if first in known:
                found.setdefault(first, {})[int(match["number"])] = name
    return {first: [others[n] for n in sorted(others)] for first, others in found.items()}
