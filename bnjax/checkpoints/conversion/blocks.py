"""Layers that are several arrays in one framework and one in the other: recurrent cells, attention.

PyTorch stacks the gates of an LSTM (i, f, g, o) or a GRU (r, z, n) along the first axis, and has a
bias for the input and another for the state. Flax has one layer for each gate, or, in most cells of
nnx, one for all of them, and leaves out a bias where both are only added. PyTorch's attention
stacks query, key and value.
"""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any, NamedTuple

from bnjax.checkpoints.conversion.names import Name, respelled

ATTENTION = "attention"
GATES = {"LSTM": "ifgo", "GRU": "rzn", "RNN": "h"}
_HEADS = ("query", "key", "value", "out")
# What torch.nn.MultiheadAttention and the attention of others call their arrays.
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
    """A layer of PyTorch whose arrays are stacked."""

    module: str  # the name to look for
    place: str  # its name in PyTorch
    kind: str
    keys: Mapping[str, str]  # by their part, PyTorch's names
    sizes: tuple[int, ...]  # in, out

    def __str__(self) -> str:  # noqa: D105 - the class says it
        what = "attention" if self.kind == ATTENTION else f"{self.kind}, its gates stacked,"
        return (
            f"{what} {self.module or 'at the top'} {self.sizes} of {', '.join(self.keys.values())}"
        )


class Block(NamedTuple):
    """A layer of Flax that is made of other layers, with those that have a bias."""

    path: tuple[str, ...]
    kind: str
    children: Mapping[str, str]  # "ii", or "i" of all gates, or "query": the name in the model
    biased: frozenset[str]
    sizes: tuple[int, ...]

    @property
    def split(self) -> bool:
        """Whether each gate has layers of its own."""
        return "i" not in self.children

    def at(self, child: str, leaf: str) -> str:
        """Flax's array, by the name that PyTorch would give it."""
        return ".".join((*self.path, self.children[child], leaf))


def groups(wanted: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]) -> list[Group]:
    """The layers of PyTorch with stacked arrays, from its names with those to look for."""
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
    """The recurrent cells and attention layers among the arrays of a Flax model."""
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
    """The cell or attention that these layers make up. `if` is `if_` where it is an attribute."""
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
