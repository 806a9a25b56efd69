"""Choose the bank that a model uses, and convert variables to and from banks."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import chex
import jax.numpy as jnp
from flax import nnx
from flax.core import FrozenDict, meta
from flax.traverse_util import flatten_dict, unflatten_dict

from bnjax import globs
from bnjax.core.checks import (
    POOLED,
    axis_of_banks,
    bank_names,
    no_banks_yet,
    one_bank,
    some_banks,
)
from bnjax.layers.conventions import current, named_banks
from bnjax.models import checks
from bnjax.models.contexts import Frame, Reentrant, holding


class bank(Reentrant):  # noqa: N801 - used as a function is
    """A context that sets the bank of all layers with `banks`, in any linen or nnx model.

    A bank passed to the call of a layer takes precedence. Contexts nest, and the innermost wins.
    Each applies only to the thread and asyncio task that entered it. `jit` compiles a function once
    for each bank given by name or number.

    In bnjax's training steps, `recalibrate` and `diagnose`, give the bank of each example as the
    entry `"bank"` of the batch instead, int32 (N,).

    Guide: examples/guides/banks.md

    Args:
        which: the name or number of a bank, or an int32 array of shape (N,), one for each example.
            Arrays may be traced, if the context is entered where they are traced.

    >>> import bnjax, jax, jax.numpy as jnp
    >>> layer = bnjax.BatchNorm1d(2, banks=("source", "target"))
    >>> x = jnp.array([[1.0, 2.0], [3.0, 4.0]])
    >>> variables = layer.init(jax.random.key(0), x)
    >>> with bank("target"):
    ...     y, updates = layer.apply(variables, x, mutable=["batch_stats"])
    >>> updates["batch_stats"]["mean"].any(1).tolist()
    [False, True]
    """

    def __init__(self, which: int | str | chex.Array) -> None:
        self._which = which

    @contextlib.contextmanager
    def _entered(self) -> Iterator[None]:
        plain: Any = isinstance(self._which, int | str)
        frame = Frame(("bank", self._which) if plain else object())
        before = current.set(self._which)
        try:
            with holding(frame):
                yield
        finally:
            current.reset(before)


Arrays = dict[str, Any]  # scale, bias and statistics of one layer, by name


def to_banks(
    variables: Any,
    banks: int | Sequence[str],
    *,
    affine: Literal[True, "own", "both"] = True,
    paths: globs.Paths = "**",
) -> Any:
    """Convert the variables of a model to the same model with `banks` in its batch norms.

    Each bank starts as a copy of the layer's statistics, so all evaluate like the original.

    Guide: examples/guides/banks.md

    Args:
        variables: a dict of linen variables or an `nnx.State`, of bnjax's layers or Flax's.
        banks: the number of banks, or their names.
        affine: as set in the layers: True shares scale and bias, "own" copies them into each bank,
            "both" adds `bank_scale` and `bank_bias`, initialized to 0.
        paths: which batch norms, as a glob over module paths or several.

    Returns:
        New variables, of the same kind.

    Raises:
        ValueError: a pattern matches no batch norm, or one has banks already.

    >>> stats = {"bn": {"mean": jnp.zeros(3), "var": jnp.ones(3)}}
    >>> new = to_banks({"batch_stats": stats}, ("source", "target"))
    >>> new["batch_stats"]["bn"]["mean"].shape
    (2, 3)
    """
    bank_names(banks, True)
    number = banks if isinstance(banks, int) else len(banks)
    if not isinstance(banks, int):
        named_banks.add(tuple(banks))

    def copied(path: str, arrays: Arrays) -> Arrays:
        no_banks_yet(jnp.ndim(arrays["mean"]), path)
        shared = {"scale", "bias"} if affine != "own" else set()
        new = {
            name: value if name in shared else jnp.stack([jnp.asarray(value)] * number)
            for name, value in arrays.items()
        }
        if affine == "both":
            for name in shared & arrays.keys():
                value = jnp.asarray(arrays[name])
                new[f"bank_{name}"] = jnp.zeros((number, *value.shape), value.dtype)
        return new

    return _map(copied, variables, paths)


def select_bank(
    variables: Any,
    bank: int | str,
    *,
    banks: int | Sequence[str] | None = None,
    paths: globs.Paths = "**",
) -> Any:
    """Extract the variables of one bank, for the same model without banks.

    Flax's own layers accept the result, and `bnjax.fold` folds it.

    Guide: examples/guides/banks.md

    Args:
        variables: a dict of linen variables or an `nnx.State`.
        bank: the name or number of a bank.
        banks: the names of all banks, or their number; needed if no layer or `to_banks` in this
            program has used the name, or if there are statistics with more axes, as of layers that
            nn.scan stacks.
        paths: which batch norms, as a glob over module paths or several; those without banks are
            left unchanged.

    Returns:
        New variables, of the same kind.

    Raises:
        ValueError: there is no such bank, or no layer has banks.

    >>> stats = {"bn": {"mean": jnp.arange(6.0).reshape(2, 3), "var": jnp.ones((2, 3))}}
    >>> new = select_bank({"batch_stats": stats}, "target", banks=("source", "target"))
    >>> new["batch_stats"]["bn"]["mean"].tolist()
    [3.0, 4.0, 5.0]
    """
    names = tuple(map(str, range(banks))) if isinstance(banks, int) else banks
    found = []

    def chosen(path: str, arrays: Arrays) -> Arrays:
        shape = jnp.shape(arrays["mean"])
        number = len(names) if names is not None else None
        axis = axis_of_banks(shape, number, path)
        if axis is None:
            return arrays
        found.append(path)
        at = (slice(None),) * axis + (one_bank(bank, shape[axis], names, named_banks, path),)
        new = {}
        for name, value in arrays.items():
            if name.startswith("bank_"):
                continue
            own = jnp.ndim(value) == len(shape) or name == "count"
            new[name] = value[at] if own else value
            if f"bank_{name}" in arrays:
                new[name] = value + arrays[f"bank_{name}"][at]
        return new

    new = _map(chosen, variables, paths)
    some_banks(bool(found))
    return new


_NAMES = ("scale", "bias", "bank_scale", "bank_bias", "mean", "var", "count", *POOLED)


def _map(change: Callable[[str, Arrays], Arrays], variables: Any, paths: globs.Paths) -> Any:
    """Variables with the arrays of each matching batch norm replaced by `change(path, arrays)`."""
    state = isinstance(variables, nnx.State)
    if not state:
        checks.has_statistics(variables)
    flat = _flat(variables)
    norms: dict[str, dict[str, tuple]] = {}
    for keys in flat:
        if keys[-1] in _NAMES and (state or keys[0] in ("params", "batch_stats")):
            path = "/".join(map(str, keys[:-1] if state else keys[1:-1]))
            norms.setdefault(path, {})[keys[-1]] = keys
    norms = {path: names for path, names in norms.items() if {"mean", "var"} <= names.keys()}
    globs.check_each(paths, norms)
    fits = globs.any_of(paths)
    for path, names in norms.items():
        if paths and not fits(path):
            continue
        leaves = {name: flat.pop(keys) for name, keys in names.items()}
        arrays = {name: _array(leaf) for name, leaf in leaves.items()}
        for name, value in change(path, arrays).items():
            like = name if name in names else name.removeprefix("bank_")
            flat[(*names[like][:-1], name)] = _with_array(leaves[like], value)
    if state:
        return nnx.from_flat_state(flat.items())
    nested = unflatten_dict(flat)
    return FrozenDict(nested) if isinstance(variables, FrozenDict) else nested


def _flat(variables: Any) -> dict[tuple, Any]:
    if isinstance(variables, nnx.State):
        return dict(nnx.to_flat_state(variables))
    return flatten_dict(variables, keep_empty_nodes=True)


def _array(leaf: Any) -> Any:
    return leaf.get_value() if isinstance(leaf, nnx.Variable) else meta.unbox(leaf)


def _with_array(leaf: Any, value: Any) -> Any:
    if isinstance(leaf, nnx.Variable):
        return leaf.replace(value)
    return meta.replace_boxed(leaf, value)
