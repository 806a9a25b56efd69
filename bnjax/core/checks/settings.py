"""Settings of a batch norm: momentum, eps, mode, devices, policies."""

import functools
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from bnjax.core import compat
from bnjax.core.checks.collections import where
from bnjax.core.checks.numbers import NUMBER

# Only frames of these packages lie between the caller's code and a warning.
_OURS = ("bnjax", "flax", "jax", "contextlib", "functools")


def _scalar(name: str, value: Any) -> Any:
    """A number, also from an array of shape (), which schedules return."""
    if np.ndim(value):
        raise ValueError(
            f"`{name}` must be one number, got an array of shape {np.shape(value)}. It is the same "
            "for all channels."
        )
    return value.item() if isinstance(value, np.ndarray) else value


def momentum(value: Any, *, cumulative: bool = True) -> None:
    """Check a momentum: a weight, traced or not, a schedule, "pooled", or None if `cumulative`."""
    if callable(value) or isinstance(value, str):
        if value != "pooled" and isinstance(value, str):
            raise ValueError(
                f"`momentum` must be a number, a function of the number of steps, None or "
                f"'pooled', got {value!r}."
            )
        return
    value = _scalar("momentum", value)
    if (value is None and cumulative) or isinstance(value, jax.Array):
        return
    if not isinstance(value, NUMBER) or not 0 <= value <= 1:
        raise ValueError(
            f"`momentum` must lie between 0 and 1, got {value!r}. In PyTorch's convention it is "
            "the weight of the new batch (0.1), in Flax's the weight of the old statistics (0.9)."
        )


def limit(name: str, value: Any, least: float) -> None:
    """Check a limit of batch renormalization; `least` is the one that makes it batch norm."""
    kinds = str | list | tuple | None
    if isinstance(value, kinds) or (isinstance(value, NUMBER) and not value >= least):
        raise ValueError(
            f"`{name}` must be a number, at least {least}, or a function of the number of steps, "
            f"got {value!r}. Renorm(r_max=1, d_max=0) is batch norm."
        )


def one_of(policy: str, **values: Any) -> None:
    """Check that exactly one of several numbers is given."""
    given = {name: value for name, value in values.items() if value is not None}
    if len(given) != 1:
        first, second = values
        raise ValueError(
            f"`{policy}` takes `{first}` or `{second}`, got {given or 'neither'}. Write "
            f"{policy}({first}=16), or {policy}({second}=0.1)."
        )


def not_negative(name: str, value: Any) -> None:
    """Check a number of examples."""
    if isinstance(value, str | list | tuple) or (isinstance(value, NUMBER) and not value >= 0):
        raise ValueError(f"`{name}` must be a number of examples and not negative, got {value!r}.")


def weight(name: str, value: Any) -> None:
    """Check the weight of a batch or an example."""
    wrong = isinstance(value, NUMBER) and not 0 <= value <= 1
    if wrong or isinstance(value, str | list | tuple | None):
        raise ValueError(f"`{name}` must lie between 0 and 1, got {value!r}.")


def policy(value: Any, kind: type) -> None:
    """Check that `using` is an instance of a policy, or None."""
    if value is not None and not isinstance(value, kind):
        repair = f"Write {value.__name__}()." if isinstance(value, type) else ""
        raise TypeError(
            f"`using` must be a policy, such as bnjax.policies.Renorm(), or None, got {value!r}. "
            f"{repair}".rstrip()
        )


def has_running(some: bool, policy: Any) -> None:
    """Check that a policy which uses running statistics has some."""
    if not some:
        raise ValueError(
            f"using={policy} needs running statistics, but none are kept. Keep them "
            "(track_running_stats=True), or leave `using` out."
        )


def has_count(some: bool, what: str) -> None:
    """Check that a setting which depends on the number of steps can read it."""
    if not some:
        raise ValueError(
            f"{what} depends on the number of training steps, but `batch_stats` has no `count`. "
            "bnjax.init with the same `momentum` and `using` makes it; in old statistics, add "
            '{"count": jnp.zeros((), jnp.int32)}.'
        )


def eps(value: Any, *, training: bool, name: str = "eps") -> None:
    """Check epsilon, which keeps the reciprocal of a zero variance finite."""
    value = _scalar(name, value)
    if isinstance(value, jax.Array):
        return
    if not isinstance(value, NUMBER) or not value >= 0:
        raise ValueError(
            f"`{name}` must be a number and not negative, got {value!r}. The usual value is 1e-5."
        )
    if training and value == 0:
        raise ValueError(
            f"`{name}` must be positive in training, got {value}: a channel of zero variance would "
            "give NaN. The usual value is 1e-5."
        )


def correction(value: Any) -> None:
    """Check the number subtracted from the count in the variance."""
    if isinstance(value, NUMBER) and not value >= 0:
        raise ValueError(
            f"`correction` must not be negative, got {value}. 1 gives PyTorch's unbiased running "
            "variance, 0 Flax's biased one."
        )


def num_features(value: Any) -> None:
    """Check the number of channels."""
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < 0:
        raise ValueError(
            f"`num_features` must be an integer and not negative, got {value!r}. It is the number "
            "of channels, such as 64."
        )


def devices(axis_name: str | Sequence[str] | None, groups: Sequence[Sequence[int]] | None) -> int:
    """The number of devices that pool their statistics: those of the axis, or of one group."""
    if axis_name is None:
        if groups is not None:
            raise ValueError(
                "`axis_index_groups` divides the axis `axis_name`, but that is None. Name the axis."
            )
        return 1
    names = (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)
    axis_name = names[0] if len(names) == 1 else names
    try:
        size = jax.lax.axis_size(names)
    except NameError as error:
        raise ValueError(
            f"`axis_name` is {axis_name!r}, but no such axis is mapped here ({error}). Name the "
            "axis of the pmap, shard_map or vmap around this call, or pass None under plain jit."
        ) from error
    if groups is None:
        return size
    sizes = {len(group) for group in groups}
    if sorted(i for group in groups for i in group) != list(range(size)) or len(sizes) != 1:
        raise ValueError(
            f"`axis_index_groups` must hold each index of the axis {axis_name!r} once, 0 to "
            f"{size - 1}, in groups of equal size, got {[list(group) for group in groups]}."
        )
    return sizes.pop()


def virtual_batch_size(size: int | None, groups: Sequence[Sequence[int]] | None) -> None:
    """Check the size of virtual batches, which exclude `axis_index_groups`."""
    if size is None:
        return
    if not isinstance(size, (int, np.integer)) or isinstance(size, bool) or size < 1:
        raise ValueError(
            f"`virtual_batch_size` must be an integer and at least 1, got {size!r}. None takes the "
            "whole batch."
        )
    if groups is not None:
        raise ValueError(
            "`virtual_batch_size` and `axis_index_groups` both divide the batch. Give one of them."
        )


def given_once(at_init: bool | None, at_call: bool | None) -> None:
    """Check that the mode is set only once."""
    if at_init is not None and at_call is not None:
        raise ValueError(
            "`use_running_average` was given to the constructor and to the call. Give it to one."
        )


def given(use_running_average: bool | None) -> None:
    """Check that the mode is set, since Flax's convention has no default."""
    if use_running_average is None:
        raise ValueError(
            "`use_running_average` was given neither to the constructor nor to the call. Pass "
            "use_running_average=False to train, True to evaluate; bnjax.BatchNorm2d needs neither."
        )


def plausible_momentum(value: Any, *, torch: bool) -> None:
    """Warn of a momentum that looks like the other convention's; 0.5 is the same in both."""
    if not isinstance(value, NUMBER) or (value <= 0.5 if torch else value >= 0.5):
        return
    weighs, convention, other = (
        ("new batch", "PyTorch", "Flax, Keras or Haiku")
        if torch
        else ("old statistics", "Flax", "PyTorch")
    )
    warn_once(
        f"momentum={value} gives the {weighs} a weight of {value} ({convention}'s convention): the "
        "running statistics are little more than those of the last batch. If it comes from "
        f"{other}, write momentum={round(1 - value, 10):g}."
    )


def overriding_momentum(value: Any, torch: bool) -> None:
    """Check an overriding momentum, in the layer's own convention."""
    momentum(value)
    if isinstance(value, NUMBER) and 0 < value < 1:  # 0 and 1 are deliberate
        plausible_momentum(value, torch=torch)


@functools.cache
def warn_once(message: str) -> None:
    """Warn at the line in the caller's own code that led here, however many frames up."""
    frame, level = sys._getframe(), 1
    while frame.f_back and frame.f_globals.get("__name__", "").split(".")[0] in _OURS:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def static(name: str, value: Any) -> None:
    """Check that a setting which selects the program to compile is not traced."""
    if compat.is_traced(value):
        raise TypeError(
            f"`{name}` must be a Python bool, got a traced value: it decides which program is "
            f"compiled. Make it static, as in jax.jit(f, static_argnames={name!r})."
        )


def mutable_statistics(mutable: bool, path: Sequence[str]) -> None:
    """Check that statistics are mutable in training, which updates them."""
    if not mutable:
        raise ValueError(
            f"The batch norm at {where(path)} was asked to train (use_running_average=False), but "
            "its `batch_stats` are immutable. To train, call `y, updates = model.apply(variables, "
            "x, mutable=['batch_stats'])`; to evaluate, pass use_running_average=True."
        )
