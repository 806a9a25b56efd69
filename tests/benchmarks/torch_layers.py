"""PyTorch's batch norm on the same numbers, in both memory formats, as it is used there."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests.benchmarks.cases import BACKWARD, EVAL, FAR, PLAIN, RELU, RESIDUAL, Case, Inputs

LAST, CONTIGUOUS = NAMES = "torch channels_last", "torch contiguous"


def runs(case: Case, given: Inputs, which: str) -> dict[str, Callable[[], Any]]:
    """A step in each memory format; none if torch is not installed, or knows no such variant."""
    try:
        import torch
    except ImportError:
        return {}
    if case.variant not in (PLAIN, FAR, RELU, RESIDUAL):
        return {}
    functional = torch.nn.functional
    dtype = getattr(torch, case.dtype)

    def tensor(array: jax.Array, last: bool) -> Any:
        value = torch.from_numpy(np.array(array, np.float32)).to(dtype).movedim(case.axis, 1)
        return value if last else value.contiguous()

    def step(last: bool) -> Callable[[], Any]:
        scale, bias, mean, var = (torch.from_numpy(np.array(v)) for v in given.values)
        x, dy = (tensor(array, last) for array in (given.x, given.dy))
        residual = None if given.residual is None else tensor(given.residual, last)
        leaves = [v for v in (scale, bias, x, residual) if v is not None]
        for leaf in leaves:
            leaf.requires_grad_(which == BACKWARD)

        def run() -> dict[str, Any]:
            y = functional.batch_norm(x, mean, var, scale, bias, which != EVAL, 0.01, 1e-5)
            if residual is not None:
                y += residual
            if case.variant in (RELU, RESIDUAL):
                y = functional.relu(y, inplace=True)
            if which != BACKWARD:
                return {"y": y}
            return {"y": y, "gradients": torch.autograd.grad(y, leaves, dy)}

        return run

    if len(case.shape) == 2 or case.axis != -1:
        return {CONTIGUOUS: step(False)}
    return {LAST: step(True), CONTIGUOUS: step(False)}


def as_jax(result: dict[str, Any], case: Case) -> dict[str, Any]:
    """The result of a step as JAX has it."""

    def one(value: Any) -> jax.Array:
        value = value.detach().float()
        return jnp.asarray((value.movedim(1, case.axis) if value.ndim > 1 else value).numpy())

    converted: dict[str, Any] = {"y": one(result["y"])}
    if "gradients" in result:
        converted["gradients"] = tuple(map(one, result["gradients"]))
    return converted
