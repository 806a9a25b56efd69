"""Settings by module path, for any linen model, whoever wrote it: override, freeze."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
from flax import linen as nn

from bnjax import globs
from bnjax.models import checks
from bnjax.models.conventions import LINEN

# JAX compiles a function anew where the value of this context is another one: a function that was
# jitted outside does not ignore an override, nor keep one after it has ended.
_active: Any = jax.make_user_context(())


@dataclasses.dataclass(frozen=True)
class _Override:
    paths: tuple[str, ...]
    fields: tuple[tuple[str, Any], ...]

    def fits(self, path: str) -> bool:
        return any(globs.matcher(pattern)(path) for pattern in self.paths)


# The paths of the batch norms that each override meets now, and those it met when last it met any:
# under jit, a later call of a compiled function meets nothing.
_meeting: dict[_Override, set[str]] = {}
_met: dict[_Override, set[str]] = {}


@contextlib.contextmanager
def override(paths: globs.Paths, **fields: Any) -> Iterator[None]:
    """A context in which every batch norm whose module path fits takes other settings.

    It holds for bnjax's linen layers and for `flax.linen.BatchNorm`, in any model, without touching
    its code, under `jit` (a function that was compiled before is compiled anew), `nn.remat` and
    `nn.scan`. Contexts nest, and the inner one wins.

    Args:
        paths: a glob over module paths or several, such as `"encoder/**"` or `"**/bn1"`; `*` is a
            part of one name, `**` any number of names.
        **fields: the settings, by the names of the layers' fields and in their convention: a
            momentum of 0.01 means 0.99 in a layer of Flax's. `use_running_average` wins over what
            the model passes to the call.

    Raises:
        TypeError: no layer has a field of that name.
        ValueError: a pattern fits no batch norm that was called; the paths there are, are listed.
    """
    known = {field.name for layer in LINEN for field in dataclasses.fields(layer)}
    checks.known_fields(fields, known - {"parent", "name"})
    this = _Override(globs.as_tuple(paths), tuple((k, _hashable(v)) for k, v in fields.items()))
    outer, _meeting[this] = _meeting.get(this), set()
    try:
        with _active((*_active.value, this)), nn.intercept_methods(_intercept):
            yield
        _met[this] = _meeting[this] or _met.get(this, set())
        for pattern in this.paths:
            fits = any(map(globs.matcher(pattern), _met[this]))
            globs.check_fits(pattern, fits, _met[this])
    finally:
        del _meeting[this]
        if outer is not None:
            _meeting[this] = outer


def freeze(paths: globs.Paths) -> contextlib.AbstractContextManager[None]:
    """A context in which the batch norms whose module path fits are frozen, in training too.

    They normalize with their running statistics, and those stay as they are, bit for bit. The same
    patterns keep an optimizer from their parameters: `bnjax.trainable_labels`.

    Args:
        paths: a glob over module paths or several, as for `override`.
    """
    return override(paths, use_running_average=True)


def active() -> tuple[_Override, ...]:
    """The overrides that hold here, for `again`."""
    return _active.value


@contextlib.contextmanager
def again(overrides: tuple[_Override, ...]) -> Iterator[None]:
    """A context in which these hold once more, outside of those that hold here."""
    with _active((*overrides, *_active.value)), nn.intercept_methods(_intercept):
        yield


def none() -> contextlib.AbstractContextManager[None]:
    """A context in which none holds."""
    return _active(())


@contextlib.contextmanager
def overridden(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Iterator[tuple]:
    """The layer with the settings that are active for its path, and the arguments of its call."""
    path = "/".join(layer.path)
    fields: dict[str, Any] = {}
    for one in _active.value:
        if one in _meeting:  # not where it holds again
            _meeting[one].add(path)
        if one.fits(path):
            fields.update(one.fields)
    if "use_running_average" in fields:
        args, kwargs = args[:1], {k: v for k, v in kwargs.items() if k != "use_running_average"}
    checks.layer_has_fields(layer, fields, path)
    if "momentum" in fields:
        checks.overriding_momentum(fields["momentum"], hasattr(layer, "track_running_stats"))
    with setting(layer, **fields):
        yield args, kwargs


@contextlib.contextmanager
def setting(layer: Any, **fields: Any) -> Iterator[None]:
    """A context in which a layer, of linen or nnx, has other fields."""
    before = {name: getattr(layer, name) for name in fields}
    try:
        # A linen module is frozen for good reasons, but here it is put back before anyone looks.
        for name, value in fields.items():
            object.__setattr__(layer, name, value)
        yield
    finally:
        for name, value in before.items():
            object.__setattr__(layer, name, value)


def _intercept(
    call: Callable, args: tuple, kwargs: dict[str, Any], context: nn.module.InterceptorContext
) -> Any:
    if context.method_name != "__call__" or not isinstance(context.module, LINEN):
        return call(*args, **kwargs)
    with overridden(context.module, args, kwargs) as (new_args, new_kwargs):
        return call(*new_args, **new_kwargs)


def _hashable(value: Any) -> Any:
    return tuple(map(_hashable, value)) if isinstance(value, list | tuple) else value
