"""Each policy in float64 NumPy, with gradients written by hand."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from bnjax.policies import Batch, Blend, Example, Policy, Renorm, Running
from tests.support.oracle import Outcome, measure


class Chosen(NamedTuple):
    """How a policy normalizes: the weight of the batch, then scale `r` and shift `d`."""

    weight: Any = 1.0
    between: bool = True
    r: Any = 1.0
    d: Any = 0.0


class Seen(NamedTuple):
    """Batch moments, running moments, and the number of examples; their shapes broadcast."""

    mean: Any
    var: Any
    running_mean: Any
    running_var: Any
    examples: Any


Choice = Callable[[Seen], Chosen]


def batch(seen: Seen) -> Chosen:
    return Chosen()


def running(seen: Seen) -> Chosen:
    return Chosen(weight=0.0)


def renorm(r_max: Any, d_max: Any, eps: float = 1e-5) -> Choice:
    def choose(seen: Seen) -> Chosen:
        deviation = np.sqrt(seen.running_var + eps)
        r = np.clip(np.sqrt(seen.var + eps) / deviation, 1 / r_max, r_max)
        d = (seen.mean - seen.running_mean) / deviation
        size = np.maximum(np.abs(d), 1e-300)
        return Chosen(r=r, d=d * np.minimum(1, d_max / size))

    return choose


def blend(prior: float | None = None, weight: float = 0.0, between: bool = True) -> Choice:
    def choose(seen: Seen) -> Chosen:
        a = weight if prior is None else seen.examples / (prior + seen.examples)
        return Chosen(a, between)

    return choose


class Row(NamedTuple):
    """A policy, how it normalizes in training and in evaluation, and whether it is per example."""

    name: str
    policy: Policy
    train: Choice
    evaluate: Choice
    per_example: bool = False


ROWS = (
    Row("Batch", Batch(), batch, batch),
    Row("Running", Running(), running, running),
    Row("Renorm", Renorm(1.5, 0.25), renorm(1.5, 0.25), running),
    Row("Renorm_unlimited", Renorm(1e9, 1e9), renorm(1e9, 1e9), running),
    Row("Blend_prior", Blend(prior=5), blend(prior=5), blend(prior=5)),
    Row("Blend_weight", Blend(weight=0.3), blend(weight=0.3), blend(weight=0.3)),
    Row(
        "Blend_without",
        Blend(prior=5, between=False),
        blend(prior=5, between=False),
        blend(prior=5, between=False),
    ),
    Row("Example", Example(0.4), blend(weight=0.4), blend(weight=0.4), per_example=True),
    Row(
        "Example_without",
        Example(0.4, between=False),
        blend(weight=0.4, between=False),
        blend(weight=0.4, between=False),
        per_example=True,
    ),
)


def normalized(
    params: Mapping[str, Any],
    stats: Mapping[str, Any],
    x: Any,
    cotangent: Any,
    choice: Choice,
    *,
    axis: int = -1,
    eps: float = 1e-5,
    mask: Any = None,
    size: int | None = None,
) -> Outcome:
    """Output and gradients for groups of `size` examples, each with its own moments.

    The gradient flows through `mean = (1 - a) m + a mu` and
    `var = (1 - a) V + a v + a (1 - a) |mu - m|^2`, but not through r and d. The statistics are not
    updated.
    """
    x, dy = np.asarray(x, np.float64), np.asarray(cotangent, np.float64)
    seen = np.broadcast_to(True if mask is None else np.asarray(mask), x.shape)
    batch_axis = 0 if axis % x.ndim else 1
    share = size or x.shape[batch_axis]
    parts = []
    for start in range(0, x.shape[batch_axis], share):
        index = [slice(None)] * x.ndim
        index[batch_axis] = slice(start, start + share)
        own = [array[tuple(index)] for array in (x, dy, seen)]
        parts.append(_group(params, stats, (own[0], own[1], own[2]), choice, axis, eps))
    y, dx = (np.concatenate([part[i] for part in parts], batch_axis) for i in (0, 1))
    dparams = {key: sum(part[2][key] for part in parts) for key in params}
    return Outcome(y, dict(stats), dx, dparams)


def _group(
    params: Mapping[str, Any],
    stats: Mapping[str, Any],
    arrays: tuple[np.ndarray, np.ndarray, np.ndarray],
    choice: Choice,
    axis: int,
    eps: float,
) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    x, dy, seen = arrays
    reduced = tuple(a for a in range(x.ndim) if a != axis % x.ndim)

    def wide(value: Any) -> np.ndarray:
        return np.expand_dims(np.asarray(value, np.float64), reduced)

    n = np.maximum(np.sum(seen, reduced, keepdims=True), 1)
    some = np.any(seen, reduced, keepdims=True)
    mean, var = (wide(value) for value in measure(x, reduced, seen | ~some))
    others = tuple(a for a in reduced if a != reduced[0])
    examples = np.sum(np.any(seen, others, keepdims=True), reduced[0], keepdims=True)
    m, v = wide(stats["mean"]), wide(stats["var"])
    a, between, r, d = choice(Seen(mean, var, m, v, examples))
    a = np.where(some, a, 0.0) if np.any(a != 1.0) else a
    scale, bias = (wide(params.get(key, np.ones(x.shape[axis]) * one)) for key, one in LEARNED)
    center = (1 - a) * m + a * mean
    width = (1 - a) * v + a * var + between * a * (1 - a) * (mean - m) ** 2
    std = np.sqrt(width + eps)
    x_hat = (x - center) / std
    y = (x_hat * r + d) * scale + bias
    g = dy * scale * r
    d_center = -np.sum(g, reduced, keepdims=True) / std
    d_width = -0.5 * np.sum(g * x_hat, reduced, keepdims=True) / std**2
    slope = 2 * a * (x - mean) + between * 2 * a * (1 - a) * (mean - m)
    dx = g / std + seen * (d_center * a + d_width * slope) / n
    found = {
        "scale": np.sum(dy * (x_hat * r + d), reduced),
        "bias": np.sum(dy, reduced),
    }
    return y, dx, found


LEARNED = (("scale", 1.0), ("bias", 0.0))
