"""Training and evaluation of linen models with batch statistics: one state, two steps."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax.training import train_state

from bnjax import _checks

Batch = Mapping[str, Any]
Metrics = dict[str, jax.Array]
LossFn = Callable[[Any, Batch], Any]


class TrainState(train_state.TrainState):
    """Flax's `TrainState` with the batch statistics that belong to its parameters.

    Attributes:
        batch_stats: the running statistics, `{}` for a model without any.
        rng: the key from which each step derives its own, by its number; None without dropout.
        rejected: how many steps were not committed.
    """

    batch_stats: Any
    rng: jax.Array | None
    rejected: jax.Array

    @property
    def variables(self) -> dict[str, Any]:
        """The variables to evaluate the model with."""
        return _variables(self.params, self.batch_stats)


def init_state(
    model: nn.Module,
    tx: optax.GradientTransformation,
    key: jax.Array,
    x: jax.Array,
    **apply_kwargs: Any,
) -> TrainState:
    """A new `TrainState` for a linen model and an optax optimizer.

    Args:
        model: any linen model; without batch norm it has no statistics, and that is fine.
        tx: the optimizer.
        key: seeds the parameters, and the random numbers of the steps.
        x: an input, or its `jax.ShapeDtypeStruct`, to initialize the model with.
        **apply_kwargs: what else the model's call needs, such as `train=False`.
    """
    key, rng = jax.random.split(key)
    init_key, dropout_key = jax.random.split(key)
    variables = model.lazy_init({"params": init_key, "dropout": dropout_key}, x, **apply_kwargs)
    return TrainState.create(
        apply_fn=model.apply,
        params=variables["params"],
        tx=tx,
        batch_stats=variables.get("batch_stats", {}),
        rng=rng,
        rejected=jnp.zeros((), jnp.int32),
    )


def train_step(
    loss_fn: LossFn, *, apply_kwargs: Mapping[str, Any] | None = None, donate: bool = True
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """A jitted step: forward with mutable statistics, backward, update, commit.

    Args:
        loss_fn: `loss_fn(outputs, batch)` gives the loss, or `(loss, metrics)` with a dict of
            metrics. Each is an array with one entry for each example, (N,), or a mean, ().
        apply_kwargs: passed to the model's call, such as `{"train": True}`.
        donate: reuse the memory of the state that is passed in, which is then gone.

    Returns:
        `step(state, batch) -> (state, metrics)`. `batch` is a dict: `"x"` is the input of the
        model, `"mask"`, if there is one, a bool (N,) that says which examples count in loss and
        metrics, and the rest is for `loss_fn`. The metrics are means over the batch, with `loss`,
        and `accepted`, which says whether loss and gradients were finite; see `commit`.
    """

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        rngs = None if state.rng is None else {"dropout": jax.random.fold_in(state.rng, state.step)}

        def objective(params: Any) -> tuple[jax.Array, tuple[Any, Metrics]]:
            outputs, updates = state.apply_fn(
                _variables(params, state.batch_stats),
                batch["x"],
                mutable=["batch_stats"],
                rngs=rngs,
                **(apply_kwargs or {}),
            )
            count, totals = _totals(loss_fn, outputs, batch)
            means = {name: total / jnp.maximum(count, 1) for name, total in totals.items()}
            return means["loss"], (updates.get("batch_stats", {}), means)

        gradient = jax.value_and_grad(objective, has_aux=True)
        (loss, (batch_stats, metrics)), grads = gradient(state.params)
        accepted = _all_finite((loss, grads))
        proposed = state.apply_gradients(grads=grads, batch_stats=batch_stats)
        return commit(accepted, proposed, state), metrics | {"accepted": accepted}

    return jax.jit(step, donate_argnums=0 if donate else ())


def eval_step(
    loss_fn: LossFn, *, apply_kwargs: Mapping[str, Any] | None = None
) -> Callable[[TrainState, Batch], Metrics]:
    """A jitted step in evaluation mode: running statistics, nothing moves.

    Args:
        loss_fn: as for `train_step`.
        apply_kwargs: passed to the model's call, such as `{"train": False}`.

    Returns:
        `step(state, batch) -> totals`: sums over the examples of the batch that count, and their
        number, `count`. `evaluate` adds the totals of many batches up.
    """

    def step(state: TrainState, batch: Batch) -> Metrics:
        outputs = state.apply_fn(state.variables, batch["x"], **(apply_kwargs or {}))
        count, totals = _totals(loss_fn, outputs, batch)
        return totals | {"count": count}

    return jax.jit(step)


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
    if count == 0:
        raise ValueError(
            "`batches` must hold at least one example that counts, got none. An iterator that was "
            "used before is empty: pass a list, or make it anew."
        )
    return {name: total / count for name, total in sums.items()}


def commit(accepted: jax.Array, proposed: TrainState, current: TrainState) -> TrainState:
    """The proposed state if the step is accepted; otherwise the current one, with one more reject.

    Parameters, optimizer state and batch statistics go together: statistics that a rejected step
    has seen would poison every later evaluation. `step` counts the attempts, so the order of the
    data and the random numbers go on.

    Args:
        accepted: bool, ().
        proposed: the state after the step.
        current: the state before it.
    """

    def choose(new: Any, old: Any) -> Any:
        return jax.tree.map(lambda n, o: jnp.where(accepted, n, o), new, old)

    return proposed.replace(
        params=choose(proposed.params, current.params),
        opt_state=choose(proposed.opt_state, current.opt_state),
        batch_stats=choose(proposed.batch_stats, current.batch_stats),
        rejected=current.rejected + ~jnp.asarray(accepted),
    )


def _variables(params: Any, batch_stats: Any) -> dict[str, Any]:
    return {"params": params} | ({"batch_stats": batch_stats} if batch_stats else {})


def _totals(loss_fn: LossFn, outputs: Any, batch: Batch) -> tuple[jax.Array, Metrics]:
    """The number of examples that count, and the sums of loss and metrics over them."""
    result = loss_fn(outputs, batch)
    loss, metrics = result if isinstance(result, tuple) else (result, {})
    size = jax.tree.leaves(batch["x"])[0].shape[0]
    mask = jnp.asarray(batch.get("mask", jnp.ones(size, bool)))
    count = jnp.sum(mask, dtype=jnp.float32)

    def total(name: str, value: jax.Array) -> jax.Array:
        value = jnp.asarray(value)
        _checks.per_example(name, value.shape, size)
        value = value.astype(jnp.promote_types(value.dtype, jnp.float32))
        return value * count if value.ndim == 0 else jnp.sum(jnp.where(mask, value, 0))

    return count, {name: total(name, value) for name, value in (metrics | {"loss": loss}).items()}


def _all_finite(tree: Any) -> jax.Array:
    leaves = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]
    return jnp.all(jnp.stack(leaves))
