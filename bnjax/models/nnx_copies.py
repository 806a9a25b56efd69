"""An nnx model in linen's form: separate variables and a pure `apply`.

It lets tools handle nnx models like linen ones.
"""

import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx import bridge
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.tree_util import (
    DictKey,
    FlattenedIndexKey,
    GetAttrKey,
    SequenceKey,
    keystr,
    tree_flatten_with_path,
    tree_structure,
)

from bnjax import globs
from bnjax.models import checks
from bnjax.models.attributes import path_of
from bnjax.models.compat import modules_of, plain_arrays
from bnjax.models.conventions import LINEAR_NNX, NNX, is_rewritten
from bnjax.models.freezing import fitting
from bnjax.models.programs import kept_with
from bnjax.models.statistics import Path, layers_of
from bnjax.models.visits import mark

_COLLECTIONS = {"params": nnx.Param, "batch_stats": nnx.BatchStat}
_KEYS = (DictKey, FlattenedIndexKey, GetAttrKey, SequenceKey)


class Copy:
    """A copy of an nnx model, in evaluation mode by default, that is used like a linen model.

    Args:
        model: the model, which is not changed.
        state: an `nnx.State` of all or part of it, to use instead of its own.
        training: keep the modes of the layers, and include random keys and their counts in the
            variables.

    Attributes:
        norms: its batch norms, by path.
        strangers: classes, by path, of unknown modules that keep a mean and a variance.
    """

    def __init__(self, model: nnx.Module, state: Any = None, *, training: bool = False) -> None:
        self._training, self._original = training, weakref.ref(model)
        self._graph = nnx.graphdef(model)
        self.model = plain_arrays(nnx.clone(model))
        nnx.pop(self.model, nnx.Intermediate)  # sown values are not variables
        if state is not None:
            checks.nnx_state(state)
            flat, own = (dict(nnx.to_flat_state(s)) for s in (state, nnx.state(self.model)))
            flat = {k: v for k, v in flat.items() if not isinstance(v, nnx.Intermediate)}
            checks.tree_fits(_shapes(flat), _shapes(own), part=True)
            nnx.update(self.model, nnx.from_flat_state(flat.items()))
        if not training:
            self.model.eval()
        self.norms: dict[Path, nnx.Module] = {}
        self.strangers: dict[str, str] = {}
        for path, module in self._modules().items():
            kept = [n for n in ("mean", "var") if isinstance(vars(module).get(n), nnx.BatchStat)]
            if isinstance(module, NNX) and not is_rewritten(type(module)):
                self.norms[path] = module
            elif len(kept) == 2:
                self.strangers["/".join(path)] = type(module).__name__
            elif isinstance(module, bridge.ToNNX):
                hidden = layers_of(nnx.to_pure_dict(nnx.state(module, nnx.BatchStat)))
                self.strangers |= {"/".join((*path, *inner)): "ToNNX" for inner in hidden}
            if isinstance(module, (NNX, *LINEAR_NNX)):
                mark(module, path)

    @property
    def variables(self) -> dict[str, Any]:
        """Arrays by collection and path: `params`, `batch_stats`, and others by their type.

        Arrays that are not an `nnx.Variable` stay in the model, as do random keys unless training.
        """
        return unflatten_dict(self.flat(self.model))

    def state(self, variables: Mapping[str, Any]) -> nnx.State:
        """The state of the model with these variables."""
        flat, held = flatten_dict(variables), self._leaves(self.model)
        checks.tree_fits(_shapes(flat), _shapes(self.flat(self.model)))

        def filled(keys: tuple[Any, ...], leaf: Any) -> Any:
            if keys not in held:
                new = isinstance(leaf, nnx.RngState)  # of this trace, where a count may move
                return leaf.replace(leaf.get_raw_value()) if new else leaf
            structure = tree_structure(leaf.get_raw_value())
            return leaf.replace(structure.unflatten([flat[key] for key in held[keys]]))

        leaves = nnx.to_flat_state(nnx.state(self.model))
        return nnx.from_flat_state((keys, filled(keys, leaf)) for keys, leaf in leaves)

    def apply(
        self, variables: Mapping[str, Any], *args: Any, mutable: Sequence[str] = (), **kwargs: Any
    ) -> Any:
        """The output of the model and, if any collections are mutable, their updates."""
        model = self.model_with(variables)
        y = model(*args, **kwargs)
        if not mutable:
            return y
        return y, unflatten_dict({k: v for k, v in self.flat(model).items() if k[0] in mutable})

    def model_with(self, variables: Mapping[str, Any]) -> nnx.Module:
        """An nnx model with these variables."""
        return nnx.merge(nnx.graphdef(self.model), self.state(variables))

    def holding(self, variables: Mapping[str, Any]) -> "Copy":
        """The model with exactly these variables: new ones become attributes, missing ones None."""
        copy, flat = Copy(self.model, training=self._training), flatten_dict(variables)
        modules, own = copy._modules(), self.flat(self.model)
        checks.reachable({key[1:-1] for key in own.keys() ^ flat}, modules, self.strangers)
        for _, *path, name in own.keys() - flat:
            setattr(modules[tuple(path)], name, nnx.data(None))
        for collection, *path, name in flat.keys() - own:
            value = flat[(collection, *path, name)]
            setattr(modules[tuple(path)], name, _COLLECTIONS[collection](value))
        return copy

    def abstract(self) -> "Copy":
        """A copy with shapes in place of arrays, so that a program does not keep them alive."""
        copy = Copy(self.model, training=self._training)
        shapes = jax.tree.map(jax.typeof, copy.variables)
        copy.model = copy.model_with(shapes)
        return copy

    def kept(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What `make` returned for this model, as it is now, and this key; cached."""
        original = self._original()
        return make() if original is None else kept_with(original, (self._graph, key), make)

    def fitting(self, paths: globs.Paths) -> set[Path]:
        """The paths of the batch norms that match."""
        return {path_of(layer) for layer in fitting(self.model, paths)}

    def keys_of(self, wrt: Any) -> set[Path]:
        """Collection and path of the arrays in all variables that a filter selects."""
        selected = {keys for keys, _ in nnx.to_flat_state(nnx.state(self.model, wrt))}
        return {
            k for keys, held in self._leaves(self.model).items() if keys in selected for k in held
        }

    def flat(self, model: nnx.Module) -> dict[Path, Any]:
        """The arrays of a model, by collection and path."""
        return {k: array for leaf in self._leaves(model).values() for k, array in leaf.items()}

    def _leaves(self, model: nnx.Module) -> dict[tuple[Any, ...], dict[Path, Any]]:
        """The arrays in each variable, by the keys of the variable: one, if it holds no tree."""
        return _held(nnx.state(model), random=self._training)

    def _modules(self) -> dict[Path, nnx.Module]:
        return {_names(keys): module for keys, module in modules_of(self.model)}


def arrays_of(state: nnx.State) -> dict[Path, Any]:
    """The arrays of a state, by collection and path as `Copy.variables` has them."""
    return {key: array for held in _held(state).values() for key, array in held.items()}


def with_arrays(state: nnx.State, arrays: Mapping[Path, Any]) -> nnx.State:
    """A state with some arrays replaced; other variables stay the same objects."""
    leaves, held = dict(nnx.to_flat_state(state)), _held(state)
    for keys, own in held.items():
        if own.keys() & arrays:
            structure = tree_structure(leaves[keys].get_raw_value())
            new = structure.unflatten([arrays.get(key, array) for key, array in own.items()])
            leaves[keys] = leaves[keys].replace(new)
    return nnx.from_flat_state(leaves.items())


def restored(model: nnx.Module, checkpoint: Mapping[str, Any]) -> nnx.State:
    """The state of an nnx model with the arrays of a checkpoint, nested by path.

    Random keys are the model's.
    """
    arrays = {_names(keys): array for keys, array in flatten_dict(checkpoint).items()}
    leaves = dict(nnx.to_flat_state(nnx.state(model)))
    held = {k: leaf for k, leaf in leaves.items() if not isinstance(leaf, nnx.RngState)}
    checks.tree_fits(_shapes(arrays), _shapes(held))
    held = {keys: leaf.replace(jnp.asarray(arrays[_names(keys)])) for keys, leaf in held.items()}
    return nnx.from_flat_state((leaves | held).items())


def _held(state: nnx.State, *, random: bool = False) -> dict[tuple[Any, ...], dict[Path, Any]]:
    """The arrays in each variable of a state, by the keys of the variable."""
    return {
        keys: {
            (_collection(leaf), *_names(keys), *_names(inner)): array
            for inner, array in tree_flatten_with_path(leaf.get_raw_value())[0]
        }
        for keys, leaf in nnx.to_flat_state(state)
        if isinstance(leaf, nnx.Variable)
        and (random or not isinstance(leaf, nnx.RngState))
        and not isinstance(leaf, nnx.Intermediate)
    }


def _collection(leaf: nnx.Variable) -> str:
    names = (name for name, kind in _COLLECTIONS.items() if isinstance(leaf, kind))
    return next(names, type(leaf).__name__)


def _names(keys: Sequence[Any]) -> Path:
    return tuple(keystr((k,), simple=True) if isinstance(k, _KEYS) else str(k) for k in keys)


def _shapes(flat: Mapping[Any, Any]) -> dict[str, tuple[int, ...]]:
    arrays = {k: v.get_raw_value() if isinstance(v, nnx.Variable) else v for k, v in flat.items()}
    return {
        "/".join((*_names(key), *_names(inner))): jnp.shape(array)
        for key, value in arrays.items()
        for inner, array in tree_flatten_with_path(value)[0]
    }
