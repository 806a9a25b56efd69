"""Freeze the batch norms of an nnx model by path: freeze, unfreeze."""

import copyreg
import types
from collections.abc import Iterator
from typing import Any

from flax import nnx
from jax.tree_util import keystr, tree_flatten_with_path

from bnjax import globs
from bnjax.models.compat import is_pytree
from bnjax.models.conventions import NNX, Frozen, own_type
from bnjax.models.visits import listen_to


def freeze(model: nnx.Module, paths: globs.Paths = "**") -> None:
    """Freeze the batch norms of `model` whose path matches, in place, until `unfreeze`.

    A frozen layer normalizes with its running statistics and leaves them unchanged, bit for bit,
    whatever `model.train()`, `set_attributes`, `nnx.view` or the arguments of a call say. This
    works for bnjax's layers and `flax.nnx.BatchNorm`, in any model, under `nnx.jit` and the other
    transformations, and through `nnx.split` and `nnx.merge`. It adds nothing to the state, so
    checkpoints are the same with and without.

    A frozen layer is marked by its type, so freeze a model before you pass it to a function under
    `nnx.jit`: Flax can't return a new type to the caller.

    Guide: examples/guides/freezing.md

    Args:
        model: a module; a batch norm itself has the path "".
        paths: a glob over attribute paths or several, such as `"encoder/**"` or `"blocks/*/bn1"`.
            A shared layer is frozen if any of its paths matches.

    Raises:
        ValueError: a pattern matches no batch norm; the error lists their paths.

    >>> import bnjax, jax.numpy as jnp
    >>> layer = bnjax.nnx.BatchNorm1d(3, rngs=nnx.Rngs(0))
    >>> freeze(layer)
    >>> layer.train()
    >>> y = layer(jnp.array([[1.0, 2.0, 3.0], [3.0, 4.0, 5.0]]))
    >>> layer.mean[...].tolist()
    [0.0, 0.0, 0.0]
    """
    fitting(model, paths)
    freeze_fitting(model, paths)


def freeze_fitting(model: nnx.Module, paths: globs.Paths) -> None:
    """Freeze the batch norms whose path matches, if there are any."""
    fits = globs.any_of(paths)
    for path, layer in batch_norms(model):
        if fits(path) and not isinstance(layer, Frozen):
            object.__setattr__(layer, "__class__", _frozen(type(layer)))


def unfreeze(model: nnx.Module, paths: globs.Paths = "**") -> None:
    """Undo `freeze`: each layer returns to the mode that `.train()` or `.eval()` last set.

    Args:
        model: a module, some of whose batch norms are frozen.
        paths: a glob over attribute paths or several, as for `freeze`, with the same error.
    """
    for layer in fitting(model, paths):
        object.__setattr__(layer, "__class__", own_type(layer))


def fitting(model: nnx.Module, paths: globs.Paths) -> list[nnx.Module]:
    """The batch norms whose path matches; raises if a pattern matches none."""
    layers, fits = list(batch_norms(model)), globs.any_of(paths)
    globs.check_each(paths, [path for path, _ in layers])
    return [layer for path, layer in layers if fits(path)]


def batch_norms(node: Any, path: str = "", above: tuple = ()) -> Iterator[tuple[str, Any]]:
    """All batch norms with their paths; a shared one with all its paths, not just the first."""
    if isinstance(node, NNX):
        yield path, node
        return
    leaves = tree_flatten_with_path(node, is_leaf=lambda value: value is not node)[0]
    children = [(keystr(key, simple=True), child) for key, child in leaves]
    if isinstance(node, nnx.Module) and any(child is node for _, child in children):
        children = sorted(vars(node).items())  # made with pytree=False
    for name, child in children:
        if not any(child is parent for parent in (*above, node)):
            yield from batch_norms(child, f"{path}/{name}" if path else name, (*above, node))


class _FrozenType(type(nnx.Module)):
    """The metaclass of frozen layers, which lets pickle recreate them."""

    kind: type[nnx.Module]


def _frozen(kind: type[nnx.Module]) -> _FrozenType:
    """The frozen subclass of a layer type; cached, because jit compares types."""
    listen_to(kind)
    if "_bnjax_frozen" not in vars(kind):
        fields = {"kind": kind, "__module__": __name__, "__doc__": kind.__doc__}
        keywords = {"metaclass": _FrozenType, "pytree": is_pytree(kind)}
        made = types.new_class(
            f"Frozen{kind.__name__}", (Frozen, kind), keywords, lambda body: body.update(fields)
        )
        kind._bnjax_frozen = made  # pyright: ignore[reportAttributeAccessIssue] - set on a class
    return vars(kind)["_bnjax_frozen"]


copyreg.pickle(_FrozenType, lambda made: (_frozen, (made.kind,)))
