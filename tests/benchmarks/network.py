"""Time of whole training steps, and of a layer while the batch grows."""

import functools
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from rich.table import Table

import bnjax
from tests.benchmarks import blocks
from tests.benchmarks.cases import BACKWARD, COLD, DTYPES, STEADY, Case, inputs
from tests.benchmarks.contenders import OURS, REFERENCE, affine, available
from tests.benchmarks.environment import Options
from tests.benchmarks.floor import floors, lowest
from tests.benchmarks.steps import step
from tests.benchmarks.timing import compiled, medians, turns
from tests.support.models import ResNet

GROWTH = (1, 2, 4, 8, 16, 32, 64)


class Affine(nn.Module):
    """In place of a batch norm in a linen network."""

    use_running_average: bool | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Scale and shift."""
        scale, bias = (self.param(n, nn.initializers.ones, x.shape[-1:]) for n in ("scale", "bias"))
        return x * scale + bias


NORMS = {REFERENCE: nn.BatchNorm, OURS: bnjax.linen.BatchNorm, blocks.AFFINE: Affine}


def gradient(model: nn.Module) -> Callable[..., Any]:
    """A function of variables and images: loss, gradients, new statistics of a linen model."""

    def run(variables: Any, x: jax.Array) -> Any:
        stats = variables.get("batch_stats", {})

        def loss(params: Any) -> Any:
            variables = {"params": params, "batch_stats": stats}
            y, moved = model.apply(variables, x, train=True, mutable=["batch_stats"])
            return jnp.mean(jnp.square(y)), moved

        return jax.value_and_grad(loss, has_aux=True)(variables["params"])

    return run


def settled(variables: Any, stages: tuple[int, ...], width: int, x: jax.Array) -> Any:
    """Variables of a ResNet with the statistics that its layers meet."""
    if "batch_stats" not in variables:
        return variables
    model = ResNet(stages, width, norm=functools.partial(nn.BatchNorm, momentum=0.0))
    run = jax.jit(lambda v, x: model.apply(v, x, train=True, mutable=["batch_stats"])[1])
    return {**variables, **run(variables, x)}


def measure(options: Options) -> dict[str, Any]:
    """Rows for the three tables."""
    return {"resnet": _resnet(options), "blocks": _blocks(options), "growth": _growth(options)}


def _resnet(options: Options) -> dict[str, Any]:
    batch, size, width = (2, 8, 4) if options.quick else (32, 32, 32)
    x = blocks.images((batch, size, size, 3), "float32")
    runs: dict[str, Callable[[], Any]] = {}
    stages = (1,) if options.quick else (2, 2, 2, 2)
    for name, norm in NORMS.items():
        model = ResNet(stages, width, norm=norm)
        variables = settled(jax.jit(model.init)(jax.random.key(0), x), stages, width, x)
        runs.update(compiled({name: gradient(model)}, (variables, x)))
    times = medians(turns(runs, 2 * options.rounds))
    return {"batch": batch, "size": size, "width": width, "milliseconds": times}


def _blocks(options: Options) -> dict[str, Any]:
    shape, depth = ((2, 8, 8, 4), 1) if options.quick else ((64, 32, 32, 16), 10)
    rows = []
    for dtype in DTYPES:
        for state in (STEADY, COLD):
            row = {"dtype": dtype, "state": state}
            times = _steps(options, shape, depth, **row)
            yardstick = times[blocks.AFFINE]
            for name, found in times.items():
                pairs = zip(found, yardstick, strict=True)
                norms = statistics.median(a - b for a, b in pairs)
                cells = {"norms": norms, "step": statistics.median(found)}
                rows.append({**row, "contender": name, **cells})
    return {"shape": shape, "depth": depth, "rows": rows}


def _steps(
    options: Options, shape: tuple[int, ...], depth: int, dtype: str, state: str
) -> dict[str, list[float]]:
    """Times of a training step with each layer; with cold statistics, those of a new network."""
    few = options.quick or state == COLD
    contenders = {**available(few), blocks.AFFINE: affine}
    network, x = blocks.variables(depth, shape[-1]), blocks.images(shape, dtype)
    if state == STEADY:
        network = blocks.steady(network, x)
    steps = {name: blocks.training_step(apply) for name, apply in contenders.items()}
    return turns(compiled(steps, (network, x)), 2 * options.rounds)


def _growth(options: Options) -> dict[str, Any]:
    shape = (4, 4, 8) if options.quick else (28, 28, 64)
    rows = []
    for dtype in DTYPES:
        for times in GROWTH[:1] if options.quick else GROWTH:
            case = Case((times, *shape), dtype=dtype)
            functions = {
                name: step(available()[name], case, BACKWARD) for name in (OURS, REFERENCE)
            }
            functions |= floors(case, BACKWARD)
            runs = compiled(functions, inputs(case))
            found = medians(lowest(turns(runs, options.rounds)))
            values = times * shape[0] * shape[1] * shape[2]
            per_value = {name: ms * 1e6 / values for name, ms in found.items()}
            rows.append({"dtype": dtype, "batch": times, "nanoseconds": per_value})
    return {"image": shape, "rows": rows}


def tables(data: dict[str, Any]) -> Iterator[Table]:
    """The ResNet, the blocks, the growing batch."""
    resnet, stack, growth = data["resnet"], data["blocks"], data["growth"]
    size = resnet["size"]
    table = Table(
        title=f"training step of a ResNet-18, width {resnet['width']}, {resnet['batch']} images "
        f"of {size}x{size}, float32"
    )
    for column in ("", "milliseconds", "to flax.linen"):
        table.add_column(column, justify="right")
    for name, ms in resnet["milliseconds"].items():
        table.add_row(name, f"{ms:.1f}", f"{ms / resnet['milliseconds'][REFERENCE]:.2f}")
    yield table
    table = Table(
        title=f"training step of {stack['depth']} conv+BN+relu, "
        f"{'x'.join(map(str, stack['shape']))}: milliseconds"
    )
    columns = ("", "dtype", "state", "step", "step less affine's", "to flax.linen")
    for column in columns:
        table.add_column(column, justify="right")
    reference = {
        (row["dtype"], row["state"]): row["norms"]
        for row in stack["rows"]
        if row["contender"] == REFERENCE
    }
    for row in stack["rows"]:
        ratio = row["norms"] / reference[row["dtype"], row["state"]]
        cells = f"{row['step']:.1f}", f"{row['norms']:.1f}", f"{ratio:.2f}"
        table.add_row(row["contender"], row["dtype"], row["state"], *cells)
    yield table
    image = "x".join(map(str, growth["image"]))
    table = Table(title=f"{BACKWARD} while the batch of {image} grows: nanoseconds per value")
    names = list(growth["rows"][0]["nanoseconds"])
    for column in ("batch", "dtype", *names):
        table.add_column(column, justify="right")
    for row in growth["rows"]:
        cells = (f"{row['nanoseconds'][name]:.2f}" for name in names)
        table.add_row(str(row["batch"]), row["dtype"], *cells)
    yield table
