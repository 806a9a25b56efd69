"""Apply the edits of a fold to variables, before or after quantization."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta

from bnjax.models.folding.numbers import PAD, Edit, Forward, Key, Merge, Numbers
from bnjax.models.folding.windows import Window
from bnjax.models.statistics import Path

Quantize = Callable[[jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True, eq=False)
class Edits:
    """The changes that a fold makes to variables.

    Attributes:
        each: the edits, in order.
        quantize: a function to call on folded kernels, if any.
    """

    each: tuple[Edit, ...]
    quantize: Quantize | None = None

    @functools.cached_property
    def norms(self) -> dict[Path, tuple[Any, Any]]:
        """The input and output dtypes of the batch norms that now return their input."""
        folded = (edit.norm for edit in self.each if not isinstance(edit, Merge))
        return {norm.path: norm.dtypes for norm in folded}

    @functools.cached_property
    def gone(self) -> dict[Path, Merge]:
        """The merges of the branches that now return zeros."""
        return {edit.branch.path: edit for edit in self.each if isinstance(edit, Merge)}

    @functools.cached_property
    def merges(self) -> dict[Path, list[Merge]]:
        """The branches that were merged into each layer."""
        hosts = {edit.host.path for edit in self.gone.values()}
        return {host: [m for m in self.gone.values() if m.host.path == host] for host in hosts}

    @functools.cached_property
    def padded(self) -> dict[Path, Window]:
        """The windows of layers that pad with a value per channel."""
        found = (edit.layer for edit in self.each if isinstance(edit, Forward) and edit.pads)
        return {call.path: call.linear.window for call in found if call.linear.window}

    @functools.cached_property
    def layers(self) -> frozenset[Path]:
        """The layers with a new kernel."""
        changed = (e.host if isinstance(e, Merge) else e.layer for e in self.each)
        return frozenset(call.path for call in changed) - self.gone.keys()

    def fold(self, flat: Mapping[Key, Any], xp: Any) -> dict[Key, Any]:
        """Fold variables, by collection and path."""
        numbers = self._run(flat, xp)
        biases = numbers
        if self.quantize is not None:
            # The shift of a batch norm passes through the next layer's quantized kernel.
            biases = self._run({**flat, **self.fake_quantize(flat)}, xp)
        out = {k: v for k, v in flat.items() if k[1:-1] not in {*self.norms, *self.gone}}
        for key in numbers.new:
            if key[1:-1] in self.layers:
                value = (numbers if key[-1] == "kernel" else biases).new[key]
                out[key] = _as(value, key, flat, xp is np)
        return out

    def quantized(self, flat: Mapping[Key, Any]) -> dict[Key, Any]:
        """Folded variables with their kernels quantized."""
        keys = [("params", *path, "kernel") for path in self.layers]
        each = ((key, flat[key]) for key in keys if key in flat)
        kernels = {k: meta.replace_boxed(v, self._quantized(meta.unbox(v), k)) for k, v in each}
        return {**flat, **kernels}

    def fake_quantize(self, flat: Mapping[Key, Any]) -> dict[Key, Any]:
        """Unfolded kernels that compute the same as the folded and quantized ones."""
        fixed = {
            key: jax.lax.stop_gradient(leaf) if key[0] == "batch_stats" else leaf
            for key, leaf in flat.items()
        }
        numbers, found = self._run(fixed, jnp), {}
        for path in self.layers & numbers.gains.keys():
            key = ("params", *path, "kernel")
            old, folded = meta.unbox(flat[key]), numbers.new[key]
            gain = jnp.asarray(numbers.gains[path], folded.dtype)
            change = self._quantized(folded.astype(old.dtype), key) - folded
            info = jnp.finfo(gain.dtype)
            lost = jnp.abs(gain) < info.tiny / info.eps  # its channel is folded to zero
            change = jnp.where(lost, 0, change / jnp.where(lost, 1, gain))
            found[key] = meta.replace_boxed(flat[key], (old + change).astype(old.dtype))
        return found

    def _quantized(self, kernel: jax.Array, key: Key) -> jax.Array:
        assert self.quantize is not None
        value = self.quantize(kernel)
        if jnp.shape(value) != kernel.shape:
            raise ValueError(
                f"`quantize` must preserve the shape of the kernel, {kernel.shape} at "
                f"'{'/'.join(key[1:-1])}', got {jnp.shape(value)}."
            )
        return jnp.asarray(value, kernel.dtype)

    def _run(self, flat: Mapping[Key, Any], xp: Any) -> Numbers:
        numbers = Numbers(flat, xp)
        for edit in self.each:
            edit.run(numbers)
        return numbers


def _as(value: Any, key: Key, flat: Mapping[Key, Any], exact: bool) -> Any:
    """Give an array the dtype, box and device of the one that it replaces."""
    kernel = flat[(*key[:-1], "kernel")]
    box = flat.get(key, kernel)
    old = meta.unbox(box)
    dtype = jnp.promote_types(old.dtype, jnp.float32) if key[-1] == PAD else old.dtype
    new = jnp.asarray(value.astype(dtype))
    # Keep uncommitted arrays uncommitted: a committed one compiles as a sharded program.
    if exact and isinstance(old, jax.Array) and old.committed and old.shape == new.shape:
        new = jax.device_put(new, old.sharding)
    return meta.replace_boxed(box, new) if key in flat else new
