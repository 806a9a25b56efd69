"""Checks of banks: their names and number, and which one a call uses."""

import operator
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bnjax.core import compat
from bnjax.core.checks.collections import where
from bnjax.core.checks.numbers import INTEGER


def number_of_banks(banks: Any, *affine: Any) -> None:
    """Check the number of sets of statistics, and which affine maps they have."""
    integer = isinstance(banks, INTEGER) and not isinstance(banks, bool)
    if banks is not None and not (integer and banks >= 1):
        raise ValueError(
            f"`banks` must be the number of sets of statistics, an integer and at least 1, got "
            f"{banks!r}. None keeps one set without banks."
        )
    allowed = (True, False) if banks is None else (True, False, "own", "both")
    if wrong := [each for each in affine if each not in allowed]:
        raise ValueError(
            f"A scale and a bias are learned (True) or not (False), got {wrong[0]!r}. With "
            "`banks`, 'own' has one for each bank, and 'both' adds them."
        )


def bank_names(banks: Any, tracked: bool) -> None:
    """Check the number or the names of banks, and that they keep statistics."""
    if banks is None:
        return
    names = isinstance(banks, list | tuple) and all(isinstance(name, str) for name in banks)
    if not isinstance(banks, INTEGER) and not (names and banks and len({*banks}) == len(banks)):
        raise ValueError(
            "`banks` must be the number of sets of statistics or their names, all different, as in "
            f"banks=('clean', 'adversarial'), got {banks!r}."
        )
    if not tracked:
        raise ValueError(
            "`banks` are sets of running statistics, but track_running_stats=False keeps none."
        )


def no_bank(given: Any) -> None:
    """Check that no bank is passed to a layer without banks."""
    if given is not None:
        raise ValueError(
            f"The call has bank={given!r}, but the layer has no banks. Make it with "
            "banks=('source', 'target'), or leave `bank` out."
        )


def bank_by_name(given: Any, banks: int | Sequence[str]) -> Any:
    """A bank as a number, or as one for each example."""
    names = tuple(map(str, range(banks))) if isinstance(banks, int) else tuple(banks)
    if given is None:
        raise ValueError(
            f"The layer has the banks {list(names)}, and the call must say which one: pass `bank`, "
            'or write `with bnjax.bank("' + names[0] + '"):` around the call of the model.'
        )
    if isinstance(given, str):
        if given not in names:
            raise ValueError(f"There is no bank {given!r}; the banks are {list(names)}.")
        return names.index(given)
    return given


def bank(
    value: Any, batch_stats: Any, shape: tuple[int, ...], axes: tuple[int, ...], mask: Any
) -> tuple[Any, int | None]:
    """The bank of a call, as an int or an int32 array, and the number of banks.

    Examples that the mask leaves out may have any number.
    """
    mean = batch_stats.get("mean") if isinstance(batch_stats, Mapping) else None
    banks = len(mean) if mean is not None and jnp.ndim(mean) == len(axes) + 1 else None
    if value is None and banks is None:
        return None, None
    if value is None:
        raise ValueError(
            f"`batch_stats` keeps {banks} banks, so the call must say which one: pass `bank`, a "
            "number, or one for each example."
        )
    if banks is None:
        raise ValueError(
            f"`bank` chooses among several sets of statistics, got {value!r}, but `batch_stats` "
            "keeps one set, or none. Create it with bnjax.init(..., banks=2), or omit `bank`."
        )
    array = value if isinstance(value, jax.Array) else np.asarray(value)
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise TypeError(
            f"`bank` must be an integer or an array of integers, got {array.dtype}. Convert it "
            "first, as in `bank.astype(jnp.int32)`."
        )
    others = [size for axis, size in enumerate(shape) if axis not in axes]
    size = others[0] if others else 1
    if array.shape not in ((), (size,)):
        raise ValueError(
            f"`bank` must be one number, or one for each of the {size} examples, got shape "
            f"{array.shape}."
        )
    if not (compat.is_traced(array) or compat.is_traced(mask)):
        counted = True
        if mask is not None and array.ndim:
            batch = next(axis for axis in range(len(shape)) if axis not in axes)
            counted = np.any(mask, tuple(axis for axis in range(mask.ndim) if axis != batch))
        banks_exist(array, counted, banks)
    if array.shape == () and not isinstance(array, jax.Array):
        return int(array), banks
    return jnp.asarray(array, jnp.int32), banks


def banks_exist(bank: Any, counted: Any, banks: int) -> None:
    """Check that the banks of the examples that count are in range."""
    bank = np.asarray(bank)
    outside = counted & ((bank < 0) | (bank >= banks))
    wrong = sorted({*np.broadcast_to(bank, np.shape(outside))[outside].tolist()})
    if wrong:
        raise ValueError(f"`bank` must lie between 0 and {banks - 1}, got {wrong}.")


def no_banks_yet(ndim: int, path: str) -> None:
    """Check that a layer to which banks are added has a single set of statistics."""
    if ndim > 1:
        raise ValueError(
            f"The batch norm at {where([path])} has statistics with {ndim} axes: it has banks "
            "already, or several feature axes, or is stacked by nn.scan or vmap. Leave it out by "
            "`paths`."
        )


def one_bank(
    bank: Any,
    banks: int,
    names: Sequence[str] | None,
    named: Collection[tuple[str, ...]],
    path: str,
) -> int:
    """The number of a bank, given by number or name, in a batch norm with `banks` of them.

    Without `names`, look the name up among those that layers have used.
    """
    if not isinstance(bank, str):
        index = operator.index(bank)
        if not 0 <= index < banks:
            raise ValueError(
                f"`bank` must lie between 0 and {banks - 1}, the banks of the batch norm at "
                f"{where([path])}, got {index}."
            )
        return index
    if names is not None and bank not in names:
        raise ValueError(f"There is no bank {bank!r}; the banks are {list(names)}.")
    known = sorted(each for each in named if bank in each and len(each) == banks)
    found = {each.index(bank) for each in ([tuple(names)] if names is not None else known)}
    if len(found) != 1:
        why = f"several layers name theirs {known}" if known else "no layer names it"
        raise ValueError(
            f"Which bank is {bank!r}? Here {why}. Pass all names in their order, as in "
            f"banks=({bank!r}, 'other'), or the number of the bank."
        )
    return found.pop()


def axis_of_banks(shape: tuple[int, ...], banks: int | None, path: str) -> int | None:
    """The axis of the banks in statistics of this shape; None if there is none.

    Layers that are stacked, as by nn.scan, have other axes before it.
    """
    if len(shape) < 2 or banks is None:
        if len(shape) > 2:
            raise ValueError(
                f"Which axis are the banks of the batch norm at {where([path])}, which has "
                f"statistics of shape {shape}? Pass their number, as in banks={shape[-2]}."
            )
        return 0 if len(shape) == 2 else None
    found = [axis for axis, size in enumerate(shape[:-1]) if size == banks]
    return found[-1] if found else None


def some_banks(some: bool) -> None:
    """Check that variables from which to select a bank have any."""
    if not some:
        raise ValueError(
            "`variables` must have batch norms with banks, statistics of shape (K, C), but have "
            "none. bnjax.to_banks makes them."
        )
