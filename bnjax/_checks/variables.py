"""Parameters and statistics: keys, shapes, collections."""

import contextlib
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import errors, nnx

_MISFITS = (
    errors.ApplyScopeInvalidVariablesStructureError,
    errors.ApplyScopeInvalidVariablesTypeError,
    errors.ScopeCollectionNotFound,
    errors.ScopeParamNotFoundError,
    errors.ScopeParamShapeError,
    errors.ScopeVariableNotFoundError,
)


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


def nnx_state(variables: Any) -> None:
    """The variables of an nnx model are a state."""
    if not isinstance(variables, nnx.State):
        raise TypeError(
            "`variables` of an nnx model must be an nnx.State, as `nnx.state(model)` gives it, or "
            f"None for those that the model has, got {type(variables).__name__}."
        )


def tree_fits(given: Mapping[str, Any], there: Mapping[str, Any], *, part: bool = False) -> None:
    """Shapes by path are those of the model, or some of them."""
    missing = [] if part else sorted(there.keys() - given)
    unknown = sorted(given.keys() - there)
    common = sorted(given.keys() & there)
    shapes = [f"{k} {given[k]} not {there[k]}" for k in common if given[k] != there[k]]
    found = {"missing": missing, "unknown": unknown, "of another shape": shapes}
    if any(found.values()):
        what = ", ".join(f"{what} {paths}" for what, paths in found.items() if paths)
        raise ValueError(f"`variables` do not fit the model: {what}. Are they of another model?")


def has_statistics(variables: Any) -> None:
    """A tool for running statistics needs some."""
    if not isinstance(variables, Mapping) or not variables.get("batch_stats"):
        got = sorted(variables) if isinstance(variables, Mapping) else type(variables).__name__
        raise ValueError(
            "`variables` must be a dict with the collection `batch_stats`, as a model with batch "
            f"norms has it, got {got}."
        )


def finite_statistics(bad: Mapping[str, int]) -> None:
    """Data give each channel a finite mean and variance."""
    if bad:
        layers = ", ".join(f"{path} ({count} channels)" for path, count in sorted(bad.items()))
        raise ValueError(
            f"These layers saw no finite mean and variance: {layers}. Is there NaN or inf in the "
            "batches or the parameters, or a mask without True?"
        )


@contextlib.contextmanager
def variables_fit(variables: Any, x: Any) -> Iterator[None]:
    """Variables and input are those of the model, which is called with all that it takes."""
    if not isinstance(variables, Mapping):
        has_statistics(variables)
    try:
        yield
    except _MISFITS as error:
        has_statistics(variables)
        given = jax.tree.map(jnp.shape, x)
        raise ValueError(
            f"`variables` do not fit the model, or the model an input of shape {given}: {error}"
        ) from error
    except TypeError as error:
        if re.match(r".*__call__\(\) (missing|got an unexpected keyword)", str(error)) is None:
            raise
        raise TypeError(
            f"The model is called with an input and with `apply_kwargs`, but {error}. Give what it "
            "evaluates with, as in `apply_kwargs={'train': False}`."
        ) from error
