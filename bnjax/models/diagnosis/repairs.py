"""The lines of code that mend statistics, in linen and in nnx."""

from collections.abc import Mapping
from typing import Any, NamedTuple


class Repairs(NamedTuple):
    """What to write; `model`, `variables`, `batches` and `batch` are the user's own.

    Attributes:
        train: trains so that updates are kept.
        evaluate: evaluates by running statistics, where the batch norms say so.
        stay: evaluates so that no statistic moves.
        recalibrate: measures the statistics anew.
        widen: makes statistics float32.
        merge: makes one set of statistics of those of several devices.
        finite: shows which arrays are not finite.
        freeze: normalizes by running statistics in training, too.
        left_on: how a model comes to train while it is evaluated.
        thrown_away: how updates are lost.
    """

    train: str
    evaluate: str
    stay: str
    recalibrate: str
    widen: str
    merge: str
    finite: str
    freeze: str
    left_on: str
    thrown_away: str


LINEN = Repairs(
    train="logits, updates = model.apply(variables, x, mutable=['batch_stats'])"
    "; variables = {**variables, **updates}",
    evaluate="model.apply(variables, x, train=False)",
    stay="model.apply(variables, x)  # without mutable, without train=True",
    recalibrate="variables = bnjax.recalibrate(model, variables, batches)",
    widen="variables['batch_stats'] = jax.tree.map(jnp.float32, variables['batch_stats'])",
    merge="variables['batch_stats'] = bnjax.merge_batch_stats(variables['batch_stats'])",
    finite="jax.tree.map(lambda a: bool(jnp.isfinite(a).all()), (variables, batch))",
    freeze="with bnjax.freeze('**'):",
    left_on="with mutable statistics",
    thrown_away="`mutable` was not given, or its result not kept",
)
NNX = Repairs(
    train="model.train(); logits = model(x)  # in nnx.jit and nnx.grad, not in jax.jit",
    evaluate="model.eval()",
    stay="model.eval()",
    recalibrate="nnx.update(model, bnjax.recalibrate(model, None, batches))",
    widen="nnx.update(model, jax.tree.map(jnp.float32, nnx.state(model, nnx.BatchStat)))",
    merge="nnx.update(model, bnjax.merge_batch_stats(state))",
    finite="jax.tree.map(lambda a: bool(jnp.isfinite(a).all()), (nnx.state(model), batch))",
    freeze="bnjax.nnx.freeze(model)",
    left_on="with .train() on",
    thrown_away="the model trained in .eval(), or what a jitted step changed was not kept",
)


def repairs(nnx: bool, kwargs: Mapping[str, Any]) -> Repairs:
    """Those for a model that is evaluated with these arguments, such as `train=False`."""
    if nnx:
        return NNX
    flags = {name: value for name, value in kwargs.items() if isinstance(value, bool)}
    turned = "".join(f", {name}={not value}" for name, value in flags.items())
    return LINEN._replace(train=LINEN.train.replace("variables, x", f"variables, x{turned}"))
