"""Checks of models and their variables."""

import contextlib
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import errors, nnx
from flax import linen as nn

from bnjax._words import number_of
from bnjax.core.checks import where
from bnjax.globs import strangers

_MISFITS = (
    errors.ApplyScopeInvalidVariablesStructureError,
    errors.ApplyScopeInvalidVariablesTypeError,
    errors.ScopeCollectionNotFound,
    errors.ScopeParamNotFoundError,
    errors.ScopeParamShapeError,
    errors.ScopeVariableNotFoundError,
)


def flax_model(model: Any) -> None:
    """Require an instance of a Flax module."""
    if not isinstance(model, nn.Module | nnx.Module):
        raise TypeError(
            "`model` must be an instance of a flax.linen.Module or a flax.nnx.Module, got "
            f"{type(model).__name__}. {_instance(model)}"
        )


def _instance(model: Any) -> str:
    if isinstance(model, type) and issubclass(model, nn.Module | nnx.Module):
        return f"Create one: {model.__name__}(...)."
    return "Pass the model itself, not its variables or its apply."


def some_batch_norm(some: bool, unknown: Mapping[str, str] | None = None) -> None:
    """Require a model that calls a batch norm."""
    if not some:
        other = " If it has one of another class, register that with bnjax.register."
        but = f" {strangers(unknown)}." if unknown else other
        raise ValueError(f"`model` must call a batch norm of bnjax or Flax, but calls none.{but}")


def reachable(paths: Collection[Any], modules: Collection[Any], unknown: Mapping[str, str]) -> None:
    """Require that each of these layers is a module of an nnx model."""
    if missing := sorted("/".join(path) for path in {*paths} - {*modules}):
        why = f": {strangers(unknown)}" if unknown else ""
        raise ValueError(
            f"Batch norms must be modules of the nnx model, but {missing} are not{why}."
        )


def none_unknown(unknown: Mapping[str, str]) -> None:
    """Require that all modules that keep statistics are known."""
    if unknown:
        raise ValueError(
            f"{strangers(unknown)}. Until then, statistics over micro-batches can't be exact."
        )


def all_called(missing: Collection[str], unknown: Mapping[str, str]) -> None:
    """Require that all layers to measure were called."""
    found = []
    if silent := sorted(set(missing) - unknown.keys()):
        found.append(f"{silent} were not called: pass what enables them in `apply_kwargs`")
    if not_known := {path: kind for path, kind in unknown.items() if path in missing}:
        found.append(strangers(not_known))
    if found:
        raise ValueError(
            f"All batch norms that match `paths` must be measured, but {'; '.join(found)}. Or name "
            "only the others in `paths`."
        )


def nnx_state(variables: Any) -> None:
    """Require an `nnx.State`."""
    if not isinstance(variables, nnx.State):
        raise TypeError(
            "`variables` of an nnx model must be an nnx.State, such as `nnx.state(model)`, or None "
            f"for the model's own, got {type(variables).__name__}."
        )


def tree_fits(given: Mapping[str, Any], there: Mapping[str, Any], *, part: bool = False) -> None:
    """Require the paths and shapes of the model's variables; if `part`, of some of them."""
    common = sorted(given.keys() & there)
    wrong = {
        "missing": [] if part else sorted(there.keys() - given),
        "unknown": sorted(given.keys() - there),
        "of another shape": [
            f"{k} {given[k]} not {there[k]}" for k in common if given[k] != there[k]
        ],
    }
    if found := ", ".join(f"{what} {paths}" for what, paths in wrong.items() if paths):
        raise ValueError(f"`variables` do not fit the model: {found}. Are they another model's?")


def has_statistics(variables: Any) -> None:
    """Require variables with running statistics."""
    if not isinstance(variables, Mapping) or not variables.get("batch_stats"):
        got = sorted(variables) if isinstance(variables, Mapping) else type(variables).__name__
        raise ValueError(
            "`variables` must be a dict with the collection `batch_stats`, like those of any model "
            f"with batch norms, got {got}. Pass {{'params': params, 'batch_stats': batch_stats}}."
        )


def finite_statistics(bad: Mapping[str, int]) -> None:
    """Require a finite mean and variance in each channel."""
    if bad:
        layers = ", ".join(
            f"{path or where([])} ({number_of(count, 'channel')})"
            for path, count in sorted(bad.items())
        )
        raise ValueError(
            f"These layers saw no finite mean and variance: {layers}. Do the batches or parameters "
            "hold NaN or inf, or is a mask all False?"
        )


@contextlib.contextmanager
def variables_fit(variables: Any, call: tuple[tuple, dict[str, Any]]) -> Iterator[None]:
    """Explain errors from variables, inputs or arguments that do not fit the model."""
    args, kwargs = call
    x = args[0] if len(args) == 1 and not kwargs else (*args, *kwargs.values())
    if not isinstance(variables, Mapping):
        has_statistics(variables)
    try:
        yield
    except _MISFITS as error:
        has_statistics(variables)
        given = jax.tree.map(jnp.shape, x)
        raise ValueError(
            f"`variables` or an input of shape {given} do not fit the model: {error}"
            f"{_copies(variables)}"
        ) from error
    except TypeError as error:
        _missing(error, "Pass its evaluation arguments, as in `apply_kwargs={'train': False}`.")
        raise


@contextlib.contextmanager
def called_with(repair: str) -> Iterator[None]:
    """Explain errors of a call that lacks arguments."""
    try:
        yield
    except TypeError as error:
        _missing(error, repair)
        raise


def _missing(error: TypeError, repair: str) -> None:
    if re.match(r".*__call__\(\) (missing|got an unexpected keyword|takes)", str(error)):
        raise TypeError(
            f"The model is called with its inputs and `apply_kwargs`, but {error}. {repair}"
        ) from error


def _copies(variables: Any) -> str:
    """A hint, if all arrays have the same leading axis, as copies for `pmap` do."""
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(variables)]
    sizes = {shape[:1] for shape in shapes}
    # The scale and statistics of a batch norm have one axis, and by chance they may be as long.
    if len(sizes) != 1 or min(map(len, shapes)) < 2:
        return ""
    return (
        f" Each array has a leading axis of {sizes.pop()[0]}, as copies for `pmap` do: pass one, "
        "as in flax.jax_utils.unreplicate(variables)."
    )
