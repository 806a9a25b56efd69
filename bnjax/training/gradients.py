"""Loss and gradients of a batch, in one piece or in micro-batches, and what the model has moved."""

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

# XLA has no fast convolutions inside a loop on CPUs, so few micro-batches stand one after another.
_FEW = 8
_TRAIN = "Give what it trains with, as in train_step(loss_fn, apply_kwargs={'train': True})."

_EVALUATE = "Give what it evaluates with, as in eval_step(loss_fn, apply_kwargs={'train': False})."

# `apply(params, collections, args, kwargs, key)` gives outputs and new collections.
Apply = Callable[[Any, Any, tuple, dict, Any], tuple[Any, Any]]


@dataclasses.dataclass(frozen=True)
class Objective:
    """A loss over batches of a layout.

    Attributes:
        loss_fn: as for `train_step`.
        layout: of the batches.
        microbatches: how many parts of a batch are run one after another.
        mask_statistics: whether the examples that don't count, count in no statistics either.
        unroll: whether the parts are compiled one after another; None for what is fast.
    """

    loss_fn: LossFn
    layout: Layout
    microbatches: int
    mask_statistics: bool
    unroll: bool | None = None
    met: dict[str, Met] = dataclasses.field(default_factory=dict)  # when it was traced

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
        """Gradients, collections after the step, the loss and the means of all that is reported.

        Args:
            apply: the model.
            params: what the gradients are of.
            collections: what the model may change; the statistics are `batch_stats`.
            batch: a batch.
            key: a random key for the model, or None.
            step: the number of this step.
            scale: of the loss, before its gradients are taken.
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
        """The sums of gradients and totals over micro-batches, and the moments pooled."""
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
                add = jax.jit(add)  # traced once, and inlined by XLA
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
    """The totals of a batch in evaluation, of which `forward` gives the outputs."""
    args, kwargs = layout.call(batch)
    with counting(batch.get("mask"), batch.get("bank")), checks.called_with(_EVALUATE):
        outputs = forward(*args, **kwargs)
    return layout.totals(loss_fn, outputs, batch)[1]


def _stats(change: Callable[[Any], Any], collections: Mapping[str, Any]) -> dict[str, Any]:
    """The collections with other statistics, if there are any."""
    new = dict(collections)
    return new | {"batch_stats": change(new["batch_stats"])} if "batch_stats" in new else new


def _nothing(sums: Any) -> jax.Array:
    """0, but XLA knows that only when the sums are there: no two micro-batches are held at once."""
    ends = sum(jnp.real(jnp.ravel(leaf)[0]) for leaf in jax.tree.leaves(sums) if leaf.size)
    return jnp.asarray((ends == ends) & (ends != ends), jnp.int32)


def _zeros(like: Any) -> jax.Array:
    """Where to add up: in float32 at least."""
    return jnp.zeros(like.shape, working_dtype(like.dtype))
