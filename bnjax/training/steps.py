"""Jitted steps over a `TrainState`: train_step, eval_step, and evaluate over many batches."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from bnjax.models import checks
from bnjax.models.accumulation import accumulating, begin, finish, next_pass, rehearse
from bnjax.models.batches import (
    Batch,
    LossFn,
    Metrics,
    counted,
    named,
    on_all,
    pad_batch,
    shardings,
    size_of,
    split_over,
    totals_of,
)
from bnjax.training.state import TrainState, commit, variables_of

Step = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


def train_step(
    loss_fn: LossFn,
    *,
    apply_kwargs: Mapping[str, Any] | None = None,
    microbatches: int = 1,
    mesh: Mesh | None = None,
    donate: bool = True,
) -> Step:
    """A jitted step: forward with mutable statistics, backward, update, commit.

    Args:
        loss_fn: `loss_fn(outputs, batch)` gives the loss, or `(loss, metrics)` with a dict of
            metrics. Each is an array with one entry for each example, (N,), or a mean, ().
        apply_kwargs: passed to the model's call, such as `{"train": True}`.
        microbatches: cut the batch into this many, one after another, and update once. The running
            statistics are exactly those of the whole batch: moments are pooled, those of a virtual
            batch size too. The gradients are not, since each micro-batch normalizes by its own
            statistics; with few examples in each they are noisier.
        mesh: train data-parallel: the batch is split over all devices of the mesh, the state is on
            each. The result is that of one device. With several processes each passes its own part
            of the batch.
        donate: reuse the memory of the state that is passed in, which is then gone.

    Returns:
        `step(state, batch) -> (state, metrics)`. `batch` is a dict: `"x"` is the input of the
        model, `"mask"`, if there is one, a bool (N,) that says which examples count in loss and
        metrics, and the rest is for `loss_fn`. The metrics are means over the batch, with `loss`,
        and `accepted`, which says whether loss and gradients were finite; see `commit`.

    Raises:
        ValueError: a batch that does not divide by `microbatches` and the devices.
    """
    kwargs = dict(apply_kwargs or {})

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = None if state.rng is None else jax.random.fold_in(state.rng, state.step)
        count = jnp.maximum(counted(batch), 1)

        def gradients(batch_stats: Any, part: Batch, key: Any) -> tuple[Any, Any, Metrics]:
            def objective(params: Any) -> tuple[jax.Array, tuple[Any, Metrics]]:
                outputs, updates = state.apply_fn(
                    variables_of(params, batch_stats),
                    part["x"],
                    mutable=["batch_stats"],
                    rngs=None if key is None else {"dropout": key},
                    **kwargs,
                )
                totals = totals_of(loss_fn, outputs, part)
                means = {name: total / count for name, total in totals.items()}
                return means["loss"], (updates.get("batch_stats", {}), means)

            grads, (moved, means) = jax.grad(objective, has_aux=True)(state.params)
            return grads, moved, means

        if microbatches == 1:
            grads, batch_stats, means = gradients(state.batch_stats, batch, key)
        else:
            grads, batch_stats, means = _accumulate(gradients, state, batch, key, microbatches)
        accepted = _all_finite((means["loss"], grads))
        proposed = state.apply_gradients(grads=grads, batch_stats=batch_stats)
        return commit(accepted, proposed, state), means | {"accepted": accepted}

    return _jit(step, mesh, microbatches, donate)


def eval_step(
    loss_fn: LossFn, *, apply_kwargs: Mapping[str, Any] | None = None, mesh: Mesh | None = None
) -> Callable[[TrainState, Batch], Metrics]:
    """A jitted step in evaluation mode: running statistics, nothing moves.

    Args:
        loss_fn: as for `train_step`.
        apply_kwargs: passed to the model's call, such as `{"train": False}`.
        mesh: split the batch over the devices of the mesh. It need not divide by them: it is
            filled up with examples that do not count.

    Returns:
        `step(state, batch) -> totals`: sums over the examples of the batch that count, and their
        number, `count`. `evaluate` adds the totals of many batches up.
    """

    def step(state: TrainState, batch: Batch) -> Metrics:
        outputs = state.apply_fn(state.variables, batch["x"], **(apply_kwargs or {}))
        return totals_of(loss_fn, outputs, batch) | {"count": counted(batch)}

    sharded = _jit(step, mesh, 1, donate=False)
    if mesh is None:
        return sharded
    devices = len(mesh.local_devices)
    return lambda state, batch: sharded(state, pad_batch(batch, devices))


def evaluate(
    step: Callable[[TrainState, Batch], Metrics], state: TrainState, batches: Iterable[Batch]
) -> dict[str, float]:
    """Means over all examples of all batches, each example counted once.

    Args:
        step: what `eval_step` returned.
        state: the state to evaluate.
        batches: dicts as for `train_step`; they need not be of one size.

    Raises:
        ValueError: there is no batch, or no example that counts.
    """
    sums: dict[str, float] = {}
    for batch in batches:
        for name, value in step(state, batch).items():
            sums[name] = sums.get(name, 0.0) + float(value)
    count = sums.pop("count", 0.0)
    checks.some_batch(count, "example that counts")
    return {name: total / count for name, total in sums.items()}


def _accumulate(
    gradients: Callable, state: TrainState, batch: Batch, key: Any, microbatches: int
) -> tuple[Any, Any, Metrics]:
    """Gradients and means summed, and moments pooled, over the micro-batches."""

    def cut(x: jax.Array) -> jax.Array:
        # Each part takes every so many-th example, and so the same number from each device.
        return jnp.swapaxes(x.reshape(-1, microbatches, *x.shape[1:]), 0, 1)

    def one(carry: tuple[Any, Any], part: tuple[jax.Array, Batch]) -> tuple[Any, None]:
        sums, batch_stats = carry
        part_key = None if key is None else jax.random.fold_in(key, part[0])
        grads, batch_stats, means = gradients(next_pass(batch_stats), part[1], part_key)
        return (jax.tree.map(jnp.add, sums, (grads, means)), batch_stats), None

    parts = jax.tree.map(cut, dict(batch))
    with accumulating() as conventions:
        first = jax.tree.map(lambda x: x[0], parts)

        def rehearsed(batch_stats: Any) -> tuple[Any, Any]:
            grads, batch_stats, means = gradients(batch_stats, first, key)
            return batch_stats, (grads, means)

        calls, (grads, means) = rehearse(rehearsed, begin(state.batch_stats))
        begun = begin(state.batch_stats, calls)
        zeros = jax.tree.map(jnp.zeros_like, (grads, means))
        numbered = (jnp.arange(microbatches), parts)
        ((grads, means), batch_stats), _ = jax.lax.scan(one, (zeros, begun), numbered)
    return grads, finish(batch_stats, conventions), means


def _jit(step: Callable, mesh: Mesh | None, microbatches: int, donate: bool) -> Callable:
    """The step compiled, over the devices of a mesh if there is one."""
    donated = 0 if donate else ()
    if mesh is None:
        compiled = jax.jit(step, donate_argnums=donated)

        def run(state: TrainState, batch: Batch) -> Any:
            batch = named(batch)
            checks.divides(size_of(batch), 1, microbatches)
            return compiled(state, batch)

        return run
    auto, alike, split = shardings(mesh)
    distributed = jax.jit(
        step, in_shardings=(alike, split), out_shardings=alike, donate_argnums=donated
    )

    def run_distributed(state: TrainState, batch: Batch) -> Any:
        batch = named(batch)
        checks.divides(size_of(batch), len(mesh.local_devices), microbatches)
        with jax.set_mesh(auto):  # not the user's, whose axes may be explicit
            return distributed(on_all(state, alike), split_over(split, batch))

    return run_distributed


def _all_finite(tree: Any) -> jax.Array:
    leaves = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]
    return jnp.all(jnp.stack(leaves))
