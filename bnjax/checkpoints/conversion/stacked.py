"""Split PyTorch's stacked arrays into the parts that Flax's layers hold, and join them again."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from bnjax.checkpoints.conversion.blocks import ATTENTION, GATES, Block, Group
from bnjax.core.moments import working_dtype

Part = tuple[str, str]  # a layer in a block, such as "ii" or "query", and "weight" or "bias"
Arrays = Mapping[str, np.ndarray]
_SIDES = "ih"
_STACKED = ("query", "key", "value")


class Attention(NamedTuple):
    """Attention in PyTorch, paired with its counterpart in Flax."""

    group: Group
    block: Block

    def split(self, arrays: Arrays) -> dict[Part, np.ndarray]:
        """Split the arrays into parts, in PyTorch's layout."""
        parts: dict[Part, np.ndarray] = {}
        for part, key in self.group.keys.items():
            child, leaf = part.split(".")
            if child == "qkv":
                rows = np.split(arrays[key], 3)
                parts |= {(name, leaf): row for name, row in zip(_STACKED, rows, strict=True)}
            else:
                parts[child, leaf] = arrays[key]
        return parts

    def join(self, parts: Mapping[Part, np.ndarray], old: Arrays) -> dict[str, np.ndarray]:
        """Join parts to PyTorch's arrays."""
        made = {}
        for part, key in self.group.keys.items():
            child, leaf = part.split(".")
            names = [(name, leaf) for name in (_STACKED if child == "qkv" else (child,))]
            if all(name in parts for name in names):
                made[key] = np.concatenate([parts[name] for name in names])
        return made

    def label(self, part: Part) -> str:
        """The name of a part in messages: its array, and its rows there."""
        child, leaf = part
        own = self.group.keys.get(f"{child}.{leaf}")
        if own is not None:
            return own
        return _rows(self.group.keys[f"qkv.{leaf}"], _STACKED.index(child), self.group.sizes[1])

    def lost(self, arrays: Arrays) -> list[str]:
        """What Flax's layer cannot hold: nothing, unlike for recurrent layers."""
        return []

    def unknown(self, parts: Mapping[Part, np.ndarray]) -> list[str]:
        """What PyTorch's layer cannot hold: nothing."""
        return []


class Recurrent(NamedTuple):
    """A recurrent layer in PyTorch, paired with its cell in Flax."""

    group: Group
    block: Block

    def split(self, arrays: Arrays) -> dict[Part, np.ndarray]:
        """Split the arrays into parts, in PyTorch's layout; sum two biases if Flax has only one."""
        keys, count = self.group.keys, len(self._gates)
        weights = [arrays[keys[f"weight_{side}h"]] for side in _SIDES]
        biases = _placed(self._biases(arrays), self._places, self._added)
        parts: dict[Part, np.ndarray] = {}
        for side, weight, bias in zip(_SIDES, weights, biases, strict=True):
            rows = np.split(weight, count) if self.block.split else [weight]
            parts |= {
                (child, "weight"): row for child, row in zip(self._at(side), rows, strict=True)
            }
            rows = bias if self.block.split else [bias.reshape(-1)]
            parts |= {(child, "bias"): row for child, row in zip(self._at(side), rows, strict=True)}
        return {
            (child, leaf): array
            for (child, leaf), array in parts.items()
            if leaf == "weight" or child in self.block.biased
        }

    def join(self, parts: Mapping[Part, np.ndarray], old: Arrays) -> dict[str, np.ndarray]:
        """Join parts to PyTorch's arrays.

        If Flax has only the sum of two biases, restore the old ones if they have this sum;
        otherwise one is the sum and the other is 0.
        """
        keys = self.group.keys
        made = {
            keys[f"weight_{side}h"]: np.concatenate([parts[c, "weight"] for c in self._at(side)])
            for side in _SIDES
        }
        if self._has_biases:
            found = self._found(parts)
            both = _unplaced(found, self._places, self._added, self._biases(old))
            for side, bias in zip(_SIDES, both, strict=True):
                if f"bias_{side}h" in keys:
                    made[keys[f"bias_{side}h"]] = bias.reshape(-1)
        return made

    def label(self, part: Part) -> str:
        """The name of a part in messages: its array, and its rows there."""
        child, leaf = part
        keys, number = self.group.keys, 0
        if self.block.split:
            number = self._gates.index(child[1])
        name = keys.get(f"{leaf}_{child[0]}h", f"no {self.group.place}.{leaf}_{child[0]}h")
        if leaf == "bias" and self._has_biases and self._alone[number]:
            name = " + ".join(key for part, key in keys.items() if part.startswith("bias"))
        return _rows(name, number, self.group.sizes[1]) if self.block.split else name

    def lost(self, arrays: Arrays) -> list[str]:
        """What Flax's cell cannot hold: PyTorch's bias inside a reset gate, for most nnx cells."""
        places = self._places
        kept = places | (places[::-1] & self._added)
        if not self._biases(arrays)[~kept].any():
            return []
        names = [key for part, key in self.group.keys.items() if part.startswith("bias")]
        cell, size = "/".join(self.block.path) or "the top", self.group.sizes[1]
        line = f"no counterpart: {' and '.join(names)}. "
        if self.group.kind == "GRU" and not self.block.split:
            return [
                f"{line}The flax.nnx.GRUCell at {cell} has no bias inside its reset gate; add one "
                f"first: cell.dense_h = nnx.Linear({size}, {3 * size}, rngs=rngs)"
            ]
        return [f"{line}{cell} has no such bias"]

    def unknown(self, parts: Mapping[Part, np.ndarray]) -> list[str]:
        """What PyTorch's layer cannot hold: biases, if it has bias=False."""
        if self._has_biases or not self._found(parts).any():
            return []
        cell = "/".join(self.block.path) or "the top"
        return [f"no counterpart: biases of {cell}. {self.group.place} has bias=False in PyTorch"]

    @property
    def _gates(self) -> str:
        return GATES[self.group.kind]

    @property
    def _has_biases(self) -> bool:
        return any(part.startswith("bias") for part in self.group.keys)

    def _at(self, side: str) -> list[str]:
        """The layers of one side, in the order of the gates."""
        return [f"{side}{gate}" for gate in self._gates] if self.block.split else [side]

    @property
    def _places(self) -> np.ndarray:
        """Whether Flax has a bias, by side and gate."""
        has = [[child in self.block.biased for child in self._at(side)] for side in _SIDES]
        return np.broadcast_to(np.array(has), (2, len(self._gates)))

    @property
    def _added(self) -> np.ndarray:
        """Whether both biases of a gate are simply added, unlike that inside a GRU's reset gate."""
        return np.array([self.group.kind != "GRU" or gate in "rz" for gate in self._gates])

    @property
    def _alone(self) -> np.ndarray:
        """Whether Flax has only the sum of both biases of a gate."""
        return (self._places.sum(0) == 1) & self._added

    def _biases(self, arrays: Arrays) -> np.ndarray:
        """Both biases by side and gate; 0 where PyTorch has none."""
        keys, shape = self.group.keys, (len(self._gates), self.group.sizes[1])
        held = [arrays.get(keys.get(f"bias_{side}h", "")) for side in _SIDES]
        weight = arrays[keys["weight_hh"]]
        return np.stack(
            [np.zeros(shape, weight.dtype) if b is None else b.reshape(shape) for b in held]
        )

    def _found(self, parts: Mapping[Part, np.ndarray]) -> np.ndarray:
        """Flax's biases by side and gate; 0 where it has none."""
        some = parts[self._at("i")[0], "weight"]
        rows = (
            (self.group.sizes[1],) if self.block.split else (len(self._gates), self.group.sizes[1])
        )
        none = np.zeros(rows, some.dtype)
        sides = [[parts.get((c, "bias"), none) for c in self._at(side)] for side in _SIDES]
        return np.stack([np.stack(side).reshape(len(self._gates), -1) for side in sides])


def _placed(biases: np.ndarray, places: np.ndarray, added: np.ndarray) -> np.ndarray:
    """PyTorch's two biases at Flax's places; their sum where Flax has only one."""
    wide = biases.astype(working_dtype(biases.dtype))
    alone = places & ~places[::-1] & added
    with np.errstate(invalid="ignore"):  # biases may be infinite
        total = wide + wide[::-1]
    return np.where(places[..., None], np.where(alone[..., None], total, biases), 0)


def _unplaced(
    found: np.ndarray, places: np.ndarray, added: np.ndarray, old: np.ndarray
) -> np.ndarray:
    """PyTorch's two biases from Flax's."""
    total = np.where(places[0][:, None], found[0], found[1])  # the other one is 0
    placed = _placed(old, places, added).astype(found.dtype)
    before = np.where(places[0][:, None], placed[0], placed[1])
    alone = ((places.sum(0) == 1) & added)[:, None]
    same = alone & ((total == before) | ((total != total) & (before != before)))  # NaN too
    summed = np.stack([np.where(same, old[0], total), np.where(same, old[1], 0)])
    return np.where(alone, summed, found).astype(found.dtype)


def _rows(name: str, number: int, size: int) -> str:
    return f"{name}[{number * size}:{(number + 1) * size}]"


def stacked(group: Group, block: Block) -> Attention | Recurrent:
    """Pair a PyTorch layer with its block in Flax."""
    return (Attention if group.kind == ATTENTION else Recurrent)(group, block)
