"""Batch normalization and its gradients in float64 NumPy, and a comparison of arrays."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np


class Outcome(NamedTuple):
    """The results of a call, with the gradients of sum(y * cotangent)."""

    y: Any
    batch_stats: Any
    dx: Any
    dparams: Any


def batch_norm(
    params: Mapping[str, Any],
    batch_stats: Mapping[str, Any],
    x: Any,
    cotangent: Any,
    *,
    mutable: bool,
    axis: int = -1,
    eps: float = 1e-5,
    momentum: float | None = 0.1,
    correction: int = 1,
    mask: Any = None,
) -> Outcome:
    """The outcome of `bnjax.batch_norm`, from textbook formulas.

    The gradients are written by hand: with `x_hat = (x - mean) / std` and `g = dy * scale`,
    `dx = (g - [seen] * (sum(g) + x_hat * sum(g * x_hat)) / n) / std`, where the sums are over all
    positions, and mean and std over the n seen ones.
    """
    x, dy = np.asarray(x, np.float64), np.asarray(cotangent, np.float64)
    reduced = tuple(i for i in range(x.ndim) if i != axis % x.ndim)
    seen = np.broadcast_to(True if mask is None else np.asarray(mask), x.shape)
    n = np.sum(seen, reduced)
    scale, bias = (_wide(params.get(k, d), reduced) for k, d in (("scale", 1), ("bias", 0)))
    if mutable or not batch_stats:
        mean, var = measure(x, reduced, seen)
    else:
        mean, var, seen = batch_stats["mean"], batch_stats["var"], np.zeros(x.shape)
    mean, std = _wide(mean, reduced), np.sqrt(_wide(var, reduced) + eps)
    x_hat, g = (x - mean) / std, dy * scale
    pull = np.sum(g, reduced, keepdims=True)
    pull = pull + x_hat * np.sum(g * x_hat, reduced, keepdims=True)
    dparams = {"scale": np.sum(dy * x_hat, reduced), "bias": np.sum(dy, reduced)}
    moved = {key: np.asarray(value) for key, value in batch_stats.items()}
    if mutable and batch_stats:
        moved = move(moved, mean.reshape(-1), var * n / (n - correction), momentum)
    return Outcome(
        x_hat * scale + bias,
        moved,
        (g - seen * pull / _wide(n, reduced)) / std,
        {key: dparams[key] for key in params},
    )


def measure(x: Any, reduced: tuple[int, ...], seen: Any = True) -> tuple[np.ndarray, np.ndarray]:
    """Mean and biased variance over the seen positions, in two passes."""
    x = np.asarray(x, np.complex128 if np.iscomplexobj(x) else np.float64)
    mean = np.mean(x, reduced, keepdims=True, where=seen)
    var = np.mean(np.abs(x - mean) ** 2, reduced, where=seen)
    return np.squeeze(mean, reduced), var


def move(
    batch_stats: Mapping[str, np.ndarray], mean: Any, var: Any, momentum: float | None
) -> dict[str, np.ndarray]:
    """The running statistics after another batch."""
    moved = {key: value + 1 for key, value in batch_stats.items() if key == "count"}
    weight = 1 / moved["count"] if momentum is None else momentum
    for key, new in (("mean", mean), ("var", var)):
        moved[key] = (1 - weight) * np.asarray(batch_stats[key], np.float64) + weight * new
    return moved


def assert_close(actual: Any, expected: Any, *, rtol: float = 0.0, atol: float = 0.0) -> None:
    """Assert that two trees of arrays agree in structure, shape and value; dtypes may differ.

    In each array, entries differ by at most `atol + rtol * (the largest finite expected one)`; NaN
    and infinities are in the same places.
    """
    found, wanted = jax.tree.structure(actual), jax.tree.structure(expected)
    assert found == wanted, f"{found}, expected {wanted}"
    pairs = zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True)
    for (path, a), e in pairs:
        a, e = _exact(a), _exact(e)
        where = jax.tree_util.keystr(path)
        assert a.shape == e.shape, f"{where}: shape {a.shape}, expected {e.shape}"
        largest = np.max(np.abs(e), initial=0, where=np.isfinite(e))
        np.testing.assert_allclose(a, e, rtol=0, atol=atol + rtol * largest, err_msg=where)


def _exact(value: Any) -> np.ndarray:
    value = np.asarray(value)
    return value.astype(np.complex128 if np.iscomplexobj(value) else np.float64)


def _wide(value: Any, reduced: tuple[int, ...]) -> np.ndarray:
    value = np.asarray(value, np.float64)
    return np.expand_dims(value, reduced) if value.ndim else value
