"""Find layers that may follow a flatten, which PyTorch and Flax order differently."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from bnjax.checkpoints.conversion.blocks import ATTENTION
from bnjax.checkpoints.conversion.layouts import Layout
from bnjax.checkpoints.conversion.names import Name
from bnjax.checkpoints.conversion.rules import Path, Rules

_AXES = {1: "L", 2: "H, W", 3: "D, H, W"}


class Step(NamedTuple):
    """A layer, in PyTorch's order."""

    kind: str
    path: str
    inputs: int
    outputs: int
    rank: int = 0  # the number of spatial axes of a conv

    def several_in(self, other: "Step") -> bool:
        """Whether another layer has several inputs per output channel of this conv."""
        if self.kind != "conv" or not self.outputs:
            return False
        times, rest = divmod(other.inputs, self.outputs)
        return times > 1 and not rest


class Suspect(NamedTuple):
    """A layer with several inputs per channel of the preceding conv."""

    path: str
    inputs: int
    conv: Step


def suspects(pairs: Mapping[str, tuple[Name, Layout]], rules: Rules, given: bool) -> list[Suspect]:
    """The dense layers, recurrent cells and normalizations that may follow a flatten.

    Args:
        pairs: the arrays in PyTorch's order.
        rules: the rules, with the layers in `flatten`.
        given: whether `flatten` names any layers. If so, assume that only a normalization just
            before one of them was forgotten.
    """
    steps = list(_steps(pairs, rules))
    known = {"/".join(name.module[:end]) for name in rules.flattened for end in (None, -1)}
    found: list[Suspect] = []
    before: Step | None = None
    concatenates = False  # as in a DenseNet, where a norm takes the channels of several convs
    for number, step in enumerate(steps):
        if step.kind == "conv":
            before = step
        elif before is None:
            continue
        elif step.kind == "dense":
            if before.several_in(step) and step.path not in known and not given:
                found.append(Suspect(step.path, step.inputs, before))
            before = None
        elif step.inputs != before.outputs:
            rest = (each for each in steps[number + 1 :] if each.kind != "norm")
            after = next(rest, step)
            is_last = after.kind == "dense" and after.inputs == step.inputs
            if concatenates or not is_last or not before.several_in(step):
                before, concatenates = step, True
            elif step.path not in known and (not given or after.path in known):
                found.append(Suspect(step.path, step.inputs, before))
    return found


def warnings(found: list[Suspect]) -> Iterator[str]:
    """A warning for all suspects after the same conv with the same number of inputs."""
    for conv in dict.fromkeys(each.conv for each in found):
        those = [each for each in found if each.conv == conv]
        for size in dict.fromkeys(each.inputs for each in those):
            paths = [each.path for each in those if each.inputs == size]
            axes, number = _AXES.get(conv.rank, "..."), size // conv.outputs
            shapes = ", ".join(f'"{path}": ({conv.outputs}, {axes})' for path in paths)
            has = "has" if len(paths) == 1 else "have"
            product = axes.replace(", ", " * ")
            yield (
                f"{' and '.join(map(repr, paths))} {has} {number} inputs for each of the "
                f"{conv.outputs} channels of {conv.path!r}, as after a flatten: PyTorch flattens "
                f"(C, {axes}), Flax ({axes}, C). Pass flatten={{{shapes}}} with {product} = "
                f"{number}, or flatten={{}} if both flatten in the same order, or neither flattens."
            )


def _steps(pairs: Mapping[str, tuple[Name, Layout]], rules: Rules) -> Iterator[Step]:
    cells: dict[Path, Any] = {
        (*block.path, child): (block, side)
        for block in rules.blocks
        if block.kind != ATTENTION
        for side, child in block.children.items()
    }
    seen = set()
    for name, placed in pairs.values():
        path, shape = "/".join(name.module), placed.shape
        if name.module in cells:
            block, side = cells[name.module]
            path = "/".join(block.path)
            if path not in seen and side[0] == "i" and name.leaf == "kernel":
                yield Step("dense", path, shape[0], 0)
                seen.add(path)
        elif name.leaf == "kernel" and len(shape) == 2:
            yield Step("dense", path, *shape)
        elif name.leaf == "kernel" and len(shape) > 2 and len(placed.merged) > 2:
            yield Step("conv", path, shape[-2], shape[-1], len(shape) - 2)
        elif name.leaf in ("scale", "mean") and len(shape) == 1 and path not in seen:
            yield Step("norm", path, shape[0], shape[0])
            seen.add(path)
        elif len(shape) > 1 and name.leaf in ("kernel", "embedding"):
            yield Step("dense", path, 0, 0)  # the order of channels ends here
