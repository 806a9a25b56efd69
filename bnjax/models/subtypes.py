"""Subtypes of nnx layers: one layer of a model acts otherwise, and its code does not know."""

import copyreg
import functools
import types
from typing import Any

from flax import nnx

Roots = tuple[type[nnx.Module], ...]


class Subtype(type(nnx.Module)):
    """The type of such types, so that pickle can make them anew."""

    kind: type[nnx.Module]
    recipe: tuple[type[nnx.Module], type[nnx.Module], Roots, str]


@functools.cache
def subtype(mixin: type[nnx.Module], kind: type[nnx.Module], roots: Roots, prefix: str) -> Subtype:
    """The subclass of a type of layer that calls the mixin where it would call one of the roots.

    Of a user's own subclass of a root, `super().__call__` is what the mixin gets. It is the same
    type each time, as jit compares it.
    """
    root = next(root for root in roots if issubclass(kind, root))
    bases = (mixin, root) if kind is root else (kind, subtype(mixin, root, roots, prefix))
    fields = {
        "kind": kind,
        "recipe": (mixin, kind, roots, prefix),
        "__module__": mixin.__module__,
        "__doc__": kind.__doc__,
    }
    keywords = {"metaclass": Subtype, "pytree": kind._pytree__is_pytree}
    made: Any = types.new_class(
        f"{prefix}{kind.__name__}", bases, keywords, lambda body: body.update(fields)
    )
    return made


def own_type(layer: nnx.Module) -> type[nnx.Module]:
    """The type that a layer was made with."""
    kind = type(layer)
    while isinstance(kind, Subtype):
        kind = kind.kind
    return kind


copyreg.pickle(Subtype, lambda made: (subtype, made.recipe))
