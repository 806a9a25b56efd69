"""Average parameters over many steps, and recompute the running statistics for the average."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import nnx, struct

from bnjax.core.moments import working_dtype
from bnjax.models.recalibration import Batches, recalibrate
from bnjax.training.state import TrainState


class Average(struct.PyTreeNode):
    """A running average of the parameters: exponential (EMA), or the mean of all steps (SWA).

    At step n the new parameters get the weight `(1 - decay) / (1 - decay**n)`: an exponential
    average, debiased as in `optax.ema`, so that the initial value has no influence. Without a
    decay, the weight is `1 / n`: the plain mean (Izmailov et al., "Averaging Weights Leads to Wider
    Optima and Better Generalization", 2018).

    The running statistics in a state belong to its current parameters. The average needs its own,
    which `recalibrated` computes.

    An average is a pytree: save it together with the state, using `bnjax.save`, and restore it with
    `bnjax.load(..., like=average)`.

    Guide: examples/guides/recalibration.md

    Attributes:
        params: the average, in float32 or wider; an `nnx.State` for an nnx model.
        count: int32, (): how many steps it averages.
        decay: weight of the old average, such as 0.999; None weighs all steps equally.

    >>> import bnjax
    >>> from bnjax.training import init_state
    >>> model, x = bnjax.BatchNorm1d(), jnp.array([[1.0], [3.0]])
    >>> state = init_state(model, optax.sgd(1.0), jax.random.key(0), x)
    >>> average = Average.start(state, decay=None)
    >>> for scale in (1.0, 3.0):  # as after two training steps
    ...     state = state.replace(params={"scale": jnp.array([scale]), "bias": jnp.zeros(1)})
    ...     average = average.update(state)
    >>> averaged = average.recalibrated(model, state, [x])
    >>> averaged.params["scale"].tolist(), averaged.batch_stats["mean"].tolist()
    ([2.0], [2.0])
    """

    params: Any
    count: jax.Array
    decay: float | None = struct.field(pytree_node=False, default=0.999)

    def __repr__(self) -> str:
        """A one-line summary."""
        return f"Average(count={self.count}, decay={self.decay})"

    @classmethod
    def start(cls, trained: TrainState | nnx.Module, decay: float | None = 0.999) -> "Average":
        """Start an average over no steps yet.

        Args:
            trained: a `TrainState`, or an nnx model.
            decay: weight of the old average, 0 < decay < 1; None weighs all steps equally.

        Raises:
            ValueError: the decay is not between 0 and 1.
        """
        if decay is not None and not 0 < decay < 1:
            raise ValueError(
                "`decay` must be between 0 and 1, such as 0.999, or None to weigh all steps "
                f"equally, got {decay}."
            )
        params = jax.tree.map(lambda leaf: jnp.array(_wide(leaf)), _params(trained))
        return cls(params, jnp.zeros((), jnp.int32), decay)

    def update(self, trained: TrainState | nnx.Module) -> "Average":
        """The average with the current parameters included; call it after each step.

        Args:
            trained: the `TrainState` that the step returned, or the nnx model.
        """
        return _updated(self, _params(trained))

    def recalibrated(
        self,
        model: nn.Module | nnx.Module,
        state: TrainState | None,
        batches: Batches,
        **options: Any,
    ) -> Any:
        """A state or model with the averaged parameters, and statistics recomputed for them.

        Pass it to `evaluate`, `diagnose`, `fold` or `save`, as in
        `evaluate(test, average.recalibrated(model, state, batches), test_batches)`. The state and
        the model passed in are not changed, so training can continue with them.

        Args:
            model: the model.
            state: the `TrainState`; None for an nnx model.
            batches: training data, as for `bnjax.recalibrate`.
            **options: as for `bnjax.recalibrate`, such as `apply_kwargs`.

        Returns:
            A `TrainState`, or an nnx model.

        Raises:
            TypeError: a linen model without its state.
        """
        if isinstance(model, nnx.Module):
            params = _like(self.params, _params(model))
            copy = nnx.clone(model)
            nnx.update(copy, recalibrate(model, params, batches, **options))
            return copy
        if not isinstance(state, TrainState):
            raise TypeError(
                "`state` must be the TrainState of the linen model, as the last step returned it, "
                f"got {type(state).__name__}."
            )
        params = _like(self.params, _params(state))
        variables = {**state.variables, "params": params}
        stats = recalibrate(model, variables, batches, **options)["batch_stats"]
        return state.replace(params=params, batch_stats=stats)


@jax.jit
def _updated(average: Average, params: Any) -> Average:
    count = average.count + 1
    if average.decay is None:
        weight = 1 / count
    else:
        # expm1 stays exact for a decay near 1, where 1 - decay**n would lose all digits.
        weight = (average.decay - 1) / jnp.expm1(count * math.log(average.decay))
    wide = jax.tree.map(_wide, params)
    mean = optax.incremental_update(wide, average.params, weight)
    kept = jax.tree.map(lambda new, old: new.astype(old.dtype), mean, average.params)
    return average.replace(params=kept, count=count)


def _wide(leaf: Any) -> jax.Array:
    """The array in a dtype where small changes add up; half precision would round most away."""
    return jnp.asarray(leaf, working_dtype(jnp.result_type(leaf)))


def _like(average: Any, params: Any) -> Any:
    """The average in the dtypes of the parameters."""
    return jax.tree.map(lambda mean, leaf: mean.astype(leaf.dtype), average, params)


def _params(trained: TrainState | nnx.Module) -> Any:
    """The parameters; with lookahead, the slow ones."""
    if isinstance(trained, nnx.Module):
        return nnx.state(trained, nnx.Param)
    return getattr(trained.params, "slow", trained.params)
