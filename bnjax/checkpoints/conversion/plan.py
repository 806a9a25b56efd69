"""Which array goes where, how it lies there, and everything that keeps it from going."""

import dataclasses
import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx

from bnjax import globs
from bnjax.checkpoints.conversion.layouts import Layout, layout
from bnjax.checkpoints.conversion.names import COUNTER, Name, Rename, match, renamed
from bnjax.checkpoints.conversion.trees import Leaf, flipped_layers, mentions_conv_transpose
from bnjax.checkpoints.tensors import as_numpy

# Names for which the nearest ones are looked up: each is compared with all of the other side.
_SEARCHED = 20
_KINDS = (np.bool_, np.integer, np.floating, np.complexfloating)


class Options(NamedTuple):
    """What a user says about names and layouts, as `from_torch` documents it."""

    rename: Rename | None
    flatten: Mapping[str, Sequence[int]] | None
    transposed: globs.Paths | None
    ignore: globs.Paths


@dataclasses.dataclass
class Plan:
    """For each PyTorch name its counterpart and layout, and what is wrong."""

    pairs: dict[str, tuple[Name, Layout]]
    problems: list[str]

    def check(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Raise one error with all problems, those of the values by PyTorch's names among them."""
        problems = list(self.problems)
        for key, (name, _) in self.pairs.items():
            problems += _impossible(key, name, arrays[key])
        if problems:
            lines = "".join(f"\n  {line}" for line in problems)
            raise ValueError(
                f"PyTorch's state dict and the `variables` do not fit, so nothing was converted. "
                f"Match names with `rename`, or leave them out with `ignore`.{lines}"
            )


def state_arrays(state_dict: Any, argument: str) -> dict[str, np.ndarray]:
    """The arrays of a state dict, or an error that names all that are none."""
    if not isinstance(state_dict, Mapping):
        raise TypeError(
            f"`{argument}` must be a mapping of names to arrays, got "
            f"{type(state_dict).__name__}. Of a torch module, pass `module.state_dict()`."
        )
    arrays = {name: as_numpy(value) for name, value in state_dict.items()}
    wrong = {n: type(state_dict[n]).__name__ for n, array in arrays.items() if array is None}
    if wrong:
        nested = [name for name in wrong if isinstance(state_dict[name], Mapping)]
        repair = f" Is {argument}[{nested[0]!r}] what you mean?" if nested else ""
        raise TypeError(
            f"`{argument}` must hold dense arrays of numbers alone, but these are none: {wrong}."
            f"{repair}"
        )
    return {name: array for name, array in arrays.items() if array is not None}


def layouts(leaves: Mapping[Name, Leaf], options: Options, model: Any) -> dict[Name, Layout]:
    """The layout of each array of a Flax model."""
    kernels = {
        "/".join(name.module): leaf.value.shape
        for name, leaf in leaves.items()
        if name.leaf == "kernel"
    }
    convs = {path for path, shape in kernels.items() if len(shape) > 2}
    dense = {path for path, shape in kernels.items() if len(shape) == 2}
    flipped = _flipped(convs, options.transposed, model)
    flatten = {path.replace(".", "/"): shape for path, shape in (options.flatten or {}).items()}
    for path, shape in flatten.items():
        globs.check_fits(path, path in dense, dense, "dense layer")
        inputs = kernels[path][0]
        if len(shape) < 2 or np.prod(shape) != inputs:
            raise ValueError(
                f"`flatten[{path!r}]` must be the shape (C, H, W) that PyTorch flattens into the "
                f"{inputs} inputs of this layer, got {tuple(shape)}."
            )
    return {
        name: layout(
            name.leaf,
            len(leaf.value.shape),
            transposed="/".join(name.module) in flipped,
            unflattened=flatten.get("/".join(name.module)),
        )
        for name, leaf in leaves.items()
    }


def _flipped(convs: set[str], transposed: globs.Paths | None, model: Any) -> set[str]:
    if transposed is not None:
        return _fitting(transposed, convs, "convolution")
    if isinstance(model, nnx.Module):
        return flipped_layers(model)
    suspects = sorted(
        path for path in convs if path.rpartition("/")[2].startswith("ConvTranspose_")
    )
    if suspects or (convs and isinstance(model, nn.Module) and mentions_conv_transpose(model)):
        raise ValueError(
            "`transposed` must say which layers are a `flax.linen.ConvTranspose` with "
            "transpose_kernel=False, its default, as the model has some ConvTranspose and a kernel "
            f"does not show it. Give globs over {suspects or sorted(convs)}, or () if each has "
            "transpose_kernel=True."
        )
    return set()


def _fitting(patterns: globs.Paths, paths: Iterable[str], what: str) -> set[str]:
    """The paths that fit one of the patterns; each pattern fits one."""
    there, found = set(paths), set()
    for pattern in globs.as_tuple(patterns):
        fits = globs.matcher(pattern.replace(".", "/"))
        fitting = {path for path in there if fits(path)}
        globs.check_fits(pattern, bool(fitting), there, what)
        found |= fitting
    return found


def plan(
    torch: Mapping[str, np.ndarray],
    leaves: Mapping[Name, Leaf],
    options: Options,
    model: Any = None,
) -> Plan:
    """Pair all arrays of both sides, and note each that has no counterpart or does not fit it."""
    there = layouts(leaves, options, model)
    as_path = {name: name.replace(".", "/") for name in torch}
    ignored = _fitting(options.ignore, {*as_path.values(), *map(str, leaves)}, "name")
    wanted = renamed([name for name in torch if as_path[name] not in ignored], options.rename)
    matching = match(wanted, [name for name in leaves if str(name) not in ignored])
    found = {key: matching.pairs[key] for key in wanted if key in matching.pairs}
    pairs = {key: (name, there[name]) for key, name in found.items()}
    counters = [name for name in matching.torch_only if _counts_batches(name, pairs)]
    lost = [name for name in matching.torch_only if name not in counters]
    alone = matching.flax_only
    problems = [
        f"ambiguous: {', '.join(keys)} for {', '.join(leaves[name].path for name in names)}"
        for keys, names in matching.ambiguous
    ]
    problems += _prefix({wanted[name] for name in lost}, alone)
    problems += _only_in(
        "PyTorch",
        [(wanted[name], f"{name} {torch[name].shape}") for name in lost],
        {name.in_torch: leaves[name].path for name in alone or leaves},
    )
    problems += _only_in(
        "Flax",
        [(n.in_torch, f"{leaves[n].path} {tuple(leaves[n].value.shape)}") for n in alone],
        {wanted[key]: key for key in lost or wanted if key not in counters},
    )
    for key, (name, placed) in pairs.items():
        problems += _misfits(key, torch[key], leaves[name], placed)
    return Plan(pairs, problems)


def exported(leaves: Mapping[Name, Leaf], options: Options, model: Any) -> Plan:
    """Each array of a Flax model under a name for PyTorch that is made of its path."""
    if options.rename is not None:
        raise ValueError(
            "`rename` goes from names of PyTorch to those of Flax, so it needs those of PyTorch: "
            "pass `like=torch_model.state_dict()`."
        )
    planned = Plan({}, [])
    for name, placed in layouts(leaves, options, model).items():
        if name.exported in planned.pairs:
            both = [leaves[other].path for other in (planned.pairs[name.exported][0], name)]
            planned.problems.append(f"ambiguous: {name.exported} for {', '.join(both)}")
        planned.pairs[name.exported] = name, placed
    return planned


def without(leaves: Mapping[Name, Leaf], ignore: globs.Paths) -> dict[Name, Leaf]:
    """The arrays of a Flax model that are not ignored."""
    ignored = _fitting(ignore, map(str, leaves), "name")
    return {name: leaf for name, leaf in leaves.items() if str(name) not in ignored}


def _counts_batches(name: str, pairs: Mapping[str, tuple[Name, Layout]]) -> bool:
    """Whether it is the counter of a batch norm that needs none in Flax."""
    module, _, leaf = name.rpartition(".")
    mean = f"{module}.running_mean" if module else "running_mean"
    return leaf == COUNTER and mean in pairs and pairs[mean][0].statistic


def _only_in(
    side: str, names: Sequence[tuple[str, str]], there: Mapping[str, str]
) -> Iterator[str]:
    """Names without a counterpart, and those of the other side that they may be meant to be.

    Names are compared as PyTorch writes them, and shown as the text beside each.
    """
    for number, (name, shown) in enumerate(names):
        near = difflib.get_close_matches(name, there, 2, 0.5) if number < _SEARCHED else ()
        nearest = ", ".join(there[other] for other in near)
        yield f"only in {side}: {shown}{nearest and '; nearest: '}{nearest}"


def _prefix(lost: set[str], alone: Sequence[Name]) -> Iterator[str]:
    """The repair where one module's name too many is in front of all of PyTorch's names."""
    (first, *others) = {name.partition(".")[0] for name in lost} or [""]
    if first and not others and alone:
        inner = {name: name.partition(".")[2] for name in lost}
        if len(match(inner, alone).pairs) == len(alone):
            yield f'one prefix too many: rename={{"{first}": ""}} takes {first!r} off'


def _misfits(key: str, array: np.ndarray, leaf: Leaf, placed: Layout) -> Iterator[str]:
    shape = tuple(leaf.value.shape)
    expected = placed.torch_shape(shape)
    if array.shape != expected:
        yield (
            f"wrong shape: {key} {array.shape} for {leaf.path} {shape}, which is {expected} in "
            f"PyTorch{_reason(array.shape, expected)}"
        )
    dtype = leaf.value.dtype
    kind, other = (
        next((k for k in _KINDS if jnp.issubdtype(d, k)), None) for d in (array.dtype, dtype)
    )
    if kind is not other or kind is None:
        yield f"wrong dtype: {key} {array.dtype} for {leaf.path} {dtype}"
    elif kind is np.integer and array.size:
        limits = jnp.iinfo(dtype)
        for value in (int(array.min()), int(array.max())):
            if not limits.min <= value <= limits.max:
                yield f"too large a number for {leaf.path} {dtype}: {key} has {value}"


def _reason(shape: tuple[int, ...], expected: tuple[int, ...]) -> str:
    if len(shape) < 3 or len(shape) != len(expected):
        return ""
    swapped = (expected[1], expected[0], *expected[2:])
    if shape == swapped:
        return ". That is the shape of a transposed convolution: is `transposed` right?"
    if shape[2:] == expected[2:] and shape[0] == expected[0] and not expected[1] % shape[1]:
        return ". Flax has no transposed convolution with groups" if shape[1] < expected[1] else ""
    return ""


def _impossible(key: str, name: Name, array: np.ndarray) -> Iterator[str]:
    """What running statistics can't be."""
    what = {"mean": "mean", "var": "variance"}.get(name.leaf)
    if what is None or not name.statistic:
        return
    counts = {"non-finite": (~np.isfinite(array)).sum()}
    if what == "variance":
        with np.errstate(invalid="ignore"):  # NaN in bfloat16
            counts["negative"] = (array < 0).sum()
    if found := " and ".join(f"{count} {kind}" for kind, count in counts.items() if count):
        yield f"impossible {what}: {key} has {found} of {array.size} values"
