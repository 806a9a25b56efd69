"""What a tool around a model is given: variables, batches, the model itself."""

import contextlib
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import errors, nnx
from flax import linen as nn

from bnjax.core.checks import feature_axes as feature_axes
from bnjax.core.checks import given as given
from bnjax.core.checks import mask as mask
from bnjax.core.checks import overriding_momentum as overriding_momentum
from bnjax.core.checks import shapes as shapes
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


def divides(size: int, devices: int, microbatches: int) -> None:
    """A training batch is cut into equal parts."""
    if size % (devices * microbatches):
        raise ValueError(
            f"A training batch must divide by the {devices} devices of the mesh (of this process) "
            f"times {microbatches} micro-batches, got {size} examples. Drop the last partial batch."
        )


def number_of_calls(counted: Any, path: str) -> int:
    """Moments are kept for each call of a layer, so their number must be known."""
    try:
        return int(np.max(np.asarray(counted), initial=1))
    except jax.errors.TracerArrayConversionError as error:
        raise ValueError(
            f"How often `{path}` is called depends on the data, so there are no exact statistics "
            "over micro-batches. Train with microbatches=1."
        ) from error


def poolable(layer: Any, statistics: Collection[str], path: str) -> None:
    """Moments are all that the layer keeps, and how they are pooled is known."""
    if others := sorted({*statistics} - {"mean", "var", "count"}):
        raise ValueError(
            f"Beside its mean and variance the {type(layer).__name__} at {where([path])} keeps "
            f"{others}, of which it is not known what they are after micro-batches. Train with "
            "microbatches=1."
        )


def known_fields(fields: Mapping[str, Any], known: set[str]) -> None:
    """An override names fields that batch norm layers have."""
    unknown = sorted(set(fields) - known)
    if unknown or not fields:
        raise TypeError(
            f"An override takes fields of batch norm layers, {sorted(known)}, got {unknown}."
        )


def layer_has_fields(layer: Any, told: Any, fields: Mapping[str, Any], path: str) -> None:
    """The layer that is overridden has the field: the conventions differ in some names."""
    missing = sorted(name for name in fields if not hasattr(told, name))
    if missing:
        raise TypeError(
            f"The {type(layer).__name__} at {where([path])} has no field {missing}. "
            "PyTorch's convention has `eps` and `affine` where Flax's has `epsilon`, `use_scale` "
            "and `use_bias`."
        )


def several_batches(batches: Any) -> None:
    """Batches are in a list or come from an iterator."""
    if isinstance(batches, Mapping) or hasattr(batches, "shape"):
        shape = getattr(batches, "shape", None)
        got = "a dict" if shape is None else f"an array of shape {tuple(shape)}"
        raise TypeError(
            f"`batches` must be a list or an iterator of batches, got {got}: write [x]."
        )


def some_batch(some: bool | float, what: str = "batch") -> None:
    """An iterator of batches is not empty, or some of its examples count."""
    if not some:
        raise ValueError(
            f"`batches` must hold at least one {what}, got none. An iterator that was used before "
            "is empty: pass a list, or make it anew."
        )


def iterable_again(batches: Any) -> None:
    """What is read more than once is no iterator."""
    if isinstance(batches, Iterator):
        raise ValueError(
            f"`batches` must be iterable once for each layer, got a {type(batches).__name__}, "
            "which is empty after its first use. Pass a list, or use sequential=False."
        )


def flax_model(model: Any) -> None:
    """A tool works on the model itself, not on its functions or classes."""
    if not isinstance(model, nn.Module | nnx.Module):
        raise TypeError(
            "`model` must be an instance of a flax.linen.Module or a flax.nnx.Module, got "
            f"{type(model).__name__}."
        )


def some_batch_norm(some: bool, unknown: Mapping[str, str] | None = None) -> None:
    """A tool for batch norms needs one."""
    if not some:
        but = f" {strangers(unknown)}." if unknown else ""
        raise ValueError(
            f"`model` must call a batch norm, bnjax's or Flax's own, but calls none.{but}"
        )


def none_unknown(unknown: Mapping[str, str]) -> None:
    """All that keeps statistics is known, where each statistic must be exact."""
    if unknown:
        raise ValueError(
            f"{strangers(unknown)}. So there are no exact statistics of micro-batches."
        )


def all_called(missing: Collection[str], unknown: Mapping[str, str]) -> None:
    """What is measured must be called."""
    found = []
    if silent := sorted(set(missing) - unknown.keys()):
        found.append(f"{silent} were not called: pass what turns them on in `apply_kwargs`")
    if not_known := {path: kind for path, kind in unknown.items() if path in missing}:
        found.append(strangers(not_known))
    if found:
        raise ValueError(
            f"All batch norms that fit `paths` are measured, but {'; '.join(found)}. Or name the "
            "others in `paths`."
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
    common = sorted(given.keys() & there)
    wrong = {
        "missing": [] if part else sorted(there.keys() - given),
        "unknown": sorted(given.keys() - there),
        "of another shape": [
            f"{k} {given[k]} not {there[k]}" for k in common if given[k] != there[k]
        ],
    }
    if found := ", ".join(f"{what} {paths}" for what, paths in wrong.items() if paths):
        raise ValueError(f"`variables` do not fit the model: {found}. Are they of another model?")


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
