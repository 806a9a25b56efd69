"""Compare the outputs of a converted model with PyTorch's; find the first layer that differs."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import linen as nn
from flax import nnx
from flax.traverse_util import flatten_dict

from bnjax.checkpoints.conversion.names import Name
from bnjax.checkpoints.conversion.plan import Plan
from bnjax.checkpoints.conversion.stacked import Attention, Recurrent
from bnjax.checkpoints.tensors import as_numpy
from bnjax.models.compat import is_traced
from bnjax.models.nnx_copies import Copy

_TOLERANCE = 1e-4  # relative to the largest value, in float32
Path = tuple[str, ...]
Outputs = dict[Path, list[Any]]  # by module, one for each call


class Layer(NamedTuple):
    """A layer with parameters whose outputs were compared."""

    torch: str
    flax: str
    kind: str  # "linear", or the name of one of its Flax arrays
    difference: float  # relative to the largest value; infinite if shapes or finiteness differ
    shapes: str = ""  # both, if they differ


def torch_outputs(module: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """Record the outputs of a PyTorch model and all its modules, for `check` of `from_torch`.

    Args:
        module: a `torch.nn.Module`. It runs once, in evaluation mode and without gradients; its
            mode is restored.
        *args: the arguments to call it with.
        **kwargs: the keyword arguments to call it with.

    Returns:
        Outputs by module name, in the order in which the modules finish; "" is the model itself. A
        module that is called several times has a list of outputs. Each is copied immediately, so
        later in-place operations do not change it.

    >>> import torch
    >>> list(torch_outputs(torch.nn.Sequential(torch.nn.Linear(1, 2)), torch.zeros(1, 1)))
    ['0', '']
    """
    import torch

    found: dict[str, list[Any]] = {}
    modes = {each: each.training for each in module.modules()}
    hooks = []
    for name, each in module.named_modules():

        def record(_: Any, __: Any, output: Any, name: str = name) -> None:
            found.setdefault(name, []).append(_copied(output))

        hooks.append(each.register_forward_hook(record))
    try:
        module.eval()
        with torch.no_grad():
            module(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
        for each, mode in modes.items():
            each.training = mode
    return {name: outputs[0] if len(outputs) == 1 else outputs for name, outputs in found.items()}


def check_outputs(
    model: Any, variables: Any, planned: Plan, check: Any, suspects: Sequence[str]
) -> None:
    """Raise if the outputs of the Flax model differ from PyTorch's.

    Args:
        model: a linen or nnx model.
        variables: the converted variables.
        planned: which name is which.
        check: inputs and outputs, as documented in `from_torch`.
        suspects: the layers that may follow a flatten.
    """
    args, theirs, kwargs = _checked(model, check)
    ours = _run(model, variables, args, kwargs)
    by_name = theirs if isinstance(theirs, Mapping) else {"": theirs}
    layers = list(_layers(by_name, ours, planned)) if isinstance(theirs, Mapping) else []
    bad = next((layer for layer in layers if not layer.difference <= _TOLERANCE), None)
    first = "`check`: the outputs of the Flax model differ from PyTorch's"
    if "" in by_name:
        found, shapes = _whole(by_name[""], ours[()][-1])
        if found <= _TOLERANCE:
            return
        first += _amount(found, shapes)
    elif bad is None:
        return
    lines = [f"{first}.", _where(layers, bad, isinstance(theirs, Mapping))]
    if suspects:
        names, do = " and ".join(map(repr, suspects)), "Do" if len(suspects) > 1 else "Does"
        lines.append(f"{do} {names} follow a flatten? If so, pass `flatten`.")
    raise ValueError("\n".join(lines))


def _where(layers: Sequence[Layer], bad: Layer | None, by_layer: bool) -> str:
    if not by_layer:
        return (
            "Pass check=(x, bnjax.torch_outputs(torch_model, x_of_torch)) to find the first layer "
            "that differs."
        )
    if not layers:
        return "No layer was compared: `y` has none with parameters whose output Flax records too."
    agree = layers[: layers.index(bad)] if bad else layers
    largest = max((layer.difference for layer in agree), default=0.0)
    if bad is None:
        return (
            f"All layers with parameters agree to {largest:.0e}, so compare the operations after "
            "the last one."
        )
    before = f"all layers before it agree to {largest:.0e}" if agree else "it is the first layer"
    return (
        f"They first differ at {bad.torch!r} ({bad.flax!r} in Flax),"
        f"{_amount(bad.difference, bad.shapes)}; {before}. Compare "
        f"{_TO_COMPARE.get(bad.kind, 'its settings')}, and the operations before it."
    )


_TO_COMPARE = {
    "linear": "whether it follows a flatten",
    "kernel": "its padding, strides, dilation and groups",
    "scale": "its eps, which defaults to 1e-6 in some Flax layers",
    "mean": "its eps",
}


def _amount(difference: float, shapes: str) -> str:
    if shapes:
        return f" in shape: {shapes}"
    if not np.isfinite(difference):
        return " in which values are finite"
    return f" by {difference:.1g} times the largest value"


def _checked(model: Any, check: Any) -> tuple[tuple[Any, ...], Any, dict[str, Any]]:
    """The arguments of the Flax model and the outputs of PyTorch's."""
    if not isinstance(check, tuple) or len(check) not in (2, 3):
        raise TypeError(
            "`check` must be (x, y), an input of the Flax model and PyTorch's output for it, or "
            f"(x, y, kwargs), got {type(check).__name__}."
        )
    if model is None:
        raise ValueError("`check` runs the Flax model: pass `model`, not None.")
    x, y, *rest = check
    if hasattr(y, "state_dict"):
        raise TypeError(
            "`check` takes the outputs of the PyTorch model, not the model itself: pass "
            "check=(x, bnjax.torch_outputs(torch_model, x_of_torch))."
        )
    args = x if isinstance(x, tuple) else (x,)
    return tuple(jax.tree.map(_array, args)), y, dict(rest[0]) if rest else {}


def _array(value: Any) -> Any:
    array = as_numpy(value)
    return value if array is None else array


def _copied(output: Any) -> Any:
    """The output with arrays that share no memory with PyTorch's tensors."""
    if isinstance(output, Mapping):
        return {key: _copied(part) for key, part in output.items()}
    if isinstance(output, list | tuple):
        return [_copied(part) for part in output]
    array = as_numpy(output)
    return output if array is None else np.array(array)


def _run(model: Any, variables: Any, args: Any, kwargs: Mapping[str, Any]) -> Outputs:
    """The outputs for these inputs; if the model fails on them, move their channels last."""
    try:
        return _outputs(model, variables, args, kwargs)
    except Exception as error:
        last = tuple(np.moveaxis(x, 1, -1) if np.ndim(x) > 2 else x for x in args)
        with contextlib.suppress(Exception):
            return _outputs(model, variables, last, kwargs)
        error.add_note("In `check`, which calls the Flax model with x, channels last.")
        raise


def _outputs(model: Any, variables: Any, args: Any, kwargs: Mapping[str, Any]) -> Outputs:
    """The outputs of each module of the Flax model, in evaluation mode."""
    with jax.default_matmul_precision("highest"):
        if isinstance(model, nnx.Module):
            return _outputs_nnx(model, variables, args, kwargs)
        y, found = nn.apply(
            lambda module: module(*args, **kwargs),
            model,
            mutable=["intermediates"],
            capture_intermediates=True,
        )({k: v for k, v in variables.items() if k != "intermediates"})
    flat: Any = flatten_dict(found.get("intermediates", {}))
    outputs = {keys[:-1]: list(calls) for keys, calls in flat.items() if keys[-1] == "__call__"}
    return {**outputs, (): [y]}


def _outputs_nnx(model: Any, state: Any, args: Any, kwargs: Mapping[str, Any]) -> Outputs:
    copy, outputs = Copy(model, state).model, {}
    for path, module in nnx.iter_modules(copy):
        calls = outputs.setdefault(tuple(map(str, path)), [])
        object.__setattr__(module, "__class__", _recording(type(module), calls))
    outputs[()] = [copy(*args, **kwargs)]  # type: ignore[operator]
    return {path: calls for path, calls in outputs.items() if calls}


def _recording(cls: Any, calls: list[Any]) -> Any:
    """A subclass that records the outputs of its calls."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = cls.__call__(self, *args, **kwargs)
        if not any(is_traced(leaf) for leaf in jax.tree.leaves(output)):
            calls.append(output)
        return output

    return type(cls)(cls.__name__, (cls,), {"__call__": call, "__module__": cls.__module__})


def _layers(theirs: Mapping[str, Any], ours: Outputs, planned: Plan) -> Iterator[Layer]:
    """All layers that can be compared, in the order in which PyTorch finished them."""
    plain: dict[str, Name] = {}
    kinds: dict[str, str] = {}
    for key, (name, placed) in planned.pairs.items():
        module = key.rpartition(".")[0]
        if "[" not in key and (name.leaf in _TO_COMPARE or module not in plain):
            plain[module] = name
            kinds[module] = "linear" if len(placed.torch_shape) == 2 else name.leaf
    stacked = {_module(each): each.block.path for each in planned.stacks}
    for torch, outputs in theirs.items():
        if torch in stacked:
            yield from _cell(torch, outputs, stacked[torch], ours)
        elif torch and torch in plain and plain[torch].module in ours:
            path = plain[torch].module
            calls = outputs if isinstance(outputs, list) else [outputs]
            if len(calls) == len(ours[path]):
                ordered = _flattened(planned, plain[torch])
                for one, other in zip(calls, ours[path], strict=True):
                    found, shapes = _difference(one, other, ordered)
                    yield Layer(torch, "/".join(path), kinds[torch], found, shapes)


def _cell(torch: str, outputs: Any, path: Path, ours: Outputs) -> Iterator[Layer]:
    """Compare a recurrent or attention layer with the module at its path, or the one around it."""
    for end in range(len(path), max(len(path) - 3, 0), -1):
        for other in ours.get(path[:end], [])[-1:]:
            found, shapes = _difference(outputs, other)
            if not shapes:
                yield Layer(torch, "/".join(path[:end]), "", found)
                return


def _module(each: Attention | Recurrent) -> str:
    """The PyTorch module that holds the stacked arrays."""
    key = next(iter(each.group.keys.values()))
    inner = isinstance(each, Attention) and key.endswith((".weight", ".bias"))
    return key.rpartition(".")[0].rpartition(".")[0] if inner else key.rpartition(".")[0]


def _flattened(planned: Plan, name: Name) -> Callable[[np.ndarray], np.ndarray]:
    """A function that reorders the outputs of a normalization after a flatten as in Flax."""
    shape = planned.rules.flattened.get(name, ()) if planned.rules else ()

    def ordered(array: np.ndarray) -> np.ndarray:
        if not shape or name.leaf == "kernel" or array.ndim != 2:
            return array
        return np.moveaxis(array.reshape(-1, *shape), 1, -1).reshape(array.shape)

    return ordered


def _whole(theirs: Any, ours: Any) -> tuple[float, str]:
    """The largest difference among all outputs of a model, if both have the same number."""
    both = jax.tree.leaves(theirs), jax.tree.leaves(ours)
    if len(both[0]) != len(both[1]):
        return np.inf, f"{len(both[1])} arrays in Flax, {len(both[0])} in PyTorch"
    found = [_difference(one, other) for one, other in zip(*both, strict=True)]
    return max(found, default=(0.0, ""))


def _difference(
    theirs: Any, ours: Any, ordered: Callable[[np.ndarray], np.ndarray] = lambda array: array
) -> tuple[float, str]:
    """The largest difference relative to the largest value, and the shapes if they differ."""
    arrays = [array for leaf in jax.tree.leaves(theirs) if (array := as_numpy(leaf)) is not None]
    others = [np.asarray(leaf) for leaf in jax.tree.leaves(ours)]
    if not arrays or not others:
        return 0.0, ""
    wanted = ordered(arrays[0])
    forms = [wanted, np.moveaxis(wanted, 1, -1)] if wanted.ndim > 2 else [wanted]
    pairs = [(form, other) for form in forms for other in others if form.shape == other.shape]
    if not pairs:
        return np.inf, f"{others[0].shape} in Flax, {wanted.shape} in PyTorch"
    return min(_relative(form, other) for form, other in pairs), ""


def _relative(theirs: np.ndarray, ours: np.ndarray) -> float:
    one, other = theirs.astype(np.float64), ours.astype(np.float64)
    same = (one == other) | (np.isnan(one) & np.isnan(other))
    if not (np.isfinite(one) & np.isfinite(other) | same).all():
        return np.inf
    with np.errstate(invalid="ignore"):
        apart = np.where(same, 0.0, np.abs(one - other))
    largest = np.max(np.abs(one), where=np.isfinite(one), initial=0.0)
    return float(apart.max(initial=0.0) / (largest or 1.0))
