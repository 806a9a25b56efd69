"""PyTorch's batch norm on the same numbers, in both memory formats, as it is used there."""

import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from tests.benchmarks.cases import BACKWARD, EVAL, FAR, PLAIN, RELU, RESIDUAL, Case, Inputs

LAST, CONTIGUOUS = NAMES = "torch channels_last", "torch contiguous"
Run = Callable[[], Any]


def runs(case: Case, given: Inputs, which: str) -> dict[str, Run]:
    """A step in each memory format; none if torch is not installed, or knows no such variant."""

    def first(run: Run) -> Run:
        return lambda: run()[0]

    return {name: first(make()) for name, make in steps(case, [given], which, "cpu").items()}


def steps(case: Case, given: list[Inputs], which: str, device: str) -> dict[str, Callable[[], Run]]:
    """In each memory format, what makes a run of a step with each of the inputs."""
    if importlib.util.find_spec("torch") is None:
        return {}
    if case.variant not in (PLAIN, FAR, RELU, RESIDUAL):
        return {}

    def maker(last: bool) -> Callable[[], Run]:
        def make() -> Run:
            each = [_step(case, one, which, device, last) for one in given]
            return lambda: [run() for run in each]

        return make

    if len(case.shape) == 2 or case.axis != -1:
        return {CONTIGUOUS: maker(False)}
    return {LAST: maker(True), CONTIGUOUS: maker(False)}


def _step(case: Case, given: Inputs, which: str, device: str, last: bool) -> Run:
    import torch

    functional = torch.nn.functional

    def tensor(array: jax.Array) -> Any:
        near = array if device == "cuda" else jax.device_put(array, jax.devices("cpu")[0])
        value = torch.from_dlpack(near).clone()
        if value.ndim < 2:
            return value
        return value.movedim(case.axis, 1) if last else value.movedim(case.axis, 1).contiguous()

    scale, bias, mean, var, x, dy = map(tensor, (*given.values, given.x, given.dy))
    residual = None if given.residual is None else tensor(given.residual)
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


def as_jax(result: dict[str, Any], case: Case) -> dict[str, Any]:
    """The result of a step as JAX has it."""

    def one(value: Any) -> jax.Array:
        value = value.detach().float().cpu()
        return jnp.asarray((value.movedim(1, case.axis) if value.ndim > 1 else value).numpy())

    converted: dict[str, Any] = {"y": one(result["y"])}
    if "gradients" in result:
        converted["gradients"] = tuple(map(one, result["gradients"]))
    return converted
