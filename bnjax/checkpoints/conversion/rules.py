"""Choose a layout for each array of a Flax model, from its layers and the user's options."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from flax import linen as nn
from flax import nnx

from bnjax import globs
from bnjax.checkpoints.conversion.blocks import ATTENTION, Block, blocks
from bnjax.checkpoints.conversion.layouts import Layout, inputs_of, layout
from bnjax.checkpoints.conversion.names import Name, Rename
from bnjax.checkpoints.conversion.trees import Leaf, flipped_layers, mentions_conv_transpose
from bnjax.checkpoints.conversion.words import check_known

Path = tuple[str, ...]


class Options(NamedTuple):
    """The user's options about names and layouts, as documented in `from_torch`."""

    rename: Rename | None
    flatten: Mapping[str, Sequence[int]] | None
    transposed: globs.Paths | None
    ignore: globs.Paths


class Rules(NamedTuple):
    """Everything besides names and shapes that determines layouts."""

    flipped: set[str]  # paths of transposed convolutions with flipped kernels
    flattened: Mapping[Name, tuple[int, ...]]  # (C, *spatial) of arrays after a flatten
    general: Mapping[Path, int]  # the number of input axes of each `DenseGeneral`
    blocks: list[Block]

    def layout(
        self, name: Name, shape: Sequence[int], torch: Sequence[int] | None = None
    ) -> Layout:
        """The layout of an array; `torch` is its shape in PyTorch, if known."""
        if torch is not None and _is_same_row(name.leaf, shape, torch):
            return Layout(tuple(shape), tuple(torch), tuple(range(len(torch))))
        inputs = None
        if name.leaf == "kernel" and len(shape) > 2 and not name.statistic:
            inputs = self.general.get(name.module)
            if torch is not None and len(torch) == 2:
                inputs = inputs_of(shape, torch) or inputs
        elif name.leaf == "bias" and len(shape) > 1 and not name.statistic:
            is_flat = torch is not None and len(torch) == 1
            inputs = 0 if is_flat or name.module in self.general else None
        return layout(
            name.leaf,
            shape,
            inputs=inputs,
            transposed="/".join(name.module) in self.flipped,
            unflattened=self.flattened.get(name, ()),
        )


def rules(leaves: Mapping[Name, Leaf], options: Options, model: Any) -> Rules:
    """The rules for the arrays of a Flax model."""
    shapes = {name: tuple(leaf.value.shape) for name, leaf in leaves.items()}
    found = blocks(shapes)
    general = several_axes(shapes, found)
    convs = {
        "/".join(name.module)
        for name, shape in shapes.items()
        if name.leaf == "kernel" and len(shape) > 2 and name.module not in general
    }
    flipped = _flipped(convs, options.transposed, model)
    return Rules(flipped, _flattened(shapes, found, options.flatten), general, found)


def matching(argument: str, patterns: globs.Paths, paths: Iterable[str], what: str) -> set[str]:
    """The paths that match any of the patterns; a pattern that matches none is an error."""
    there, found = set(paths), set()
    for pattern in globs.as_tuple(patterns):
        matches = globs.matcher(pattern.replace(".", "/"))
        new = {path for path in there if matches(path)}
        check_known(argument, pattern, bool(new), there, what)
        found |= new
    return found


def _is_same_row(leaf: str, shape: Sequence[int], torch: Sequence[int]) -> bool:
    """Whether it is a scalar in both, a WeightNorm's scale, (out, 1) in PyTorch, or one bank."""
    if leaf in ("scale", "bias", "mean", "var") and (*shape,) == (1, *torch):
        return True
    if leaf.endswith("/scale"):
        return [*torch[:1]] == [*shape] and set(torch[1:]) <= {1}
    return {tuple(shape), tuple(torch)} <= {(), (1,)}


def several_axes(shapes: Mapping[Name, tuple[int, ...]], found: Iterable[Block]) -> dict[Path, int]:
    """The layers, other than convs, whose kernels have several input or output axes."""
    general = {}
    for name, shape in shapes.items():
        if name.leaf == "bias" and len(shape) > 1 and not name.statistic:
            kernel = shapes.get(name._replace(leaf="kernel"), ())
            if kernel[-len(shape) :] == shape and len(kernel) > len(shape):
                general[name.module] = len(kernel) - len(shape)
    for block in found:
        if block.kind == ATTENTION:
            paths = {head: (*block.path, child) for head, child in block.children.items()}
            kernels = {head: shapes[Name(path, "kernel")] for head, path in paths.items()}
            if all(len(kernel) == 3 for kernel in kernels.values()):
                general |= {path: 2 if head == "out" else 1 for head, path in paths.items()}
    return general


def _flipped(convs: set[str], transposed: globs.Paths | None, model: Any) -> set[str]:
    if transposed is not None:
        return matching("transposed", transposed, convs, "convolution")
    if isinstance(model, nnx.Module):
        return flipped_layers(model)
    suspects = sorted(
        path for path in convs if path.rpartition("/")[2].startswith("ConvTranspose_")
    )
    if suspects or (convs and isinstance(model, nn.Module) and mentions_conv_transpose(model)):
        raise ValueError(
            "`transposed` must say which layers are a `flax.linen.ConvTranspose` with "
            "transpose_kernel=False, the default: the model uses ConvTranspose, and kernels do not "
            f"show where. Pass globs for them among {suspects or sorted(convs)}, or () if all have "
            "transpose_kernel=True."
        )
    return set()


def _flattened(
    shapes: Mapping[Name, tuple[int, ...]], found: Iterable[Block], flatten: Any
) -> dict[Name, tuple[int, ...]]:
    """The arrays whose first axis PyTorch flattened in another order, with (C, *spatial)."""
    if not isinstance(flatten, Mapping | None):
        raise TypeError(
            "`flatten` must map Flax layer paths to shapes (C, H, W), such as "
            f'{{"head/fc": (512, 7, 7)}}, got {type(flatten).__name__}.'
        )
    if not flatten:
        return {}
    candidates = _candidates(shapes, found)
    flattened = {}
    for path, shape in flatten.items():
        path = path.replace(".", "/")
        what = "dense layer, normalization or recurrent cell"
        check_known("flatten", path, path in candidates, candidates, what)
        inputs = shapes[candidates[path][0]][0]
        is_shape = isinstance(shape, Sequence) and all(isinstance(size, int) for size in shape)
        if not is_shape or len(shape) < 2 or math.prod(shape) != inputs:
            got = tuple(shape) if is_shape else repr(shape)
            raise ValueError(
                f"`flatten[{path!r}]` must be the shape (C, H, W) that PyTorch flattens into the "
                f"{inputs} inputs of this layer, got {got}."
            )
        flattened |= dict.fromkeys(candidates[path], tuple(shape))
    return flattened


def _candidates(
    shapes: Mapping[Name, tuple[int, ...]], found: Iterable[Block]
) -> dict[str, list[Name]]:
    """The layers that may follow a flatten, with the arrays that have its size as an axis."""
    kernels = {name.module: name for name, shape in shapes.items() if name.leaf == "kernel"}
    candidates: dict[str, list[Name]] = {}
    for name, shape in shapes.items():
        is_dense = name.leaf == "kernel" and len(shape) == 2
        is_norm = len(shape) == 1 and name.module not in kernels
        if is_dense or is_norm:
            candidates.setdefault("/".join(name.module), []).append(name)
    for block in found:
        if block.kind != ATTENTION:
            children = [child for side, child in block.children.items() if side[0] == "i"]
            candidates["/".join(block.path)] = [Name((*block.path, c), "kernel") for c in children]
    return candidates
