"""A step before it is committed: gradients, updated collections, and whether it is finite."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bnjax.models.batches import Batch, Metrics
from bnjax.training.gradients import Apply, Objective
from bnjax.training.scaling import Scale


class Attempt(NamedTuple):
    """The outcome of a step, to be committed or rejected."""

    grads: Any
    collections: Any  # the model's, after the step
    accepted: jax.Array  # bool, (): loss and gradients are finite and some example counts
    metrics: Metrics
    loss_scale: Any  # for the next step
    loss: jax.Array
    again: Callable[[Any], tuple]  # the objective at other parameters


def attempt(
    objective: Objective, apply: Apply, params: Any, loss_scale: Any, *, batch: Batch, **now: Any
) -> Attempt:
    """Differentiate the loss of a batch, with loss scaling; `now` is as for the objective."""
    scale = Scale(loss_scale)
    compute = functools.partial(objective, apply, batch=batch, **now)
    grads, collections, loss, means = compute(params, scale=scale.up)
    grads = scale.down(grads)
    accepted = _all_finite((loss, grads)) & (objective.layout.counted(batch) > 0)
    metrics = {"loss": loss, "accepted": accepted} | means
    again = functools.partial(compute, scale=lambda loss: loss)
    return Attempt(grads, collections, accepted, metrics, scale.adjusted(accepted), loss, again)


def with_extra_args(
    tx: optax.GradientTransformation,
    found: Attempt,
    to_model: Callable[[Any], Any] = lambda params: params,
    to_optimizer: Callable[[Any], Any] = lambda grads: grads,
) -> optax.GradientTransformation:
    """The optimizer, with the values of the optax extra arguments that it takes.

    Args:
        tx: the optimizer.
        found: the step to update with.
        to_model: converts parameters from the optimizer's tree to the model's.
        to_optimizer: converts gradients from the model's tree to the optimizer's.
    """
    known = {
        "value": found.loss,
        "grad": to_optimizer(found.grads),
        "value_fn": lambda params: found.again(to_model(params))[2],
        "grad_fn": lambda params, _: to_optimizer(found.again(to_model(params))[0]),
    }
    update = optax.with_extra_args_support(tx).update
    taken = inspect.signature(update).parameters.values()
    names = {each.name for each in taken}
    if any(each.kind is each.VAR_KEYWORD for each in taken):
        names |= {"value", "grad", "value_fn"}  # a chain forwards them to the links that take them
    known = {name: value for name, value in known.items() if name in names}
    return optax.GradientTransformation(tx.init, functools.partial(update, **known))


def _all_finite(tree: Any) -> jax.Array:
    leaves = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]
    return jnp.all(jnp.stack(leaves))
