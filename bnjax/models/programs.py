"""Compiled programs, with notes that Python took while they were traced."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any
from weakref import WeakKeyDictionary

import jax
from flax import nnx

from bnjax.models.conventions import knowledge

_NAME = "_bnjax_kept"
_kept: WeakKeyDictionary[nnx.Module, "_Kept"] = (
    WeakKeyDictionary()
)  # an attribute would become part of an nnx model


class Program:
    """A function that is compiled once per kind of arguments, and keeps the notes of each.

    Args:
        function: `function(notes, *args)` returns the results. While it is traced, it may write to
            the dict `notes`.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._compiled: dict[Any, tuple[Callable, dict[str, Any]]] = {}

    def __call__(self, *args: Any) -> tuple[Any, dict[str, Any]]:
        """The results, and the notes."""
        compiled, notes = self._of(args)
        return compiled(*args), notes

    def trace(self, *args: Any) -> dict[str, Any]:
        """The notes alone."""
        compiled, notes = self._of(args)
        jax.eval_shape(compiled, *args)
        return notes

    def _of(self, args: tuple) -> tuple[Callable, dict[str, Any]]:
        leaves, tree = jax.tree.flatten(args)
        kind = tree, tuple(map(jax.typeof, leaves))
        if kind not in self._compiled:
            notes: dict[str, Any] = {}
            function = self._function
            self._compiled[kind] = jax.jit(lambda *args: function(notes, *args)), notes
        return self._compiled[kind]


class _Kept(OrderedDict):
    """A cache that lives as long as its model and is not copied with it."""

    def __reduce__(self) -> tuple[type, tuple]:
        return _Kept, ()

    def __deepcopy__(self, memo: Any) -> "_Kept":
        return _Kept()


def kept_with(model: Any, key: Hashable, make: Callable[[], Any], at_most: int = 8) -> Any:
    """What `make` returned for a model and a key; cached, unless the key can't be hashed."""
    key = key, knowledge()
    try:
        hash(key)
    except TypeError:
        return make()
    if isinstance(model, nnx.Module):
        kept = _kept.setdefault(model, _Kept())
    else:
        kept = vars(model).get(_NAME) or _Kept()
        object.__setattr__(model, _NAME, kept)
    if key not in kept:
        kept[key] = make()
        while len(kept) > at_most:
            kept.popitem(last=False)
    return kept[key]
