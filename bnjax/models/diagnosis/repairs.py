"""Lines of code that fix a model's statistics, in linen and in nnx."""

from collections.abc import Mapping
from typing import Any, NamedTuple


class Repairs(NamedTuple):
    """Lines for linen; `model`, `variables`, `batches` and `batch` are the user's own."""

    # Train and keep the updates.
    train: str = (
        "logits, updates = model.apply(variables, x, mutable=['batch_stats'])"
        "; variables = {**variables, **updates}"
    )
    # Pass the mode of the model to each layer.
    hand_on: str = "norm(x, use_running_average=not train)  # the mode of the model, in each layer"
    # Evaluate with running statistics.
    evaluate: str = "model.apply(variables, x, train=False)"
    # Evaluate without moving the statistics.
    stay: str = "model.apply(variables, x)  # without mutable, without train=True"
    # Recompute the statistics.
    recalibrate: str = "variables = bnjax.recalibrate(model, variables, batches)"
    # Convert them to float32.
    widen: str = "variables['batch_stats'] = jax.tree.map(jnp.float32, variables['batch_stats'])"
    # Merge those of several devices.
    merge: str = "variables['batch_stats'] = bnjax.merge_batch_stats(variables['batch_stats'])"
    # Show which arrays are not finite.
    finite: str = "jax.tree.map(lambda a: bool(jnp.isfinite(a).all()), (variables, batch))"
    # Normalize by running statistics in training, too.
    freeze: str = "with bnjax.freeze('**'):"
    # How a model ends up training while it is evaluated, and how updates get lost.
    left_on: str = "with mutable statistics"
    thrown_away: str = "`mutable` was not given, or its result not kept"


NNX = Repairs(
    train="model.train(); logits = model(x)  # in nnx.jit and nnx.grad, not in jax.jit",
    hand_on="model.train(); norm(x)  # without use_running_average in the call",
    evaluate="norm(x)  # in evaluation, without use_running_average=False in the call",
    stay="norm(x)  # in evaluation, without use_running_average=False in the call",
    recalibrate="nnx.update(model, bnjax.recalibrate(model, None, batches))",
    widen="nnx.update(model, jax.tree.map(jnp.float32, nnx.state(model, nnx.BatchStat)))",
    merge="nnx.update(model, bnjax.merge_batch_stats(state))",
    finite="jax.tree.map(lambda a: bool(jnp.isfinite(a).all()), (nnx.state(model), batch))",
    freeze="bnjax.nnx.freeze(model)",
    left_on="by use_running_average=False in the call of the layer",
    thrown_away="the model trained in .eval(), or what a jitted step changed was not kept",
)


def repairs(nnx: bool, kwargs: Mapping[str, Any]) -> Repairs:
    """The lines for a model that is evaluated with these arguments, such as `train=False`."""
    if nnx:
        return NNX
    flags = {name: value for name, value in kwargs.items() if isinstance(value, bool)}
    turned = "".join(f", {name}={not value}" for name, value in flags.items())
    return Repairs(train=Repairs().train.replace("variables, x", f"variables, x{turned}"))
