"""The average of the parameters of many steps, with the statistics that belong to it."""

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
    """A running average of the parameters: of the last steps (EMA) or of all alike (SWA).

    After step n the weight of its parameters is `(1 - decay) / (1 - decay**n)`, and without a decay
    `1 / n`: an exponential average that is debiased as `optax.ema` does it, so that no start value
    is left in it; or the plain mean (Izmailov et al., "Averaging Weights Leads to Wider Optima and
    Better Generalization", 2018).

    The running statistics of a training belong to its last parameters. The average needs its own:
    `recalibrated` measures them.

    It is a tree of arrays: `bnjax.save` and `load(..., like=average)` take it beside the state.

    Attributes:
        params: the average, in float32 at least; like the parameters, for nnx an `nnx.State`.
        count: int32, (): how many steps it is of.
        decay: the weight of what was, such as 0.999; None to weigh all steps alike.

    >>> import bnjax
    >>> from bnjax.training import init_state
    >>> model, x = bnjax.BatchNorm1d(), jnp.array([[1.0], [3.0]])
    >>> state = init_state(model, optax.sgd(1.0), jax.random.key(0), x)
    >>> average = Average.start(state, decay=None)
    >>> for scale in (1.0, 3.0):  # as two steps of a training would leave it
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
        """What it is of, in a line."""
        return f"Average(count={self.count}, decay={self.decay})"

    @classmethod
    def start(cls, trained: TrainState | nnx.Module, decay: float | None = 0.999) -> "Average":
        """An average of no step yet.

        Args:
            trained: a `TrainState`, or an nnx model.
            decay: the weight of what was, 0 < decay < 1; None to weigh all steps alike.

        Raises:
            ValueError: the decay is not between 0 and 1.
        """
        if decay is not None and not 0 < decay < 1:
            raise ValueError(
                "`decay` must be between 0 and 1, such as 0.999, or None to weigh all steps alike, "
                f"got {decay}."
            )
        params = jax.tree.map(lambda leaf: jnp.array(_wide(leaf)), _params(trained))
        return cls(params, jnp.zeros((), jnp.int32), decay)

    def update(self, trained: TrainState | nnx.Module) -> "Average":
        """The average with the parameters as they are now, to be called after a step.

        Args:
            trained: the `TrainState` that the step has returned, or the nnx model.
        """
        return _updated(self, _params(trained))

    def recalibrated(
        self,
        model: nn.Module | nnx.Module,
        state: TrainState | None,
        batches: Batches,
        **options: Any,
    ) -> Any:
        """What was trained, with the average as its parameters and the statistics of these.

        It is for `evaluate`, `diagnose`, `fold` or `save`, as in
        `evaluate(test, average.recalibrated(model, state, batches), test_batches)`. The training
        goes on with the state and the model that it had, which are not touched.

        Args:
            model: the model.
            state: the `TrainState`; None for an nnx model.
            batches: of the training's data, as for `bnjax.recalibrate`.
            **options: as for `bnjax.recalibrate`, such as `apply_kwargs`.

        Returns:
            A `TrainState`, or an nnx model.

        Raises:
            TypeError: a linen model comes without its state.
        """
        if isinstance(model, nnx.Module):
            params = _like(self.params, _params(model))
            copy = nnx.clone(model)
            nnx.update(copy, recalibrate(model, params, batches, **options))
            return copy
        if not isinstance(state, TrainState):
            raise TypeError(
                "`state` must be the TrainState of the linen model, as the last step has returned "
                f"it, got {type(state).__name__}."
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
        # For a decay near 1 as exact, where 1 - decay**n would lose its digits.
        weight = (average.decay - 1) / jnp.expm1(count * math.log(average.decay))
    wide = jax.tree.map(_wide, params)
    mean = optax.incremental_update(wide, average.params, weight)
    kept = jax.tree.map(lambda new, old: new.astype(old.dtype), mean, average.params)
    return average.replace(params=kept, count=count)


def _wide(leaf: Any) -> jax.Array:
    """An array in which small changes add up: in half precision most would be rounded away."""
    return jnp.asarray(leaf, working_dtype(jnp.result_type(leaf)))


def _like(average: Any, params: Any) -> Any:
    """The average in the dtypes of the parameters."""
    return jax.tree.map(lambda mean, leaf: mean.astype(leaf.dtype), average, params)


def _params(trained: TrainState | nnx.Module) -> Any:
    """The parameters; of lookahead's the slow ones."""
    if isinstance(trained, nnx.Module):
        return nnx.state(trained, nnx.Param)
    return getattr(trained.params, "slow", trained.params)
