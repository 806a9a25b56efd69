"""Intercept each call of a batch norm, in any linen or nnx model.

The intercepted call is that of the library's own code, inside anything a subclass wraps around it.
linen has interceptors for this; in nnx, each layer's `__call__` looks for active frames.
"""

import contextlib
import functools
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import chex
from flax import linen as nn
from flax import nnx
from flax.nnx import bridge

from bnjax.core import compat
from bnjax.core.policies import Policy
from bnjax.layers.conventions import as_written, is_torch
from bnjax.layers.modes import asked_to_train
from bnjax.models import checks
from bnjax.models.attributes import COLLECTION, PATH, path_of, variables_of
from bnjax.models.contexts import Frame, active, holding
from bnjax.models.conventions import (
    FROZEN,
    NNX,
    Frozen,
    Linen,
    facts,
    is_call,
    is_some_call,
    registered_class,
)
from bnjax.models.frames import Examples, Met, Settings, Visitor, Watch
from bnjax.models.registered import Bound
from bnjax.models.statistics import Path, is_layer, layers_of
from bnjax.models.visit import Visit


@contextlib.contextmanager
def visiting(
    norm: Callable[[Visit], Any],
    linear: Callable[[Any, Callable, tuple, dict[str, Any]], Any] | None = None,
    *,
    key: Hashable = None,
) -> Iterator[dict[str, str]]:
    """A context that passes each call of a batch norm to a visitor.

    Args:
        norm: takes a `Visit` and returns the output of the call.
        linear: takes layer, call, args and kwargs of each conv or dense layer, and returns the
            output.
        key: identifies this context in JAX's caches, which keep it alive; unique by default.

    Yields:
        Classes, by path, of unknown modules that keep a mean and a variance.
    """
    visitor = Visitor(norm, linear, object() if key is None else key)
    with applying(visitor) if key is not None else _applying_once(visitor):
        yield visitor.strangers


@contextlib.contextmanager
def counting(examples: chex.Array | None, bank: chex.Array | None = None) -> Iterator[None]:
    """A context that sets the mask and the banks of the examples for all batch norms.

    Args:
        examples: which of them count, bool (N,); None for all.
        bank: the bank of each, int32 (N,), or a single number, for layers with banks.
    """
    known = examples is not None or bank is not None
    with _applying_once(Examples(examples, bank)) if known else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def watching(step: chex.Array) -> Iterator[dict[str, Met]]:
    """A context for a training step that records, by path, how batch norms with statistics ran."""
    watch = Watch(step)
    with _applying_once(watch):
        yield watch.met


@contextlib.contextmanager
def applying(*frames: Frame, outermost: bool = False) -> Iterator[None]:
    """A context in which frames apply to the layers that are called."""
    with holding(*frames, outermost=outermost), nn.intercept_methods(_intercept):
        yield


@contextlib.contextmanager
def _applying_once(frame: Frame) -> Iterator[None]:
    """A context in which a frame applies that is not used again, so no trace of it is kept."""
    try:
        with applying(frame):
            yield
    finally:
        compat.forget(frame.key)


def listen_to(kind: type[nnx.Module]) -> None:
    """Make the library code that an nnx layer type runs check for active frames at each call.

    `nnx.tabulate` leaves copies of inherited methods in the classes it has seen, so patch them all.
    """
    for each in kind.__mro__:
        call = vars(each).get("__call__")
        if is_some_call(call):
            each.__call__ = _asking(call)


def mark(layer: nnx.Module, path: Path) -> None:
    """Record the path of a layer, and listen to its calls."""
    listen_to(type(layer))
    setattr(layer, PATH, "/".join(path))


def is_marked(layer: nnx.Module) -> bool:
    """Whether the path of a layer is recorded."""
    return hasattr(layer, PATH)


def unmark(layer: nnx.Module) -> None:
    """Forget the path of a layer."""
    if hasattr(layer, PATH):
        delattr(layer, PATH)


# The layer whose call is being handled: Flax intercepts once per frame, and only one handles it.
_met_now: ContextVar[Any] = ContextVar("bnjax.met_now", default=None)


def _intercept(
    call: Callable, args: tuple, kwargs: dict[str, Any], context: nn.module.InterceptorContext
) -> Any:
    layer, function = context.module, getattr(context.orig_method, "func", None)
    if is_call(layer, function):
        return _meet(layer, call, args, kwargs)
    y = call(*args, **kwargs)
    if context.method_name == "__call__":
        for path in _kept(layer):
            for frame in active():
                if path not in frame.known:  # including subclasses that do not call the known code
                    frame.strangers[path] = type(layer).__name__
    return y


def _kept(layer: nn.Module) -> list[str]:
    """The paths of the statistics that a module keeps, by itself or in an nnx module it wraps."""
    held = layer.variables.get(COLLECTION, {})
    inside = layers_of(held) if isinstance(layer, bridge.ToLinen) else [()] * is_layer(held)
    return ["/".join((*layer.path, *path)) for path in inside]


@functools.cache
def _asking(function: Callable) -> Callable:
    @functools.wraps(function)
    def asking(self: Any, *args: Any, **kwargs: Any) -> Any:
        call = functools.partial(function, self)
        return _meet(self, call, args, kwargs) if is_call(self, function) else call(*args, **kwargs)

    return asking


def _meet(layer: Any, call: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Pass the call of a layer to the innermost visitor."""
    # Frames apply to nnx layers with a recorded path, not to others that the user calls meanwhile.
    frames = active() if isinstance(layer, nn.Module) or hasattr(layer, PATH) else ()
    if _met_now.get() is layer or not (frames or isinstance(layer, Frozen)):
        return call(*args, **kwargs)
    visitor = next((each for each in reversed(frames) if isinstance(each, Visitor)), None)
    before = _met_now.set(layer)
    try:
        if isinstance(layer, Linen | NNX):
            for frame in frames:
                frame.known.add("/".join(path_of(layer)))
            visit = _visit(layer, call, frames, args, kwargs)
            return visit.run() if visitor is None else visitor.norm(visit)
        if visitor is None or visitor.linear is None:
            return call(*args, **kwargs)
        return visitor.linear(layer, call, args, kwargs)
    finally:
        _met_now.reset(before)


def _visit(
    layer: Any, call: Callable, frames: tuple[Frame, ...], args: tuple, kwargs: dict[str, Any]
) -> Visit:
    path = path_of(layer)
    fields = _fields(layer, path, frames)
    if registered_class(layer) is not None:
        bound = Bound(layer, checks.where(path), args, kwargs)
        source, x, given, mask, extra = bound.facts, bound.facts.x, None, bound.facts.mask, {}
    else:
        bound, source = None, layer
        x, given, mask, extra = _arguments(*args, **kwargs)
    checks.layer_has_fields(layer, source, fields, "/".join(path))
    if "momentum" in fields:
        checks.overriding_momentum(fields["momentum"], is_torch(source))
        kept = variables_of(layer).get(COLLECTION, {})
        checks.keeps_for_momentum(fields["momentum"], kept, "/".join(path))
    does = facts(layer, fields, source)
    running = does.running if given is None or "use_running_average" in fields else given
    if running is None and isinstance(layer, nn.Module) and does.by_mutability:
        running = layer.is_initializing() or not asked_to_train(layer, COLLECTION)
    visit = Visit(layer, path, does, x, mask, running, given, extra, call, fields, bound)
    for frame in frames:
        if isinstance(frame, Watch):
            frame.meet(visit)
            visit = visit.unmapped()
        if isinstance(frame, Examples):
            counted = None if running and does.tracked and not does.by_batch else frame.mask
            of = {"mask": counted} | ({} if frame.bank is None else {"bank": frame.bank})
            visit = visit.of(of)
    return visit


def _fields(layer: Any, path: Path, frames: tuple[Frame, ...]) -> dict[str, Any]:
    """The fields that are overridden in this call."""
    fields: dict[str, Any] = {}
    linen = isinstance(layer, nn.Module)
    watches = [frame for frame in frames if isinstance(frame, Watch)]
    for frame in frames:
        if isinstance(frame, Settings) and (not linen if frame.of_nnx else linen or watches):
            fields |= frame.meet("/".join(path))
    schedule = as_written(fields.get("momentum"), torch=is_torch(layer))
    if callable(schedule) and watches:
        fields["momentum"] = watches[-1].momentum(schedule)
    elif callable(schedule):
        count = variables_of(layer).get(COLLECTION, {}).get("count")
        fields["momentum"] = schedule(checks.step_of_schedule(count, path))
    fields |= _policy(layer, path, fields, watches)
    return {**fields, **FROZEN} if isinstance(layer, Frozen) else fields


def _policy(
    layer: Any, path: Path, fields: Mapping[str, Any], watches: Sequence[Watch]
) -> dict[str, Any]:
    """The overriding policy with schedules evaluated, unless the layer counts its own steps."""
    policy = fields.get("using")
    checks.policy(policy, Policy)
    if policy is None or not policy.counts or "count" in variables_of(layer).get(COLLECTION, {}):
        return {}
    step = watches[-1].step if watches else None
    return {"using": policy.at(checks.step_of_schedule(step, path, f"policy {policy}"))}


def _arguments(
    x: Any, use_running_average: bool | None = None, *, mask: Any = None, **extra: Any
) -> tuple[Any, bool | None, Any, dict[str, Any]]:
    """The call arguments of bnjax's and Flax's layers."""
    extra = {name: value for name, value in extra.items() if value is not None}
    return x, use_running_average, mask, extra
