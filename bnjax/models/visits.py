"""One way to meet each call of a batch norm in a model, whoever wrote the model and the layer.

What is met is the call of the library's own code, below whatever a subclass wraps around it: by
Flax's interceptors in linen, and in nnx by a look at the frames that the layers' `__call__` takes.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import chex
import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx
from flax.core import meta

from bnjax.core.batch_norm import batch_norm
from bnjax.core.moments import working_dtype
from bnjax.core.policies import Policy
from bnjax.layers.conventions import bank_of, is_torch, rows
from bnjax.layers.modes import asked_to_train
from bnjax.models import checks
from bnjax.models.compat import is_mapped
from bnjax.models.contexts import Frame, active, holding
from bnjax.models.conventions import (
    FROZEN,
    NNX,
    OWN,
    Facts,
    Frozen,
    Linen,
    facts,
    is_call,
    is_some_call,
    registered_class,
)
from bnjax.models.frames import Examples, Met, Settings, Visitor, Watch
from bnjax.models.registered import Bound
from bnjax.models.statistics import Path, is_layer

_COLLECTION = "batch_stats"
_PATH = "_bnjax_path"
_AS_GIVEN: Any = object()


@dataclasses.dataclass
class Visit:
    """One call of a batch norm.

    Attributes:
        layer: the layer, of linen or nnx.
        path: where it is in the model.
        facts: what it does, under the settings that hold.
        x: its input.
        mask: as it was given; None if all positions count.
        running: whether it normalizes with its running statistics, as it was asked to; None if
            nobody said.
        given: what the call said of that.
        extra: what else it said: `bank`, `scale` and `bias`.
    """

    layer: Any
    path: Path
    facts: Facts
    x: Any
    mask: chex.Array | None
    running: bool | None
    given: bool | None
    extra: dict[str, Any]
    _call: Callable
    _fields: dict[str, Any]
    _bound: Bound | None  # of a layer whose class was registered

    def run(
        self,
        *,
        x: Any = _AS_GIVEN,
        running: bool | None = None,
        here: bool = False,
        plain: bool = False,
    ) -> jax.Array:
        """What the layer makes of the call.

        Args:
            x: another input.
            running: the mode, whatever the layer, the call and the settings say.
            here: pool over the axes alone that are mapped here, and no other devices.
            plain: without a policy, whatever the layer and the settings say.
        """
        fields, options = dict((self.unmapped() if here else self)._fields), dict(self.extra)
        x = self.x if x is _AS_GIVEN else x
        if plain and (isinstance(self.layer, OWN) or "using" in fields):
            fields["using"] = None
        if "using" in fields and not isinstance(self.layer, OWN):
            policy = fields.pop("using")
            if policy is not None and not checks.is_initializing(self.layer):
                return self._by_policy(policy, x, self.running if running is None else running)
        if self._bound is not None:
            mode = fields.pop("use_running_average", self.running)
            mode = mode if running is None else running
            masked = {} if mode else {"mask": self.mask}
            changed = self._bound.changed(x=x, use_running_average=mode, **masked, **fields)
            args, kwargs, fields = changed
            with setting(self.layer, **fields):
                return self._call(*args, **kwargs)
        if self.mask is not None:
            options["mask"] = self.mask
        forced = fields.pop("use_running_average", None)
        mode = forced if running is None else running
        if mode is None:
            options |= {} if self.given is None else {"use_running_average": self.given}
        elif isinstance(self.layer, nn.Module):
            fields["use_running_average"] = mode
        else:
            options["use_running_average"] = mode
        with setting(self.layer, **fields):
            if self.mask is None or isinstance(self.layer, OWN) or mode or self.running:
                return self._call(x, **options)
            # Without an example that counts, Flax's output and statistics would be NaN.
            some, before = jnp.any(self.mask), self.statistics
            y = self._call(x, **{**options, "mask": self.mask | ~some})
            self.put({k: jnp.where(some, new, before[k]) for k, new in self.statistics.items()})
            return y

    def _by_policy(self, policy: Policy, x: Any, running: bool | None) -> jax.Array:
        """What a layer of Flax's, or one that is registered, makes of the call with a policy."""
        dtype = jax.eval_shape(lambda: self.run(x=x, running=True, here=True, plain=True)).dtype
        stats = {name: self.statistics[name] for name in ("mean", "var")}
        settings = {"eps": self.facts.eps, "momentum": self.facts.momentum, "dtype": dtype}
        settings |= {"correction": self.facts.correction, "using": policy}
        visit = dataclasses.replace(self, x=x)
        y, moved = visit._core(self.parameters, stats, mutable=not running, **settings)
        if not running:
            self.put({name: moved[name].astype(stats[name].dtype) for name in stats})
        return y

    @property
    def parameters(self) -> dict[str, jax.Array]:
        """Scale and bias of the layer, those that it has."""
        return dict(meta.unbox(variables_of(self.layer).get("params", {})))

    @property
    def bank(self) -> Any:
        """The bank of the call, or those of its examples, by number; None without banks."""
        return bank_of(self.layer, self.extra.get("bank"))

    def of(self, batch: Mapping[str, Any]) -> "Visit":
        """The same call, in which examples count, and have banks, as a batch says."""
        visit = self.where(batch.get("mask"))
        if "bank" not in batch or self.facts.banks is None or "bank" in self.extra:
            return visit
        return dataclasses.replace(visit, extra={**visit.extra, "bank": batch["bank"]})

    def where(self, examples: chex.Array | None) -> "Visit":
        """The same call, of which these examples count: bool (N,), or None for all."""
        if examples is None:
            return self
        checks.has_examples(self.layer, jnp.shape(self.x), examples.size, "/".join(self.path))
        mask = examples.reshape(-1, *(1,) * (jnp.ndim(self.x) - 1))
        if self.mask is not None:
            mask = mask & jnp.asarray(self.mask, bool)
        return dataclasses.replace(self, mask=mask)

    def unmapped(self) -> "Visit":
        """The same call, pooled over the axes alone that are mapped here."""
        if self.devices[0] == self.facts.axis_name:
            return self
        names = dict(zip(("axis_name", "axis_index_groups"), self.devices, strict=True))
        return dataclasses.replace(self, _fields=self._fields | names)

    @property
    def frozen(self) -> bool:
        """Whether it uses its running statistics whatever the call says."""
        fixed = self.facts.by_mutability and self.facts.running
        return bool(self._fields.get("use_running_average") or fixed)

    @property
    def told(self) -> bool:
        """Whether a context says what mode it is in."""
        return "use_running_average" in self._fields

    @property
    def statistics(self) -> dict[str, chex.Array]:
        """What the layer keeps in `batch_stats`, by name."""
        return dict(variables_of(self.layer).get(_COLLECTION, {}))

    def put(self, values: Mapping[str, chex.Array]) -> None:
        """Write statistics of the layer."""
        for name, value in values.items():
            if isinstance(self.layer, nn.Module):
                self.layer.put_variable(_COLLECTION, name, value)
            else:
                getattr(self.layer, name)[...] = value

    @property
    def devices(self) -> tuple[Any, Any]:
        """`axis_name` and `axis_index_groups`, of the axes that are mapped here."""
        names = self.facts.axis_name
        names = () if names is None else (names,) if isinstance(names, str) else tuple(names)
        here = tuple(name for name in names if is_mapped(name))
        if here == names:
            return self.facts.axis_name, self.facts.axis_index_groups
        return here or None, None

    def seen(self) -> dict[str, jax.Array]:
        """`mean` and `var` of this call as the running ones take them in; NaN where there is none.

        They are those of the batch, with the layer's mask, correction, axes and virtual batches.
        """
        shape = [*rows(self.facts), *(jnp.shape(self.x)[axis] for axis in self.axes)]
        none = jnp.full(shape, -1, working_dtype(jnp.result_type(self.x)))
        stats = {"mean": none, "var": jnp.real(none)}
        found = self._core({}, stats, momentum=1.0, correction=self.facts.correction)[1]
        # A channel without finite statistics keeps the variance that none can have.
        return {name: jnp.where(found["var"] < 0, jnp.nan, found[name]) for name in found}

    def by_batch(self) -> jax.Array:
        """The input normalized by the batch, as in training, where nothing may be written."""
        dtype = jax.eval_shape(lambda: self.run(running=True, here=True)).dtype
        stats = {name: self.statistics[name] for name in ("mean", "var") if self.facts.banks}
        return self._core(self.parameters, stats, eps=self.facts.eps, dtype=dtype)[0]

    @property
    def axes(self) -> tuple[int, ...]:
        """The feature axes of x."""
        return checks.feature_axes(self.facts.axis, jnp.ndim(self.x))

    def _core(self, params: Any, stats: Any, **settings: Any) -> tuple[jax.Array, dict[str, Any]]:
        axis_name, groups = self.devices
        extra = {**self.extra, "bank": self.bank} if params else {"bank": self.bank}
        return batch_norm(
            params,
            stats,
            self.x,
            axis=self.axes,
            mask=None if self.mask is None else jnp.asarray(self.mask, bool),
            axis_name=axis_name,
            axis_index_groups=groups,
            virtual_batch_size=self.facts.virtual_batch_size,
            **{"mutable": True, **extra, **settings},
        )


@contextlib.contextmanager
def visiting(
    norm: Callable[[Visit], Any],
    linear: Callable[[Any, Callable, tuple, dict[str, Any]], Any] | None = None,
    *,
    key: Hashable = None,
) -> Iterator[dict[str, str]]:
    """A context in which each call of a batch norm is a visit.

    Args:
        norm: gets the visit, and returns what the caller shall get.
        linear: gets layer, call, args and kwargs of each conv or dense layer, alike.
        key: tells this context from others for JAX, which keeps it. The default is unlike any.

    Yields:
        The classes, by path, of modules that keep a mean and a variance, and are not known.
    """
    visitor = Visitor(norm, linear, object() if key is None else key)
    with applying(visitor):
        yield visitor.strangers


@contextlib.contextmanager
def counting(examples: chex.Array | None, bank: chex.Array | None = None) -> Iterator[None]:
    """A context in which batch norms know of the examples.

    Args:
        examples: which count, bool (N,); None for all.
        bank: the bank of each, int32 (N,), or one number, for layers with banks.
    """
    known = examples is not None or bank is not None
    with applying(Examples(examples, bank)) if known else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def watching(step: chex.Array) -> Iterator[dict[str, Met]]:
    """A context of a training step, with what batch norms that keep statistics do, by path."""
    watch = Watch(step)
    with applying(watch):
        yield watch.met


@contextlib.contextmanager
def applying(*frames: Frame, outermost: bool = False) -> Iterator[None]:
    """A context in which frames hold for the layers that are called."""
    with holding(*frames, outermost=outermost), nn.intercept_methods(_intercept):
        yield


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


def listen_to(kind: type[nnx.Module]) -> None:
    """Let the library code that layers of an nnx type run ask what holds at each of its calls.

    `nnx.tabulate` leaves a copy of an inherited method in each class that it has seen.
    """
    for each in kind.__mro__:
        call = vars(each).get("__call__")
        if is_some_call(call):
            each.__call__ = _asking(call)


def path_of(layer: Any) -> Path:
    """The path of a layer in its model; of an nnx layer as `mark` has noted it."""
    if isinstance(layer, nn.Module):
        return layer.path
    path = getattr(layer, _PATH, "")
    return tuple(path.split("/")) if path else ()


def mark(layer: nnx.Module, path: Path) -> None:
    """Note the path of a layer, and listen to it."""
    listen_to(type(layer))
    setattr(layer, _PATH, "/".join(path))


def is_marked(layer: nnx.Module) -> bool:
    """Whether the path of a layer is noted."""
    return hasattr(layer, _PATH)


def unmark(layer: nnx.Module) -> None:
    """Forget the path of a layer."""
    if hasattr(layer, _PATH):
        delattr(layer, _PATH)


def variables_of(layer: Any) -> Mapping[str, Mapping[str, Any]]:
    """The variables of a layer by collection and name."""
    if isinstance(layer, nn.Module):
        return layer.variables
    found: dict[str, dict[str, Any]] = {"params": {}, _COLLECTION: {}}
    for name, leaf in vars(layer).items():
        if isinstance(leaf, nnx.Param | nnx.BatchStat):
            found["params" if isinstance(leaf, nnx.Param) else _COLLECTION][name] = leaf[...]
    return found


# The layer whose call is being met: Flax asks once for each frame, and one meets it for all.
_met_now: ContextVar[Any] = ContextVar("bnjax.met_now", default=None)


def _intercept(
    call: Callable, args: tuple, kwargs: dict[str, Any], context: nn.module.InterceptorContext
) -> Any:
    layer, function = context.module, getattr(context.orig_method, "func", None)
    if is_call(layer, function):
        return _meet(layer, call, args, kwargs)
    y = call(*args, **kwargs)
    if context.method_name == "__call__" and is_layer(layer.variables.get(_COLLECTION, {})):
        path = "/".join(layer.path)
        for frame in active():
            if path not in frame.known:  # a subclass that does not call the known code, too
                frame.strangers[path] = type(layer).__name__
    return y


@functools.cache
def _asking(function: Callable) -> Callable:
    @functools.wraps(function)
    def asking(self: Any, *args: Any, **kwargs: Any) -> Any:
        call = functools.partial(function, self)
        return _meet(self, call, args, kwargs) if is_call(self, function) else call(*args, **kwargs)

    return asking


def _meet(layer: Any, call: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Bring the call of a layer to the innermost visitor."""
    # What holds is for copies that have their paths, not for what a user calls beside.
    frames = active() if isinstance(layer, nn.Module) or hasattr(layer, _PATH) else ()
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
        told, x, given, mask, extra = bound.facts, bound.facts.x, None, bound.facts.mask, {}
    else:
        bound, told = None, layer
        x, given, mask, extra = _arguments(*args, **kwargs)
    checks.layer_has_fields(layer, told, fields, "/".join(path))
    if "momentum" in fields:
        checks.overriding_momentum(fields["momentum"], is_torch(told))
    does = facts(layer, fields, told)
    running = does.running if given is None or "use_running_average" in fields else given
    if running is None and isinstance(layer, nn.Module) and does.by_mutability:
        running = layer.is_initializing() or not asked_to_train(layer, _COLLECTION)
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
    """The fields that the layer has in this call, instead of its own."""
    fields: dict[str, Any] = {}
    linen = isinstance(layer, nn.Module)
    watches = [frame for frame in frames if isinstance(frame, Watch)]
    for frame in frames:
        if isinstance(frame, Settings) and (not linen if frame.of_nnx else linen or watches):
            fields |= frame.meet("/".join(path))
    schedule = fields.get("momentum")
    if callable(schedule) and watches:
        fields["momentum"] = watches[-1].momentum(schedule)
    elif callable(schedule):
        count = variables_of(layer).get(_COLLECTION, {}).get("count")
        fields["momentum"] = schedule(checks.step_of_schedule(count, path))
    fields |= _policy(layer, path, fields, watches)
    return {**fields, **FROZEN} if isinstance(layer, Frozen) else fields


def _policy(
    layer: Any, path: Path, fields: Mapping[str, Any], watches: Sequence[Watch]
) -> dict[str, Any]:
    """The policy of an override in numbers, unless the layer counts its steps by itself."""
    policy = fields.get("using")
    checks.policy(policy, Policy)
    if policy is None or not policy.counts or "count" in variables_of(layer).get(_COLLECTION, {}):
        return {}
    step = watches[-1].step if watches else None
    return {"using": policy.at(checks.step_of_schedule(step, path, f"policy {policy}"))}


def _arguments(
    x: Any, use_running_average: bool | None = None, *, mask: Any = None, **extra: Any
) -> tuple[Any, bool | None, Any, dict[str, Any]]:
    """What the layers of bnjax and Flax are called with."""
    extra = {name: value for name, value in extra.items() if value is not None}
    return x, use_running_average, mask, extra
