"""Convert any tree to nested dicts of arrays, and back."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.core import meta
from jax.tree_util import keystr, tree_flatten_with_path

from bnjax.checkpoints import contents
from bnjax.checkpoints.contents import ContentError, Leaf, Node, joined, leaves
from bnjax.checkpoints.tensors import is_key
from bnjax.models.variables import of_variable

_NUMBERS = (bool, int, float, complex)


def as_dicts(value: Any, leaf: Leaf, *, paths: bool = False) -> dict[str, Any]:
    """Convert any tree to nested dicts, and each leaf to `leaf(value, name)`.

    Dataclasses and named tuples become dicts of their fields, nnx models and optimizers their
    state. Boxes such as `nnx.Variable` are removed.
    """
    return contents.as_dicts(value, leaf, paths=paths, opened=_opened)


def filled(like: Any, checkpoint: Mapping[str, Any]) -> Any:
    """A tree like `like`, with the arrays of nested dicts.

    Raises:
        ContentError: names are missing or unknown, or arrays have the wrong shape or kind.
    """
    wanted: dict[str, Any] = {}
    as_dicts(like, lambda leaf, name: _note(wanted, leaf, name))
    arrays = _by_name(checkpoint, wanted)
    common = sorted(wanted.keys() & arrays)
    shapes = {name: (np.shape(arrays[name]), _shape(wanted[name])) for name in common}
    kinds = {name: (_dtype(arrays[name]), _dtype(wanted[name])) for name in common}
    wrong = {
        "missing": sorted(wanted.keys() - arrays),
        "unknown": sorted(arrays.keys() - wanted),
        "wrong shape": [f"{n} {a} not {b}" for n, (a, b) in shapes.items() if a != b],
        "wrong dtype": [f"{n} {a} not {b}" for n, (a, b) in kinds.items() if not _fits(a, b)],
    }
    if text := ", ".join(f"{what} {names}" for what, names in wrong.items() if names):
        raise ContentError(
            f"it does not match `like`: {text}. Is it from another model or optimizer? Without "
            f"`like`, it loads unchanged."
        )
    return _mapped(like, lambda leaf, name: None if leaf is None else _as(arrays[name], leaf), "")


def _mapped(value: Any, leaf: Leaf, name: str) -> Any:
    """The same tree with other leaves."""
    node = _opened(value)
    if node is None:
        return leaf(value, name)
    names = (name if node.is_box else joined(name, key) for key in node.parts)
    pairs = zip(names, node.parts.values(), strict=True)
    return node.made([_mapped(part, leaf, inner) for inner, part in pairs])


def _opened(value: Any) -> Node | None:
    """One level of a tree; None for a leaf."""
    if isinstance(value, nnx.Variable):
        return Node({"": value.get_raw_value()}, lambda new: value.replace(new[0]), is_box=True)
    if isinstance(value, nnx.Pytree):
        graph, state = nnx.split(value)
        return Node({"": state}, lambda new: nnx.merge(graph, new[0]), is_box=True)
    if isinstance(value, meta.AxisMetadata):
        made = lambda new: meta.replace_boxed(value, new[0])  # noqa: E731 - as the others
        return Node({"": meta.unbox(value)}, made, is_box=True)
    if type(value) is dict:
        return Node(value, lambda new: dict(zip(value, new, strict=True)))
    pairs, structure = tree_flatten_with_path(value, is_leaf=lambda part: part is not value)
    if value is None or (pairs and not pairs[0][0]):
        return _opened(dict(value)) if isinstance(value, Mapping) else None  # not a pytree to JAX
    return Node({_key(path): part for path, part in pairs}, structure.unflatten)


def _key(path: tuple[Any, ...]) -> Any:
    (key,) = path
    return getattr(key, "key", keystr(path, simple=True))


def _note(wanted: dict[str, Any], leaf: Any, name: str) -> Any:
    if leaf is not None:
        if not hasattr(leaf, "dtype") and not isinstance(leaf, _NUMBERS):
            raise ContentError(f"`like` holds a {type(leaf).__name__} at {name}, not an array.")
        wanted[name] = leaf
    return leaf


def _by_name(checkpoint: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, Any]:
    """The arrays, by full name."""
    found: dict[str, Any] = {}
    for name, leaf in leaves(checkpoint):
        if leaf is not None:
            outer = "/".join(of_variable(tuple(name.split("/"))))
            found[name if name in wanted else outer] = leaf
    return found


def _shape(leaf: Any) -> tuple[int, ...]:
    if not is_key(leaf):
        return np.shape(leaf) if isinstance(leaf, _NUMBERS) else tuple(leaf.shape)
    struct = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    return jax.eval_shape(jax.random.key_data, struct).shape


def _dtype(leaf: Any) -> Any:
    if is_key(leaf):
        return np.dtype(np.uint32)
    return np.asarray(leaf).dtype if isinstance(leaf, _NUMBERS) else getattr(leaf, "dtype", leaf)


def _fits(given: Any, wanted: Any) -> bool:
    """Whether numbers of one dtype may be cast to another."""
    if not isinstance(given, np.dtype):  # text
        return False
    kinds = (jnp.bool_, jnp.integer, jnp.floating, jnp.complexfloating)
    return any(jnp.issubdtype(given, k) and jnp.issubdtype(wanted, k) for k in kinds)


def _as(array: Any, like: Any) -> Any:
    """The array with the type, dtype and sharding of `like`."""
    array = np.asarray(array)
    if isinstance(like, _NUMBERS):
        # A Python number is saved with 64 bits; with fewer, it was a JAX array, such as `step`.
        was_number = array.dtype.itemsize >= 8 or isinstance(like, bool)
        return type(like)(array) if was_number else jnp.asarray(array)
    if isinstance(like, np.generic):
        return array.astype(like.dtype)[()]
    if isinstance(like, np.ndarray):
        return np.array(array, like.dtype, order="C")
    sharding = like.sharding if getattr(like, "committed", True) else None
    if is_key(like):
        key = jax.random.wrap_key_data(jnp.asarray(array), impl=jax.random.key_impl(like))
        return key if sharding is None else jax.device_put(key, sharding)
    array = array.astype(like.dtype)
    if sharding is None:
        return jnp.array(array)
    if sharding.is_fully_addressable:
        return jax.device_put(jnp.array(array), sharding)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])
