"""Models to fold, with random trained variables, and checks of the folded ones."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

import bnjax
from tests.support.hlo import primitives

KEY = jax.random.key(0)
EVAL = partial(nn.BatchNorm, use_running_average=True)
IMAGES = (2, 6, 6, 3)
STEP = 1 / 32
DRAWS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "var": np.exp,
    "scale": lambda z: 1 + z / 3,
    "kernel": lambda z: z / np.sqrt(z.size / z.shape[-1]),
}


def trained(variables: Any, seed: int = 0) -> Any:
    """Random values like those of trained variables, in the same shapes."""
    rng = np.random.default_rng(seed)

    def draw(path: tuple, leaf: Any) -> jax.Array:
        name = next(key.key for key in reversed(path) if hasattr(key, "key"))
        return jnp.asarray(DRAWS.get(name, np.array)(rng.normal(size=leaf.shape)), leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, variables)


def inputs(shape: tuple[int, ...]) -> jax.Array:
    return jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.float32)


def prepare(model: nn.Module, shape: tuple[int, ...] = IMAGES) -> tuple[Any, Any, jax.Array]:
    """The model, variables and an input."""
    x = inputs(shape)
    return model, trained(jax.eval_shape(model.init, KEY, x)), x


def reasons(folded: Any) -> dict[tuple[str, str], str | None]:
    return {(row.layer, row.batch_norm): row.reason for row in folded.report.rows}


def divisions(function: Callable, *arguments: Any) -> int:
    """The number of batch norms left in a program."""
    found = primitives(function, *arguments)
    return found["sqrt"] + found["rsqrt"]


def outputs(model: nn.Module, variables: Any, folded: Any, x: Any) -> Any:
    """The outputs of the model and of the folded one."""
    both = jax.jit(lambda v, new, x: (model.apply(v, x), folded.apply(new, x)))
    return both(variables, folded.variables, x)


def branches(folded: Any) -> dict[tuple[str, str], str | None]:
    return {(each.branch, each.into): each.reason for each in folded.report.branches}


def convolutions(folded: Any, x: Any) -> int:
    found = primitives(folded.apply, folded.variables, x)
    return found["conv_general_dilated"] + found["dot_general"]


def assert_same(model: Any, variables: Any, x: Any, rtol: float = 2e-5) -> Any:
    """The folded model has the same outputs, also for other batch sizes."""
    folded = bnjax.fold(model, variables, x)
    for each in (x, x[:1], jnp.concatenate([x, x + 1])):
        expected, actual = outputs(model, variables, folded, each)
        assert np.std(expected) > 0.01
        np.testing.assert_allclose(actual, expected, rtol=0, atol=rtol * np.abs(expected).max())
        assert actual.dtype == expected.dtype
    return folded


def assert_folded(model: Any, variables: Any, x: Any, rtol: float = 2e-5, bare: bool = True) -> Any:
    """No batch norm is left, and outputs are the same, also for a larger input."""
    folded = bnjax.fold(model, variables, x)
    larger = [x, x[:1], jnp.concatenate([x, x + 1])]
    for each in larger:
        expected, actual = outputs(model, variables, folded, each)
        assert np.std(expected) > 0.01
        np.testing.assert_allclose(actual, expected, rtol=0, atol=rtol * np.abs(expected).max())
        assert actual.dtype == expected.dtype
    if bare:
        assert divisions(folded.apply, folded.variables, x) == 0
        assert "batch_stats" not in folded.variables
    return folded


def fake(kernel: jax.Array) -> jax.Array:
    """Rounded to multiples of STEP, with a straight-through gradient."""
    rounded = jnp.clip(jnp.round(kernel / STEP), -128, 127) * STEP
    return kernel + jax.lax.stop_gradient(rounded - kernel)


def close(actual: Any, expected: Any, rtol: float = 2e-5) -> None:
    expected = np.asarray(expected)
    scale = max(np.abs(expected).max(), 1e-2)
    np.testing.assert_allclose(np.asarray(actual), expected, rtol=0, atol=rtol * scale)
