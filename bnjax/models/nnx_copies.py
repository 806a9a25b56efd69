"""An nnx model as linen has them: variables apart, a pure `apply`, and calls to intercept.

What a tool does to a linen model from outside it does so to an nnx model, whoever wrote it.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from bnjax import globs
from bnjax.models import checks
from bnjax.models.conventions import NNX
from bnjax.models.freezing import fitting
from bnjax.models.overrides import setting
from bnjax.models.subtypes import subtype

Path = tuple[str, ...]

LINEAR = (nnx.Conv, nnx.ConvTranspose, nnx.Linear, nnx.LinearGeneral)
_COLLECTIONS = {"params": nnx.Param, "batch_stats": nnx.BatchStat}
_PATH = "_bnjax_path"

# A context of JAX's, for it traces a function anew where the value is another one.
_interceptor: Any = jax.make_user_context(None)


class Bridge:
    """A copy of an nnx model, in evaluation, that is used as a linen model is.

    Args:
        model: the model, which stays as it is.
        state: an `nnx.State` of it, or of a part of it, to take instead of its own.
    """

    def __init__(self, model: nnx.Module, state: Any = None) -> None:
        # Arrays instead of references, which a copy would share and a program not show.
        self.model = nnx.with_vars(nnx.clone(model), ref=False)
        if state is not None:
            checks.nnx_state(state)
            flat, own = (dict(nnx.to_flat_state(s)) for s in (state, nnx.state(self.model)))
            checks.tree_fits(_shapes(flat), _shapes(own), part=True)
            nnx.update(self.model, state)
        self.model.eval()
        for path, layer in self._modules().items():
            if isinstance(layer, NNX + LINEAR) and not isinstance(layer, _Heard):
                heard = subtype(_Heard, type(layer), NNX + LINEAR, "")
                object.__setattr__(layer, "__class__", heard)
                setattr(layer, _PATH, "/".join(path))

    @property
    def variables(self) -> dict[str, Any]:
        """Arrays by collection and path: `params`, `batch_stats`, and others by their type.

        Random keys, and arrays that are no `nnx.Variable`, stay with the model.
        """
        return unflatten_dict(_arrays(self.model))

    def state(self, variables: Mapping[str, Any]) -> nnx.State:
        """The state of the model with these variables."""
        flat = flatten_dict(variables)
        checks.tree_fits(_shapes(flat), _shapes(_arrays(self.model)))
        leaves = [
            (keys, leaf.replace(flat.get(_key(keys, leaf), leaf.get_raw_value())))
            if isinstance(leaf, nnx.Variable)
            else (keys, leaf)
            for keys, leaf in nnx.to_flat_state(nnx.state(self.model))
        ]
        return nnx.from_flat_state(leaves)

    def apply(
        self, variables: Mapping[str, Any], x: Any, *, mutable: Sequence[str] = (), **kwargs: Any
    ) -> Any:
        """The output of the model, and, with mutable collections, what they have become."""
        model = nnx.merge(nnx.graphdef(self.model), self.state(variables))
        y = model(x, **kwargs)
        if not mutable:
            return y
        return y, unflatten_dict({k: v for k, v in _arrays(model).items() if k[0] in mutable})

    def holding(self, variables: Mapping[str, Any]) -> "Bridge":
        """The model with exactly these variables: more become attributes, others None."""
        bridge, flat = Bridge(self.model), flatten_dict(variables)
        modules, own = bridge._modules(), _arrays(self.model)
        for _, *path, name in own.keys() - flat:
            setattr(modules[tuple(path)], name, nnx.data(None))
        for collection, *path, name in flat.keys() - own:
            value = flat[(collection, *path, name)]
            setattr(modules[tuple(path)], name, _COLLECTIONS[collection](value))
        return bridge

    def paths(self, patterns: globs.Paths) -> set[Path]:
        """The batch norms whose path fits."""
        return {path_of(layer) for layer in fitting(self.model, patterns)}

    def _modules(self) -> dict[Path, nnx.Module]:
        """All modules; a shared one has the first of its paths, as in the state."""
        graph = list(nnx.iter_graph(self.model))
        return {_names(keys): node for keys, node in graph if isinstance(node, nnx.Module)}


def restored(model: nnx.Module, checkpoint: Mapping[str, Any]) -> nnx.State:
    """The state of an nnx model with the arrays of a checkpoint, nested by path.

    Random keys stay those of the model. Of a variable, orbax may have saved {"value": array}.
    """
    arrays = {_names(keys): array for keys, array in flatten_dict(checkpoint).items()}
    arrays = {keys[:-1] if keys[-1] == "value" else keys: array for keys, array in arrays.items()}
    leaves = dict(nnx.to_flat_state(nnx.state(model)))
    held = {k: leaf for k, leaf in leaves.items() if not isinstance(leaf, nnx.RngState)}
    checks.tree_fits(_shapes(arrays), _shapes(held))
    held = {keys: leaf.replace(jnp.asarray(arrays[_names(keys)])) for keys, leaf in held.items()}
    return nnx.from_flat_state((leaves | held).items())


@contextlib.contextmanager
def intercepting(interceptor: Callable[..., Any]) -> Iterator[None]:
    """A context in which the calls of linen modules and of a bridge's layers are intercepted.

    Args:
        interceptor: as for `nn.intercept_methods`. Of nnx models it gets batch norms, convs and
            linear layers.
    """
    with _interceptor(interceptor), nn.intercept_methods(interceptor):
        yield


@contextlib.contextmanager
def without_devices(layer: Any) -> Iterator[None]:
    """A context in which a layer, of linen or nnx, names no devices that are not here."""
    fields: dict[str, Any] = {}
    if layer.axis_name is not None:
        try:
            jax.lax.axis_size(layer.axis_name)
        except NameError:
            fields = {"axis_name": None, "axis_index_groups": None}
    with setting(layer, **fields):
        yield


def path_of(layer: Any) -> Path:
    """The path of a layer in its model."""
    if isinstance(layer, nn.Module):
        return layer.path
    path = getattr(layer, _PATH)
    return tuple(path.split("/")) if path else ()


def variables_of(layer: Any) -> Mapping[str, Mapping[str, Any]]:
    """The variables of a layer by collection and name."""
    return layer.variables if isinstance(layer, nn.Module) else unflatten_dict(_arrays(layer))


class _Heard(nnx.Module):
    """A layer whose calls go to the interceptor."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call, interceptor = super().__call__, _interceptor.value
        if interceptor is None:
            return call(*args, **kwargs)
        layer: Any = self
        context = nn.module.InterceptorContext(layer, "__call__", call)
        return interceptor(call, args, kwargs, context)


def _arrays(node: nnx.Module) -> dict[Path, Any]:
    """The arrays of a model or layer, by collection and path."""
    leaves = nnx.to_flat_state(nnx.state(node))
    keys = {_key(keys, leaf): leaf for keys, leaf in leaves if isinstance(leaf, nnx.Variable)}
    return {key: leaf.get_raw_value() for key, leaf in keys.items() if key}


def _key(keys: Sequence[Any], leaf: nnx.Variable) -> Path:
    if isinstance(leaf, nnx.RngState):
        return ()
    names = (name for name, kind in _COLLECTIONS.items() if isinstance(leaf, kind))
    return next(names, type(leaf).__name__), *_names(keys)


def _names(keys: Sequence[Any]) -> Path:
    return tuple(map(str, keys))


def _shapes(flat: Mapping[Any, Any]) -> dict[str, tuple[int, ...]]:
    arrays = {k: v.get_raw_value() if isinstance(v, nnx.Variable) else v for k, v in flat.items()}
    return {"/".join(_names(key)): jnp.shape(array) for key, array in arrays.items()}
