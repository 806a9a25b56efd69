"""Checks of the arguments of tools: models, variables and batches."""

import contextlib
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import errors, nnx
from flax import linen as nn
from jax.sharding import Mesh

from bnjax._names import nearest
from bnjax._words import number_of
from bnjax.core.checks import POOLED as POOLED
from bnjax.core.checks import arrays_of_batch as arrays_of_batch
from bnjax.core.checks import axis_of_banks as axis_of_banks
from bnjax.core.checks import bank_of_examples as bank_of_examples
from bnjax.core.checks import banks_exist as banks_exist
from bnjax.core.checks import copies as copies
from bnjax.core.checks import feature_axes as feature_axes
from bnjax.core.checks import given as given
from bnjax.core.checks import mask as mask
from bnjax.core.checks import overriding_momentum as overriding_momentum
from bnjax.core.checks import policy as policy
from bnjax.core.checks import shapes as shapes
from bnjax.core.checks import warn_once as warn_once
from bnjax.core.checks import where as where
from bnjax.globs import strangers

_MISFITS = (
    errors.ApplyScopeInvalidVariablesStructureError,
    errors.ApplyScopeInvalidVariablesTypeError,
    errors.ScopeCollectionNotFound,
    errors.ScopeParamNotFoundError,
    errors.ScopeParamShapeError,
    errors.ScopeVariableNotFoundError,
)


def inputs(value: Any) -> None:
    """Require names of entries, or a function of the batch."""
    names = value.values() if isinstance(value, Mapping) else value
    several = isinstance(value, Mapping | tuple | list) and names
    if callable(value) or isinstance(value, str):
        return
    if several and all(isinstance(name, str) for name in names):
        return
    raise TypeError(
        "`inputs` must be a name in the batch, several of them, a dict of names by keyword, or a "
        f"function of the batch, got {value!r}."
    )


def batch_as_dict(batch: Any) -> dict[str, Any]:
    """The batch as a dict; a bare array becomes its `x`."""
    if isinstance(batch, Mapping):
        return dict(batch)
    if not hasattr(batch, "shape"):
        raise TypeError(
            "A batch must be an array or a dict with the model's input as `x`, got "
            f'{type(batch).__name__}. Write {{"x": images, "y": labels}}.'
        )
    return {"x": batch}


def batch_holds(batch: Mapping[str, Any], names: Collection[str]) -> None:
    """Require the entries that the model is called with."""
    missing = [name for name in names if name not in batch]
    if missing == ["x"]:
        raise ValueError(
            f"A batch must hold the model's input as `x`, got {sorted(batch)}. Rename it, as in "
            '{"x": images, "y": labels}, or name it: inputs="image", inputs=("obs", "action").'
        )
    if missing:
        raise ValueError(f"A batch must hold the `inputs` {missing}, got {sorted(batch)}.")


def mask_of_examples(mask: Any, size: int) -> None:
    """Require a boolean mask with one entry per example."""
    shape, dtype = getattr(mask, "shape", None), getattr(mask, "dtype", None)
    if shape != (size,) or dtype != np.bool_:
        raise ValueError(
            f"The `mask` of a batch of {size} examples must be a boolean array of shape ({size},), "
            f"got {dtype or type(mask).__name__} of shape {shape}. Convert it first, as in "
            "`mask != 0`."
        )


def per_example(batch: Mapping[str, Any], names: Collection[str], size: int) -> None:
    """Require that the entries in `per_example` exist and have one value per example."""
    there = [name for name in names if name in batch]
    if not there:
        raise ValueError(
            f"A batch must hold an entry named in `per_example`, {list(names)}, got "
            f"{sorted(batch)}."
        )
    for name in there:
        shapes = [np.shape(leaf) for leaf in jax.tree.leaves(batch[name])]
        if any(shape[:1] != (size,) for shape in shapes):
            raise ValueError(
                f"`{name}` is named in `per_example`, so its leading axis must be the {size} "
                f"examples of the batch, got shapes {shapes}."
            )


def leading_axis(lengths: list[int], shapes: list[tuple[int, ...]]) -> int:
    """The number of examples: the leading axis of the first input."""
    if not lengths:
        raise ValueError(
            "The inputs in a batch must be arrays with examples along the leading axis, got shapes "
            f"{shapes}."
        )
    return lengths[0]


def mesh(value: Any) -> None:
    """Require a JAX mesh."""
    if not isinstance(value, Mesh):
        raise TypeError(
            f"`mesh` must be a jax.sharding.Mesh, such as jax.make_mesh((4,), ('data',)), got "
            f"{type(value).__name__}."
        )


def loss_and_metrics(result: Any) -> tuple[Any, dict[str, Any]]:
    """The loss and the dict of metrics, possibly empty, that a loss function returned."""
    loss, metrics = result if isinstance(result, tuple) and len(result) == 2 else (result, {})
    if isinstance(loss, tuple | list | Mapping) or not isinstance(metrics, Mapping):
        what = type(result).__name__
        got = f"{what} of {len(result)}" if isinstance(result, tuple | list) else what
        raise TypeError(
            "`loss_fn` must return the loss or (loss, metrics), an array and a dict of arrays, got "
            f"a {got}. Write return loss, {{'accuracy': accuracy}}."
        )
    for name, value in {"loss": loss, **metrics}.items():
        if not isinstance(value, jax.Array | np.ndarray | np.number | int | float):
            raise TypeError(
                f"`loss_fn` must return arrays, but its `{name}` is of type "
                f"{type(value).__name__}. Does it end with `return loss` or `return loss, metrics`?"
            )
    return loss, dict(metrics)


def mean_or_each(name: str, value: Any, size: int) -> Any:
    """Require a mean, or one entry per example."""
    if value.shape not in ((), (size,)):
        raise ValueError(
            f"`loss_fn` must return `{name}` as a mean, of shape (), or per example, of shape "
            f"({size},), got shape {value.shape}. Take the mean over the other axes."
        )
    return value


def has_examples(layer: Any, shape: tuple[int, ...], size: int, path: str) -> None:
    """Require a batch norm's input to have the examples of the mask along its leading axis."""
    if shape[:1] != (size,):
        raise ValueError(
            f"The `mask` of the batch has {size} examples, but the input of the "
            f"{type(layer).__name__} at {where([path])} has shape {shape}: the model reshapes its "
            "examples. Pass that layer its own mask, as in norm(x, mask=...), and rename that of "
            "the batch; or, in training, let the statistics include the padding with "
            "mask_statistics=False."
        )


def step_of_schedule(step: Any, path: Any, what: str = "momentum") -> Any:
    """Require a known step number for a momentum, or a policy, that is a schedule."""
    if step is None:
        repair = "pass its value: override(paths, momentum=schedule(step))."
        if what != "momentum":
            repair = "pass numbers: override(paths, using=policy.at(step))."
        raise ValueError(
            f"The {what} of the batch norm at {where(['/'.join(path)])} is a schedule, but no "
            "step is known here, and the layer keeps no count. Use bnjax.training.train_step or "
            f"bnjax.nnx.train_step, or {repair}"
        )
    return step


def keeps_for_momentum(momentum: Any, kept: Collection[str], path: str) -> None:
    """Require a layer to keep the statistics that an overriding momentum needs."""
    needed = ("count",) if momentum is None else POOLED if isinstance(momentum, str) else ()
    if kept and (missing := [name for name in needed if name not in kept]):
        raise ValueError(
            f"override(momentum={momentum!r}) needs {missing} in the `batch_stats` of the batch "
            f"norm at {where([path])}, which has {sorted(kept)}. Construct a bnjax layer with "
            f"momentum={momentum!r} instead."
        )


def number_of_calls(counted: Any, path: str) -> int:
    """Require a known number of calls, since each call of a layer has its own moments."""
    try:
        return int(np.max(np.asarray(counted), initial=1))
    except jax.errors.TracerArrayConversionError as error:
        raise ValueError(
            f"The number of calls of `{path}` depends on the data, so its statistics over "
            "micro-batches can't be exact. Train with microbatches=1."
        ) from error


def is_initializing(layer: Any) -> bool:
    """Whether a linen layer is creating its variables."""
    return isinstance(layer, nn.Module) and layer.is_initializing()


def poolable(layer: Any, statistics: Collection[str], path: str) -> None:
    """Require a layer that keeps only moments, which can be pooled."""
    if others := sorted({*statistics} - {"mean", "var", "count", *POOLED}):
        raise ValueError(
            f"The {type(layer).__name__} at {where([path])} must keep only a mean and a variance, "
            f"but also keeps {others}, which can't be pooled over micro-batches. Train with "
            "microbatches=1."
        )


def known_fields(fields: Mapping[str, Any], known: set[str]) -> None:
    """Require settings that batch norm layers have."""
    if not fields:
        raise TypeError(
            "`override` needs at least one setting, got none. Write, for example, "
            "override('encoder/**', momentum=0.01)."
        )
    for name in sorted(set(fields) - known):
        close = nearest(name, known)
        others = "momentum, eps, axis_name or use_running_average"
        hint = f"Did you mean `{close}`?" if close else f"It takes their fields, such as {others}."
        raise TypeError(f"`override` takes settings of batch norm layers, got `{name}`. {hint}")


def layer_has_fields(layer: Any, source: Any, fields: Mapping[str, Any], path: str) -> None:
    """Require that the layer has the fields; the conventions differ in some names."""
    missing = sorted(name for name in fields if name != "using" and not hasattr(source, name))
    if missing:
        raise TypeError(
            f"The {type(layer).__name__} at {where([path])} has no field {missing}. "
            "PyTorch's convention has `eps` and `affine` where Flax's has `epsilon`, `use_scale` "
            "and `use_bias`."
        )


def several_batches(batches: Any) -> None:
    """Require several batches rather than one."""
    if isinstance(batches, Mapping) or hasattr(batches, "shape"):
        shape = getattr(batches, "shape", None)
        got = "a dict" if shape is None else f"an array of shape {tuple(shape)}"
        raise TypeError(
            f"`batches` must be a list or an iterator of batches, got {got}: write [batch]."
        )


def some_batch(some: bool | float, what: str = "batch") -> None:
    """Require at least one batch, or one example that counts."""
    if not some:
        raise ValueError(
            f"`batches` must hold at least one {what}, got none. An iterator can be used only "
            "once: pass a list, or create it again."
        )


def iterable_again(batches: Any) -> None:
    """Require something that can be iterated over more than once."""
    if isinstance(batches, Iterator):
        raise ValueError(
            f"`batches` must be iterable once per layer, got a {type(batches).__name__}, which can "
            "be used only once. Pass a list, or use sequential=False."
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
            f"{copies(variables)}"
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
