"""Parameters and statistics: keys, shapes, collections."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax.numpy as jnp

_PARAMS = (("scale", "bias"), ("scale",), ("bias",), ())
_BATCH_STATS = (("mean", "var"), ("mean", "var", "count"), ())


def trees(params: Any, batch_stats: Any, features: tuple[int, ...], momentum: Any) -> None:
    """What `batch_norm` is given has the keys and shapes that it needs."""
    repair = "bnjax.init makes it."
    tree("params", params, _PARAMS, repair)
    tree("batch_stats", batch_stats, _BATCH_STATS, repair)
    if momentum is None and batch_stats:
        repair = "The cumulative average needs the count: bnjax.init(..., momentum=None)."
        tree("batch_stats", batch_stats, _BATCH_STATS[1:2], repair)
    shapes("params", params, features)
    shapes("batch_stats", batch_stats, features)


def tree(name: str, value: Any, allowed: Sequence[tuple[str, ...]], repair: str) -> None:
    """A flat dict of arrays has exactly the keys of one of the allowed sets."""
    if not isinstance(value, Mapping):
        raise TypeError(f"`{name}` must be a dict of arrays, got {type(value).__name__}. {repair}")
    if any(set(value) == set(keys) for keys in allowed):
        return
    nearest = min(allowed, key=lambda k: (abs(len(value) - len(k)), len(set(value) ^ set(k))))
    missing, unknown = sorted(set(nearest) - set(value)), sorted(set(value) - set(nearest))
    found = [
        f"{what} {keys}" for what, keys in (("missing", missing), ("unknown", unknown)) if keys
    ]
    sets = " or ".join("{" + ", ".join(keys) + "}" for keys in allowed)
    raise ValueError(
        f"`{name}` must have the keys {sets}, got {sorted(value)}: {' and '.join(found)}. {repair}"
    )


def shapes(name: str, value: Mapping[str, Any], expected: tuple[int, ...]) -> None:
    """All per-channel arrays of a tree have the shape of the channels."""
    wrong = {
        key: jnp.shape(leaf)
        for key, leaf in value.items()
        if jnp.shape(leaf) != (() if key == "count" else expected)
    }
    if wrong:
        raise ValueError(
            f"`{name}` must hold arrays of shape {expected}, one entry for each channel of the "
            f"input, got {wrong}. Was it made for another `num_features`, or is `axis` wrong?"
        )


def where(path: Sequence[str]) -> str:
    """A module path as the user would write it."""
    return f"'{'/'.join(path)}'" if any(path) else "the top of the model"


def mutable_statistics(mutable: bool, path: Sequence[str]) -> None:
    """Training moves the statistics, so they must be mutable."""
    if not mutable:
        raise ValueError(
            f"The batch norm at {where(path)} was asked to train (use_running_average=False), but "
            "its `batch_stats` are immutable. To train, call `y, updates = model.apply(variables, "
            "x, mutable=['batch_stats'])`; to evaluate, pass use_running_average=True."
        )


def held(
    collection: str, given: Mapping[str, Any], expected: Collection[str], path: Sequence[str]
) -> None:
    """A collection of a layer holds what the layer is about to use."""
    missing = sorted(set(expected) - set(given))
    if missing:
        raise ValueError(
            f"The batch norm at {where(path)} misses {missing} in `{collection}`: it has "
            f"{sorted(given) or 'none'}. Pass the collection as `model.init` made it or training "
            "updated it, as in `model.apply({'params': params, 'batch_stats': batch_stats}, x)`."
        )


def present(names: Collection[str], held: Collection[str]) -> None:
    """An nnx layer has the statistics that its settings call for."""
    missing = sorted(set(names) - set(held))
    if missing:
        raise ValueError(
            f"The layer must have the statistics {sorted(names)}, but {missing} are gone, as after "
            "`nnx.pop(model, nnx.BatchStat)`. Put them back with `nnx.update(model, statistics)`."
        )
