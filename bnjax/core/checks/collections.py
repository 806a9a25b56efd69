"""The arrays of a batch norm: params and batch_stats, by name and shape."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from bnjax.core.repairs import COUNT, other_keys

_PARAMS = (("scale", "bias"), ("scale",), ("bias",), ())
_BANK_PARAMS = tuple(  # a shared scale or bias, and what each bank adds
    (*names, *(f"bank_{name}" for name in own))
    for names in _PARAMS
    for own in _PARAMS
    if {*own} <= {*names}
)
# Kept beside mean and variance if the momentum pools all values ever seen: their number, and the
# low-order digits of all three.
POOLED = ("values", "values_low", "mean_low", "var_low")
_BATCH_STATS = (
    ("mean", "var"),
    ("mean", "var", "count"),
    (),
    ("mean", "var", *POOLED),
    ("mean", "var", "count", *POOLED),
)


def trees(
    params: Any, batch_stats: Any, features: tuple[int, ...], momentum: Any, banks: int | None
) -> None:
    """Check the keys and shapes of `batch_norm`'s arguments."""
    _keys("params", params, _BANK_PARAMS if banks else _PARAMS)
    pools = isinstance(batch_stats, Mapping) and POOLED[0] in batch_stats
    _keys("batch_stats", batch_stats, _BATCH_STATS[3:] if pools else _BATCH_STATS[:3])
    if momentum is None and batch_stats and "count" not in batch_stats:
        _keys("batch_stats", batch_stats, _BATCH_STATS[1:2], COUNT)
    if isinstance(momentum, str) and momentum == "pooled" and batch_stats and not pools:
        repair = 'To pool all values, start with bnjax.init(..., momentum="pooled").'
        _keys("batch_stats", batch_stats, _BATCH_STATS[3:], repair)
    rows = () if banks is None else (banks,)
    own = {key: jnp.shape(value) == (*rows, *features) for key, value in params.items()}
    shared = {key: value for key, value in params.items() if not (banks and own[key])}
    shapes("params", shared, features)
    shapes("batch_stats", batch_stats, (*rows, *features), rows)


def _keys(
    name: str, value: Any, allowed: Sequence[tuple[str, ...]], repair: str | None = None
) -> None:
    """Check that a flat dict of arrays has exactly the keys of one of the allowed sets."""
    repair = repair or other_keys(name, value)
    if not isinstance(value, Mapping):
        raise TypeError(f"`{name}` must be a dict of arrays, got {type(value).__name__}. {repair}")
    if any(set(value) == set(keys) for keys in allowed):
        return
    nearest = min(allowed, key=lambda k: (abs(len(value) - len(k)), len(set(value) ^ set(k))))
    wrong = {"missing": set(nearest) - set(value), "unknown": set(value) - set(nearest)}
    found = [f"{what} {sorted(keys)}" for what, keys in wrong.items() if keys]
    sets = " or ".join("{" + ", ".join(keys) + "}" for keys in allowed)
    raise ValueError(
        f"`{name}` must have the keys {sets}, got {sorted(value)}: {' and '.join(found)}. {repair}"
    )


def shapes(
    name: str, value: Mapping[str, Any], expected: tuple[int, ...], rows: tuple[int, ...] = ()
) -> None:
    """Check that per-channel arrays have the `expected` shape, and a count the shape `rows`."""
    got = {key: jnp.shape(leaf) for key, leaf in value.items()}
    wrong = {key: n for key, n in got.items() if n != (rows if key == "count" else expected)}
    if wrong:
        raise ValueError(
            f"`{name}` must hold arrays of shape {expected}, one entry for each channel of the "
            f"input, got {wrong}. Was it made for another `num_features`, or is `axis` wrong?"
        )


def where(path: Sequence[str]) -> str:
    """A module path for messages."""
    return f"'{'/'.join(path)}'" if any(path) else "the top of the model"


def held(
    collection: str, given: Mapping[str, Any], expected: Collection[str], path: Sequence[str]
) -> None:
    """Check that a collection of a layer holds what the layer uses."""
    missing = sorted(set(expected) - set(given))
    if missing:
        repair = (
            "Pass the collection as `model.init` made it or training updated it, as in "
            "`model.apply({'params': params, 'batch_stats': batch_stats}, x)`."
        )
        raise ValueError(
            f"The batch norm at {where(path)} misses {missing} in `{collection}`: it has "
            f"{sorted(given) or 'none'}. {COUNT if missing == ['count'] else repair}"
        )


def present(names: Collection[str], held: Collection[str]) -> None:
    """Check that an nnx layer has the statistics that its settings require."""
    missing = sorted(set(names) - set(held))
    if missing:
        raise ValueError(
            f"The layer must have the statistics {sorted(names)}, but {missing} are gone, as after "
            "`nnx.pop(model, nnx.BatchStat)`. Put them back with `nnx.update(model, statistics)`."
        )
