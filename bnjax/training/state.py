"""The state of a training: parameters, optimizer and batch statistics, which go together."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax.training import train_state


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
        return variables_of(self.params, self.batch_stats)


def init_state(
    model: nn.Module,
    tx: optax.GradientTransformation,
    key: jax.Array,
    x: Any,
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
        rejected=current.rejected + jnp.where(accepted, 0, 1),
    )


def variables_of(params: Any, batch_stats: Any) -> dict[str, Any]:
    """The variables of a model; without statistics it has no collection for them."""
    return {"params": params} | ({"batch_stats": batch_stats} if batch_stats else {})
