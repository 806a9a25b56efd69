"""The compiled step that users call: it checks each batch and moves it to the devices."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from bnjax.models.batches import Layout, on_all, shardings
from bnjax.models.frames import Met
from bnjax.training import checks


class Compiled:
    """A compiled step, data-parallel over a mesh if there is one.

    Args:
        step: a function of a state and a batch.
        batches: the layout of the batches.
        mesh: the mesh, or None.
        microbatches: how many parts a batch is split into; 0 in evaluation, where batches are
            padded.
        donate: reuse the memory of the state.
        met: what the step records of its batch norms.
        check: raises an error for a state of another kind.

    Attributes:
        layout: the layout of the batches.
        met: the batch norms that were called while it was traced, by path.
    """

    def __init__(
        self,
        step: Callable[[Any, Any], Any],
        batches: Layout,
        mesh: Mesh | None,
        *,
        microbatches: int = 0,
        donate: bool = False,
        met: Mapping[str, Met] | None = None,
        check: Callable[[Any], None] | None = None,
    ) -> None:
        self.layout, self._microbatches = batches, microbatches
        self.met = {} if met is None else met
        self._check = check
        self._mesh, self._shardings, shard = mesh, None, {}
        if mesh is not None:
            checks.mesh(mesh)
            self._shardings = shardings(mesh)
            alike = self._shardings[1]
            shard = {"in_shardings": (alike, None), "out_shardings": alike}
        self._compiled = jax.jit(step, donate_argnums=0 if donate else (), **shard)

    def __call__(self, state: Any, batch: Any) -> Any:
        """Run the step."""
        if self._check is not None:
            self._check(state)
        batch, layout = self.layout.named(batch), self.layout
        checks.not_donated(state)
        devices = 1 if self._mesh is None else len(self._mesh.local_devices)
        if self._microbatches:
            checks.divides(layout.size(batch), devices, self._microbatches)
        if self._shardings is None:
            return self._compiled(state, batch)
        auto, alike, split = self._shardings
        batch = batch if self._microbatches else layout.padded(batch, devices)
        with jax.set_mesh(auto):  # not the user's, whose axes may be explicit
            return self._compiled(on_all(state, alike), layout.split(batch, alike, split))
