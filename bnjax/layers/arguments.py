"""Explain arguments that a layer does not take, and suggest the one that was probably meant."""

import functools
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from flax import errors, nnx

from bnjax._names import nearest
from bnjax.layers import conventions

_Call = TypeVar("_Call", bound=Callable[..., Any])
# Arguments of other libraries and of the other convention, and what they are called here.
_MEANT = {
    "eps": ("epsilon",),
    "epsilon": ("eps",),
    "decay": ("momentum",),
    "decay_rate": ("momentum",),
    "features": ("num_features",),
    "channels": ("num_features",),
    "num_channels": ("num_features",),
    "input_size": ("num_features",),
    "affine": ("use_scale", "use_bias"),
    "use_scale": ("affine",),
    "use_bias": ("affine",),
    "scale": ("use_scale", "affine"),
    "center": ("use_bias", "affine"),
    "create_scale": ("use_scale", "affine"),
    "create_offset": ("use_bias", "affine"),
    "channelwise_affine": ("use_scale", "use_bias", "affine"),
    "cross_replica_axis": ("axis_name",),
    "process_group": ("axis_name",),
    "data_format": ("axis",),
    "gamma_init": ("scale_init",),
    "beta_init": ("bias_init",),
}
_MODES = ("train", "training", "is_training", "deterministic", "inference")


def constructed(kind: type, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Check that a layer is created with arguments that its class takes."""
    signature = inspect.signature(kind.__init__)
    try:
        signature.bind(None, *args, **kwargs)
    except TypeError as error:
        known = [name for name in signature.parameters if name != "self"]
        if unknown := [name for name in kwargs if name not in known]:
            what = f" takes no argument `{unknown[0]}`. {_hint(kind, unknown[0], known)}"
        elif missing := re.search("missing a required.* argument: '(.*)'", str(error)):
            what = f" needs `{missing[1]}`, as in {kind.__name__}(64, rngs=nnx.Rngs(0))."
        else:
            what = f": {error}. It takes {', '.join(known)}."
        raise TypeError(f"{_public(kind)}{what}") from None


def checked(call: _Call, place: Callable[[Any], str]) -> _Call:
    """Wrap the call of a layer, to explain unknown arguments and missing variables."""
    known = inspect.signature(call).parameters

    @functools.wraps(call)
    def calling(self: Any, *args: Any, **kwargs: Any) -> Any:
        if unknown := kwargs.keys() - known:
            with conventions.naming(self, functools.partial(place, self)):
                _called(self, min(unknown), [name for name in known if name != "self"])
        try:
            return call(self, *args, **kwargs)
        except errors.CallCompactUnboundModuleError as error:
            if self.scope is not None:  # raised by a layer inside this one
                raise
            name = type(self).__name__
            raise TypeError(
                f"{name} is a linen layer and has no variables of its own: call it in a linen "
                "model, or as layer.apply(variables, x). In an nnx model, use "
                f"bnjax.nnx.{name}(num_features, rngs=rngs)."
            ) from error

    if not hasattr(call, "compact"):  # the tools recognize nnx calls by the function itself
        calling.__signature__ = inspect.signature(call)  # pyright: ignore[reportAttributeAccessIssue]
        del calling.__wrapped__
    return calling  # pyright: ignore[reportReturnType] - of the same signature


def _called(layer: Any, name: str, known: list[str]) -> None:
    kind = type(layer)
    if name not in _MODES:
        hint = _hint(kind, name, known)
    elif isinstance(layer, nnx.Module):
        hint = "Call model.train() or model.eval(), or pass " + _mode(name)
    elif conventions.is_torch(layer):
        hint = "It trains in model.apply(..., mutable=['batch_stats']); or pass " + _mode(name)
    else:
        hint = "Pass " + _mode(name)
    raise TypeError(f"A call of {kind.__name__} takes no argument `{name}`. {hint}")


def _mode(name: str) -> str:
    same = name in ("deterministic", "inference")
    return f"use_running_average={name if same else f'not {name}'}."


def _hint(kind: type, name: str, known: list[str]) -> str:
    if name == "rngs":
        return f"It is a linen layer; in nnx, use bnjax.nnx.{kind.__name__}."
    if name in _MODES and "use_running_average" in known:
        return f"Did you mean {_mode(name)[:-1]}?"
    meant = [each for each in _MEANT.get(name, ()) if each in known]
    close = nearest(name, known)
    found = meant or ([close] if close else [])
    if found:
        return f"Did you mean {' and '.join(f'`{each}`' for each in found)}?"
    return f"It takes {', '.join(each for each in known if each not in ('parent', 'name'))}."


def _public(kind: type) -> str:
    """The public name of a class."""
    room, _, file = kind.__module__.rpartition(".")
    return f"bnjax.{file}.{kind.__name__}" if room == "bnjax.layers" else kind.__name__
