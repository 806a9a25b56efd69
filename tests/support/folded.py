"""Models to fold, with numbers as training leaves them, and what became of them."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from tests.support.hlo import primitives

KEY = jax.random.key(0)
EVAL = partial(nn.BatchNorm, use_running_average=True)
IMAGES = (2, 6, 6, 3)
DRAWS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "var": np.exp,
    "scale": lambda z: 1 + z / 3,
    "kernel": lambda z: z / np.sqrt(z.size / z.shape[-1]),
}


def trained(variables: Any, seed: int = 0) -> Any:
    """Numbers as training might leave them, for the shapes of these variables."""
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
    """How many batch norms are left in a program."""
    found = primitives(function, *arguments)
    return found["sqrt"] + found["rsqrt"]


def outputs(model: nn.Module, variables: Any, folded: Any, x: Any) -> Any:
    """What the model gives, and the folded one."""
    both = jax.jit(lambda v, new, x: (model.apply(v, x), folded.apply(new, x)))
    return both(variables, folded.variables, x)
