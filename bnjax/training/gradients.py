"""Loss and gradients of a batch, whole or in micro-batches, and the collections it updated."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from bnjax.core.moments import working_dtype
from bnjax.models.accumulation import accumulating, begin, finish, next_pass, rehearse
from bnjax.models.batches import Batch, Layout, LossFn, Metrics, Totals
from bnjax.models.frames import Met
from bnjax.models.visits import counting, watching
from bnjax.training import checks

# Convolutions inside a loop are slow in XLA on CPUs, so a few micro-batches are unrolled.
_FEW = 8
_TRAIN = "Pass its training arguments, as in train_step(loss_fn, apply_kwargs={'train': True})."
_EVALUATE = (
    "Pass its evaluation arguments, as in eval_step(loss_fn, apply_kwargs={'train': False})."
)

# `apply(params, collections, args, kwargs, key)` gives outputs and new collections.
Apply = Callable[[Any, Any, tuple, dict, Any], tuple[Any, Any]]


@dataclasses.dataclass(frozen=True)
class Objective:
    """A loss on batches of a given layout.

    Attributes:
        loss_fn: as for `train_step`.
        layout: the layout of the batches.
        microbatches: how many parts a batch is run in.
        mask_statistics: whether `mask` also keeps examples out of the statistics.
        unroll: whether the parts are unrolled; None picks what is fast.
        met: the batch norms that were called, filled in when the step is traced.
    """

    loss_fn: LossFn
    layout: Layout
    microbatches: int
    mask_statistics: bool
    unroll: bool | None = None
    met: dict[str, Met] = dataclasses.field(default_factory=dict)

    def __call__(
        self,
        apply: Apply,
        params: Any,
        collections: Any,
        batch: Batch,
        key: Any,
        step: Any,
        scale: Callable,
    ) -> tuple[Any, Any, jax.Array, Metrics]:
        """Gradients, updated collections, the loss, and the means of loss and metrics.

        Args:
            apply: the model.
            params: the parameters to differentiate.
            collections: the collections that the model may update, `batch_stats` among them.
            batch: a batch.
            key: a random key for the model, or None.
            step: the number of this step.
            scale: scales the loss before it is differentiated.
        """
        count = jnp.maximum(self.layout.counted(batch), 1)

        def one(collections: Any, batch: Batch, key: Any) -> tuple[Any, Any, tuple]:
            def objective(params: Any) -> tuple[jax.Array, tuple[Any, tuple]]:
                args, kwargs = self.layout.call(batch)
                mask = batch.get("mask") if self.mask_statistics else None
                with counting(mask, batch.get("bank")), checks.called_with(_TRAIN):
                    outputs, moved = apply(params, collections, args, kwargs, key)
                loss, totals = self.layout.totals(self.loss_fn, outputs, batch)
                return scale(loss / count), (moved, (loss / count, dict(totals)))

            grads, (moved, found) = jax.grad(objective, has_aux=True)(params)
            return grads, moved, found

        with watching(step) as met:
            if self.microbatches == 1:
                grads, moved, (loss, totals) = one(collections, batch, key)
            else:
                grads, moved, (loss, totals) = self._accumulated(one, collections, batch, key)
        moving = [path for path, each in met.items() if each.moves]
        checks.some_moves(moving, [path for path, each in met.items() if not each.frozen])
        self.met.update(met)
        return grads, moved, loss, {name: total / count for name, total in totals.items()}

    def _accumulated(
        self, one: Callable, collections: Mapping[str, Any], batch: Batch, key: Any
    ) -> tuple[Any, Any, Any]:
        """Sums of gradients and totals over the micro-batches, with pooled moments."""
        cut, whole = self.layout.parts(batch, self.microbatches)

        def run(collections: Any, number: Any, part: Any) -> tuple[Any, Any]:
            here = None if key is None else jax.random.fold_in(key, number)
            grads, moved, found = one(_stats(next_pass, collections), whole(part), here)
            return (grads, found), moved

        def add(carry: tuple[Any, Any], part: tuple[Any, Any]) -> tuple[Any, None]:
            sums, collections = carry
            new, moved = run(collections, *part)
            return (jax.tree.map(lambda a, b: a + b.astype(a.dtype), sums, new), moved), None

        with accumulating() as measured:
            begun = _stats(begin, collections)
            first = [leaf[0] for leaf in cut]

            def rehearsed(collections: Any) -> tuple[Any, Any]:
                results, moved = run(collections, 0, first)
                return moved.get("batch_stats", {}), results

            calls, results = rehearse(rehearsed, begun)
            begun = _stats(functools.partial(begin, calls=calls), collections)
            carry = jax.tree.map(_zeros, results), begun
            few = self.microbatches <= _FEW and jax.default_backend() == "cpu"
            if few if self.unroll is None else self.unroll:
                add = jax.jit(add)  # traced once and inlined by XLA
                for number in range(self.microbatches):
                    at = number + _nothing(carry[0])
                    part = [jax.lax.dynamic_index_in_dim(leaf, at, keepdims=False) for leaf in cut]
                    carry, _ = add(carry, (jnp.asarray(number), part))
            else:
                parts = jnp.arange(self.microbatches), cut
                carry, _ = jax.lax.scan(add, carry, parts)
        (grads, found), moved = carry
        grads = jax.tree.map(lambda g, like: g.astype(like.dtype), grads, results[0])
        return grads, _stats(functools.partial(finish, measured=measured), moved), found


def evaluated(loss_fn: LossFn, layout: Layout, forward: Callable[..., Any], batch: Batch) -> Totals:
    """The totals of a batch in evaluation; `forward` computes the outputs."""
    args, kwargs = layout.call(batch)
    with counting(batch.get("mask"), batch.get("bank")), checks.called_with(_EVALUATE):
        outputs = forward(*args, **kwargs)
    return layout.totals(loss_fn, outputs, batch)[1]


def _stats(change: Callable[[Any], Any], collections: Mapping[str, Any]) -> dict[str, Any]:
    """The collections with the statistics changed, if there are any."""
    new = dict(collections)
    return new | {"batch_stats": change(new["batch_stats"])} if "batch_stats" in new else new


def _nothing(sums: Any) -> jax.Array:
    """0, which XLA knows only once the sums are computed, so micro-batches don't overlap."""
    ends = sum(jnp.real(jnp.ravel(leaf)[0]) for leaf in jax.tree.leaves(sums) if leaf.size)
    return jnp.asarray((ends == ends) & (ends != ends), jnp.int32)


def _zeros(like: Any) -> jax.Array:
    """Zeros to accumulate into, in float32 or wider."""
    return jnp.zeros(like.shape, working_dtype(like.dtype))
