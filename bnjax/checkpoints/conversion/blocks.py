"""Recurrent and attention layers, whose arrays are stacked in one framework but not in the other.

PyTorch stacks the gates of an LSTM (i, f, g, o) or a GRU (r, z, n) along the first axis, and has
one bias for the input and one for the state. Flax has a layer per gate, or, in most nnx cells, one
layer for all gates, and omits one of two biases that are only added. PyTorch's attention stacks
query, key and value.
"""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any, NamedTuple

from bnjax.checkpoints.conversion.names import Name, respelled

ATTENTION = "attention"
GATES = {"LSTM": "ifgo", "GRU": "rzn", "RNN": "h"}
_HEADS = ("query", "key", "value", "out")
# Array names in torch.nn.MultiheadAttention and in other attention layers.
_PROJECTIONS = {
    "in_proj_weight": "qkv.weight",
    "in_proj_bias": "qkv.bias",
    "q_proj_weight": "query.weight",
    "k_proj_weight": "key.weight",
    "v_proj_weight": "value.weight",
    **{
        f"{theirs}.{leaf}": f"{ours}.{leaf}"
        for theirs, ours in (
            ("qkv", "qkv"),
            ("q_proj", "query"),
            ("k_proj", "key"),
            ("v_proj", "value"),
            ("out_proj", "out"),
            ("proj", "out"),
        )
        for leaf in ("weight", "bias")
    },
}


class Group(NamedTuple):
    """A PyTorch layer whose arrays are stacked."""

    module: str  # the name to look for
    place: str  # its name in PyTorch
    kind: str
    keys: Mapping[str, str]  # PyTorch names by part
    sizes: tuple[int, ...]  # in, out

    def __str__(self) -> str:  # noqa: D105 - the class says it
        arrays = "" if self.kind == ATTENTION else "gates stacked "
        arrays += f"in {', '.join(self.keys.values())}"
        return f"{self.kind} {self.module or 'at the top'} {self.sizes}, {arrays}"


class Block(NamedTuple):
    """A Flax layer that consists of other layers."""

    path: tuple[str, ...]
    kind: str
    children: Mapping[str, str]  # names in the model, by "ii", "i" (for all gates) or "query"
    biased: frozenset[str]  # children with a bias
    sizes: tuple[int, ...]

    @property
    def split(self) -> bool:
        """Whether each gate has its own layers."""
        return "i" not in self.children

    def at(self, child: str, leaf: str) -> str:
        """The name of a child's array in PyTorch's spelling."""
        return ".".join((*self.path, self.children[child], leaf))


def groups(wanted: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]) -> list[Group]:
    """The PyTorch layers with stacked arrays; `wanted` maps PyTorch names to names to look for."""
    recurrent: dict[str, dict[str, str]] = defaultdict(dict)
    attention: dict[str, dict[str, str]] = defaultdict(dict)
    for key, name in wanted.items():
        module, _, part = respelled(name).rpartition(".")
        if part in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            recurrent[module][part] = key
        for end, part in _PROJECTIONS.items():
            if name == end or name.endswith(f".{end}"):
                attention[name.removesuffix(end).removesuffix(".")].setdefault(part, key)
    found = [_recurrent(module, keys, shapes) for module, keys in recurrent.items()]
    found += [_attention(module, keys, shapes) for module, keys in attention.items()]
    return [group for group in found if group is not None]


def _recurrent(module: str, keys: dict[str, str], shapes: Mapping[str, Any]) -> Group | None:
    of = {part: shapes[key] for part, key in keys.items()}
    ih, hh = of.get("weight_ih", ()), of.get("weight_hh", ())
    if len(ih) != 2 or len(hh) != 2 or ih[0] != hh[0] or not hh[1] or hh[0] % hh[1]:
        return None
    kind = {len(gates): kind for kind, gates in GATES.items()}.get(hh[0] // hh[1])
    fits = all(shape == ih[:1] for part, shape in of.items() if part.startswith("bias"))
    place = respelled(keys["weight_ih"]).rpartition(".")[0]
    return Group(module, place, kind, keys, (ih[1], hh[1])) if kind and fits else None


def _attention(module: str, keys: dict[str, str], shapes: Mapping[str, Any]) -> Group | None:
    projections = {"qkv.weight"} if "qkv.weight" in keys else {f"{h}.weight" for h in _HEADS[:3]}
    of = {part: shapes[key] for part, key in keys.items()}
    if not projections <= keys.keys() or any(len(of[part]) != 2 for part in projections):
        return None
    if any(len(shape) < 1 or shape[0] % 3 for part, shape in of.items() if part[:3] == "qkv"):
        return None
    part = min(projections)
    (end,) = (end for end in _PROJECTIONS if keys[part] == end or keys[part].endswith(f".{end}"))
    out, size = of[part]
    place = keys[part].removesuffix(end).removesuffix(".")
    return Group(module, place, ATTENTION, keys, (size, out // 3 if len(projections) == 1 else out))


def blocks(shapes: Mapping[Name, tuple[int, ...]]) -> list[Block]:
    """The recurrent cells and attention layers of a Flax model, from its arrays."""
    inside: dict[tuple[str, ...], dict[str, dict[str, Any]]] = defaultdict(
        lambda: defaultdict(dict)
    )
    for name, shape in shapes.items():
        if name.module and not name.statistic:
            inside[name.module[:-1]][name.module[-1]][name.leaf] = shape
    return [
        block
        for path, children in inside.items()
        if (block := _block(path, {k: v for k, v in children.items() if "kernel" in v}))
    ]


def _block(path: tuple[str, ...], arrays: dict[str, dict[str, Any]]) -> Block | None:
    """The cell or attention layer that consists of these; in nnx, layer `if` is called `if_`."""
    plain = {child.removesuffix("_"): child for child in arrays}
    biased = {name for name, child in plain.items() if "bias" in arrays[child]}
    kernels = {name: arrays[child]["kernel"] for name, child in plain.items()}
    if {*_HEADS} <= plain.keys():
        return Block(path, ATTENTION, {h: plain[h] for h in _HEADS}, frozenset(biased), ())
    for kind, gates in GATES.items():
        names = [f"{side}{gate}" for side in "ih" for gate in gates]
        names = ["i", "h"] if kind == "RNN" else names
        if {*names} <= plain.keys() and all(len(kernels[name]) == 2 for name in names):
            sizes = kernels[names[0]]
            return Block(path, kind, {n: plain[n] for n in names}, frozenset(biased), sizes)
    shape = kernels.get("dense_h", ())
    if "dense_i" not in kernels or len(shape) != 2 or not shape[0]:
        return None
    kind = {len(gates): kind for kind, gates in GATES.items()}.get(shape[1] // shape[0])
    children = {"i": plain["dense_i"], "h": plain["dense_h"]}
    sizes = (kernels["dense_i"][0], shape[0])
    biased = frozenset(name[-1] for name in biased)
    return Block(path, kind, children, biased, sizes) if kind else None
