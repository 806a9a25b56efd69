"""Batch norm classes other than bnjax's and Flax's: how to read their fields and calls."""

import dataclasses
import inspect
import types
from collections.abc import Mapping
from typing import Any, cast

from flax import linen as nn
from flax import nnx

from bnjax.models.conventions import NNX, Linen, is_rewritten, know, registered_class

# The settings of a batch norm by their names in `flax.linen.BatchNorm`, with defaults.
_DEFAULTS = {
    "axis": -1,
    "epsilon": 1e-5,
    "mask": None,
    "axis_name": None,
    "axis_index_groups": None,
    "use_scale": True,
    "use_bias": True,
}
_NEEDED = ("use_running_average", "momentum")
_FACTS = ("x", *_NEEDED, *_DEFAULTS)
_readings: dict[type, "_Reading"] = {}


def register(kind: type, facts: Mapping[str, Any] = types.MappingProxyType({})) -> None:
    """Register a batch norm class, so that the tools treat it like Flax's own.

    The tools know bnjax's and Flax's layers and their subclasses. Register any other class, such as
    a copy of Flax's layer, and `override`, `freeze`, `recalibrate`, `fold`, `diagnose` and
    micro-batches work on it, too.

    The layer must return its normalized input, alone or first in a tuple; keep `mean` and `var` in
    the collection `batch_stats` (in nnx, as `nnx.BatchStat`); and in training update them to
    `momentum * old + (1 - momentum) * batch`, with the biased variance.

    Guide: examples/guides/other_models.md

    Args:
        kind: a subclass of `flax.linen.Module` or `flax.nnx.Module`. Its subclasses are registered
            with it.
        facts: where to find each setting, by its name in `flax.linen.BatchNorm`: `"x"`, the input;
            `"use_running_average"`; `"momentum"`, the weight of the old statistics; `"epsilon"`,
            `"axis"`, `"mask"`, `"axis_name"`, `"axis_index_groups"`, `"use_scale"` and
            `"use_bias"`. Each is

            - a string: the name of a call argument or, failing that, of a field, such as
              `"is_training"` or `"config.epsilon"`; prefix it with `"not "` to negate it;
            - a function of the layer and a dict of its call arguments; or
            - the value itself.

            A setting that you leave out is looked up under its own name (the input is the first
            argument), and defaults to that of `flax.linen.BatchNorm`. A copy of that class needs no
            facts.

    Raises:
        TypeError: `kind` is not a module class, or a fact has an unknown name.
        ValueError: `kind` inherits from a known class; a fact names an argument or a field that
            `kind` does not have; or its mode or momentum can't be found.

    >>> import jax, jax.numpy as jnp, bnjax
    >>> class Norm(nn.Module):
    ...     decay: float = 0.9
    ...     @nn.compact
    ...     def __call__(self, x, train):
    ...         new = lambda name: self.variable("batch_stats", name, jnp.zeros, x.shape[-1])
    ...         kept = [new("mean"), new("var")]
    ...         used = [x.mean(0), x.var(0)] if train else [each.value for each in kept]
    ...         for old, new in zip(kept, used) if train else ():
    ...             old.value = self.decay * old.value + (1 - self.decay) * new
    ...         return (x - used[0]) / jnp.sqrt(used[1] + 1e-5)
    >>> register(Norm, {"use_running_average": "not train", "momentum": "decay"})
    >>> x = jax.random.normal(jax.random.key(0), (64, 3)) + 5
    >>> variables = Norm().init(jax.random.key(1), x, train=False)
    >>> new = bnjax.recalibrate(Norm(), variables, [x], apply_kwargs={"train": False})
    >>> bool(jnp.allclose(new["batch_stats"]["mean"], x.mean(0)))
    True
    """
    if not (isinstance(kind, type) and issubclass(kind, nn.Module | nnx.Module)):
        own = isinstance(kind, nn.Module | nnx.Module)
        repair = f" Pass its class, {type(kind).__name__}." if own else ""
        raise TypeError(f"`kind` must be a class of linen or nnx modules, got {kind!r}.{repair}")
    if issubclass(kind, Linen | NNX) and kind not in _readings and not is_rewritten(kind):
        raise ValueError(
            f"`kind` must be an unknown class, but {kind.__name__} inherits from a known one. It "
            "needs no registration."
        )
    if unknown := [name for name in facts if name not in _FACTS]:
        raise TypeError(
            f"`facts` must use the names of flax.linen.BatchNorm, {', '.join(_FACTS)}, got "
            f"{unknown}."
        )
    reading = _Reading(kind, inspect.signature(inspect.unwrap(kind.__call__)), dict(facts))
    if len(reading.signature.parameters) < 2:
        raise ValueError(f"`kind` must be called with an input, but {kind.__name__} takes none.")
    for name in _FACTS:
        reading.check(name)
    _readings[kind] = reading
    know(kind)


@dataclasses.dataclass(frozen=True)
class _Reading:
    """Where to find the facts of a registered class."""

    kind: type
    signature: inspect.Signature
    facts: Mapping[str, Any]

    def where(self, name: str) -> Any:
        """Where to find a fact: the name of an argument or field, a function, or the value."""
        return self.facts.get(name, [*self.signature.parameters][1] if name == "x" else name)

    def check(self, name: str) -> None:
        """Check that a fact's argument or field exists, as far as the class shows."""
        where, arguments = self.where(name), [*self.signature.parameters][1:]
        needed = name in self.facts or name in _NEEDED
        if not needed or not isinstance(where, str) or issubclass(self.kind, nnx.Module):
            return
        fields = [each.name for each in dataclasses.fields(self.kind)]
        fields = [each for each in fields if each not in ("parent", "name")]
        if where.removeprefix("not ").split(".")[0] not in {*arguments, *fields, *dir(self.kind)}:
            raise ValueError(
                f"{self.kind.__name__} has no argument {where!r}, only {arguments}, and no such "
                f"field, only {fields}. Say where its {name} is: "
                f'bnjax.register({self.kind.__name__}, {{"{name}": ...}}).'
            )


class Bound:
    """A call of a layer whose class is registered.

    Attributes:
        facts: the settings in this call, by their names in `flax.linen.BatchNorm`.
    """

    def __init__(self, layer: Any, where: str, args: tuple, kwargs: Mapping[str, Any]) -> None:
        self._layer, self._where = layer, where
        self._reading = _readings[cast(type, registered_class(layer))]
        self._bound = self._reading.signature.bind(layer, *args, **kwargs)
        self._bound.apply_defaults()
        self.facts = types.SimpleNamespace(**{name: self._get(name) for name in _FACTS})

    def changed(self, **changes: Any) -> tuple[tuple, dict[str, Any], dict[str, Any]]:
        """Arguments of the call and fields of the layer that change these facts."""
        arguments, fields = dict(self._bound.arguments), {}
        for name, value in changes.items():
            where = self._reading.where(name)
            if value is getattr(self.facts, name):
                continue
            plain = where.removeprefix("not ") if isinstance(where, str) else "."
            if "." in plain or not (plain in arguments or hasattr(self._layer, plain)):
                raise ValueError(
                    f"To change the {name} of the {type(self._layer).__name__} at {self._where}, "
                    "bnjax.register needs the name of an argument or a field that sets it, got "
                    f"{where!r}."
                )
            value = value if plain == where else not value
            # Where both exist, Flax requires one to be None.
            in_call = arguments.get(plain) is not None or getattr(self._layer, plain, None) is None
            (arguments if plain in arguments and in_call else fields)[plain] = value
        bound = inspect.BoundArguments(self._reading.signature, arguments)
        return bound.args[1:], bound.kwargs, fields

    def _get(self, name: str) -> Any:
        where = self._reading.where(name)
        if callable(where):
            return where(self._layer, dict(self._bound.arguments))
        if not isinstance(where, str):
            return where
        first, *rest = where.removeprefix("not ").split(".")
        found = self._bound.arguments.get(first)
        found = getattr(self._layer, first, None) if found is None else found
        for part in rest:
            found = getattr(found, part)
        if found is None and (name == "momentum" or name in self._reading.facts):
            raise ValueError(
                f"The {type(self._layer).__name__} at {self._where} has neither a call argument "
                f"nor a field {where!r}. Say where its {name} is: "
                f'bnjax.register({self._reading.kind.__name__}, {{"{name}": ...}}).'
            )
        if found is None:
            return _DEFAULTS.get(name)
        return not found if where.startswith("not ") else found
