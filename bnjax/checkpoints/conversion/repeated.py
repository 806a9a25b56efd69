"""Recognize layers that nn.scan or nnx.vmap has stacked, which PyTorch keeps apart.

Their arrays have one more axis, so a dense kernel looks like that of a conv, and the statistics of
a batch norm look like banks.
"""

import itertools
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from flax import nnx

from bnjax.checkpoints.conversion.blocks import blocks
from bnjax.checkpoints.conversion.layouts import layout
from bnjax.checkpoints.conversion.names import Name
from bnjax.checkpoints.conversion.rules import several_axes
from bnjax.checkpoints.conversion.trees import Leaf

Path = tuple[str, ...]
Shapes = Mapping[Name, tuple[int, ...]]

# The number of axes of one layer's arrays, at least; others may be scalars.
_AXES = {"kernel": 2, "embedding": 2, "scale": 1, "bias": 1, "mean": 1, "var": 1}
# Names that Flax gives to lifted modules and to dense layers.
_NAMED = re.compile(r"(Scan|Vmap)\w*|Dense_\d+")
# The kernel size that a number of banks may equal by chance, even in one dimension.
_USUAL = 3


def check_single(leaves: Mapping[Name, Leaf], model: Any) -> None:
    """Raise if layers are stacked; warn if they may be, but look as much like banks."""
    if found := stack(leaves, model):
        raise ValueError(
            f"`variables` must have separate arrays for each layer, but {found}. Convert one layer "
            "at a time: take its arrays with jax.tree.map(lambda array: array[0], ...). If these "
            "are banks, pass `like`."
        )
    unsure = () if isinstance(model, nnx.Module) else _by_scope(_shapes(leaves), unsure=True)
    for name in unsure:
        rows = leaves[name].value.shape[0]
        warnings.warn(
            f"`variables` were read as {rows} banks and convs of size {rows}, but "
            f"{leaves[name].path} may also be {rows} layers stacked by nn.scan or nnx.vmap. If so, "
            "convert one layer at a time; otherwise, pass `like`.",
            UserWarning,
            stacklevel=3,
        )
        return


def stack(leaves: Mapping[Name, Leaf], model: Any) -> str | None:
    """The array that shows that layers are stacked, in words.

    Args:
        leaves: all arrays.
        model: an nnx model, whose layers tell how many axes their arrays should have.
    """
    shapes = _shapes(leaves)
    known = isinstance(model, nnx.Module)
    signs = (
        _by_type(shapes, model) if known else (),
        _by_bias(shapes),
        (name for name, shape in shapes.items() if name[1:] == ("mean", True) and len(shape) > 2),
        () if known else _by_scope(shapes),
    )
    name = next(itertools.chain.from_iterable(signs), None)
    if name is None:
        return None
    return (
        f"{leaves[name].path} {shapes[name]} looks like {shapes[name][0]} layers stacked by "
        "nn.scan or nnx.vmap"
    )


def _shapes(leaves: Mapping[Name, Leaf]) -> Shapes:
    return {name: tuple(leaf.value.shape) for name, leaf in leaves.items()}


def is_one_of(name: Name, shape: Sequence[int], there: Sequence[int]) -> bool:
    """Whether an array in PyTorch, of shape `there`, fits one layer of a stack."""
    return len(shape) > 1 and layout(name.leaf, shape[1:]).torch_shape == tuple(there)


def _by_type(shapes: Shapes, model: nnx.Module) -> Iterator[Name]:
    """Arrays with more axes than their nnx layers give them."""
    for path, module in nnx.iter_modules(model):
        axes = {}
        if isinstance(module, nnx.Linear | nnx.Embed):
            axes = {"kernel": 2, "embedding": 2}
        elif isinstance(module, nnx.Conv | nnx.ConvTranspose):
            size: Any = module.kernel_size
            axes = {"kernel": 3 if isinstance(size, int) else len(size) + 2}
        elif hasattr(module, "num_features"):
            axes = {"mean": 1 + (getattr(module, "banks", None) is not None)}
        for leaf, count in axes.items():
            name = Name(tuple(map(str, path)), leaf, leaf == "mean")
            if len(shapes.get(name, ())) > count:
                yield name


def _by_bias(shapes: Shapes) -> Iterator[Name]:
    """Kernels with one bias for each index of their first axis, as no layer of PyTorch has."""
    banks = {shape for name, shape in shapes.items() if name.statistic and name.leaf == "mean"}
    general = several_axes(shapes, blocks(shapes))
    for name, kernel in shapes.items():
        bias = shapes.get(name._replace(leaf="bias"), ()) if name.leaf == "kernel" else ()
        if len(bias) > 1 and len(kernel) > len(bias):
            each = kernel[0] == bias[0] and kernel[1 - len(bias) :] == bias[1:]
            if each and (name.module not in general or bias in banks):
                yield name


def _by_scope(shapes: Shapes, unsure: bool = False) -> Iterator[Name]:
    """Kernels next to statistics with as many rows, unless these may be banks.

    In a stack all arrays have the axis. If a batch norm is not in one, such rows are its banks, and
    so they are if all kernels may be those of convs whose size is the number of banks, in as many
    dimensions as other convs have. Banks and 2d convs are as usual as stacks; for 1d and 3d convs,
    without others to compare with, it is `unsure`.
    """
    inside: dict[int, dict[Path, list[Name]]] = {}
    for name, shape in shapes.items():
        if name.statistic and name.leaf == "mean" and len(shape) == 2:
            scope, names = _scope(name.module, shapes)
            inside.setdefault(shape[0], {})[scope] = names
    for rows, scopes in inside.items():
        if all(_stacks(shapes, names, rows) for names in scopes.values()):
            within = {name for names in scopes.values() for name in names}
            others = {len(s) for n, s in shapes.items() if n.leaf == "kernel" and n not in within}
            for names in scopes.values():
                kernels = [name for name in names if name.leaf == "kernel"]
                if not kernels:
                    continue
                if not _may_be_convs(shapes, names, rows, others - {2}):
                    yield kernels[0]
                elif unsure and len(shapes[kernels[0]]) != 4 and not others - {2}:
                    yield kernels[0]


def _scope(module: Path, shapes: Shapes) -> tuple[Path, list[Name]]:
    """The smallest module around a batch norm that has kernels, and all arrays inside."""
    inside: list[Name] = []
    for end in range(len(module) - 1, -1, -1):
        inside = [name for name in shapes if name.module[:end] == module[:end]]
        if any(name.leaf == "kernel" for name in inside):
            return module[:end], inside
    return (), inside


def _stacks(shapes: Shapes, names: Sequence[Name], rows: int) -> bool:
    return all(
        shapes[name][:1] == (rows,) and len(shapes[name]) > _AXES.get(name.leaf, 0)
        for name in names
    )


def _may_be_convs(shapes: Shapes, names: Sequence[Name], rows: int, others: set[int]) -> bool:
    """Whether all kernels have this number as their size, and nothing else is stacked.

    `others` has the numbers of axes that the kernels of other convs have.
    """
    norms = {name.module for name in names if name.statistic}
    kernels = [shapes[name] for name in names if name.leaf == "kernel"]
    return (
        len({*map(len, kernels)}) == 1
        and (not others or len(kernels[0]) in others)
        and {size for kernel in kernels for size in kernel[:-2]} == {rows}
        and (len(kernels[0]) in (4, 5) or (len(kernels[0]) == 3 and rows == _USUAL))
        and not any(name.leaf == "scale" and name.module not in norms for name in names)
        and not any(_NAMED.fullmatch(part) for name in names for part in name.module)
    )
