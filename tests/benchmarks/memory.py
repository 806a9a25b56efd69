"""Bytes between the passes: of a layer outside jit, of a compiled gradient, and under remat."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
from rich.table import Table

import bnjax
from tests.benchmarks import blocks
from tests.benchmarks.cases import DTYPES, Case, inputs
from tests.benchmarks.contenders import OURS, REFERENCE, Apply, affine, available
from tests.benchmarks.environment import Options
from tests.support.hlo import equations

DEPTH = 8
POLICIES: dict[str, Callable[[], Any]] = {
    "nothing recomputed": lambda: None,
    "bnjax.remat_policy()": lambda: bnjax.remat_policy(),
    "dots_saveable": lambda: jax.checkpoint_policies.dots_saveable,
}
_COLLECTIVES = ("psum", "all_gather", "all_reduce", "reduce_scatter", "pmax")
_SUMS = ("sums", "reduce_sum", "reduce_max", "reduce_min")
_AXIS, _DEVICES = "devices", 8


def measure(options: Options) -> dict[str, Any]:
    """The three tables' rows."""
    shape = (2, 8, 8, 8) if options.quick else (32, 28, 28, 64)
    depth = 1 if options.quick else DEPTH
    contenders = {**available(options.quick), blocks.AFFINE: affine}
    layer, gradient, remat = [], [], []
    for dtype in DTYPES:
        for name, apply in contenders.items():
            layer.append({"dtype": dtype, "contender": name, **_of_layer(apply, shape, dtype)})
            found = _temporary(apply, shape, depth, dtype)
            gradient.append({"dtype": dtype, "contender": name, "bytes": found})
        for name, policy in POLICIES.items():
            remat.append({"dtype": dtype, "policy": name, **_remat(policy(), shape, dtype)})
    return {"shape": shape, "depth": depth, "layer": layer, "gradient": gradient, "remat": remat}


def kept_bytes(closure: Any, besides: Any = ()) -> int:
    """Of the arrays, each counted once, that a function from `jax.vjp` holds besides these."""

    def buffers(tree: Any) -> dict[int, int]:
        leaves = [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)]
        return {leaf.unsafe_buffer_pointer(): leaf.nbytes for leaf in leaves}

    given = buffers(besides)
    return sum(size for pointer, size in buffers(closure).items() if pointer not in given)


def _of_layer(apply: Apply, shape: tuple[int, ...], dtype: str) -> dict[str, Any]:
    given = inputs(Case(shape, dtype=dtype))

    def layer(scale: jax.Array, bias: jax.Array, x: jax.Array) -> Any:
        return apply(given.values._replace(scale=scale, bias=bias), x, None, True, -1)

    _, gradient, _ = jax.vjp(layer, *given.values[:2], given.x, has_aux=True)
    found = kept_bytes(gradient)
    return {"bytes": found, "of x": found / given.x.nbytes}


def _temporary(apply: Apply, shape: tuple[int, ...], depth: int, dtype: str) -> int:
    def gradient(network: list[blocks.Block], x: jax.Array) -> Any:
        return jax.value_and_grad(lambda b: blocks.loss(apply, b, x), has_aux=True)(network)

    arguments = blocks.variables(depth, shape[-1]), blocks.images(shape, dtype)
    analysis = jax.jit(gradient).lower(*arguments).compile().memory_analysis()
    return analysis.temp_size_in_bytes if analysis is not None else 0


def _remat(policy: Any, shape: tuple[int, ...], dtype: str) -> dict[str, Any]:
    """A block's bytes outside jit, and what its gradient does, over the devices of an axis."""
    network, x = blocks.variables(1, shape[-1]), blocks.images(shape, dtype)

    def block(axis_name: str | None) -> Callable[..., Any]:
        def apply(values: Any, x: jax.Array, *_: Any) -> Any:
            params = {"scale": values.scale, "bias": values.bias}
            stats = {"mean": values.mean, "var": values.var}
            settings = {"mutable": True, "axis_name": axis_name}
            y, moved = bnjax.batch_norm(params, stats, x, **settings)
            return y, (moved["mean"], moved["var"])

        run = functools.partial(blocks.forward, apply)
        return run if policy is None else jax.checkpoint(run, policy=policy)

    _, gradient, _ = jax.vjp(block(None), network, x, has_aux=True)

    def passes(network: Any, x: jax.Array, dy: jax.Array) -> Any:
        y, gradient, moved = jax.vjp(block(_AXIS), network, x, has_aux=True)
        return y, moved, gradient(dy)

    both = jax.make_jaxpr(passes, axis_env=[(_AXIS, _DEVICES)])(network, x, x)
    forward = jax.make_jaxpr(block(_AXIS), axis_env=[(_AXIS, _DEVICES)])(network, x)
    counts = [_counted(program.jaxpr, x.size) for program in (both, forward)]
    found = kept_bytes(gradient, (network, x))
    return {
        "bytes": found,
        "of x": found / x.nbytes,
        **{key: counts[0][key] - counts[1][key] for key in counts[0]},
    }


def _counted(program: Any, size: int) -> dict[str, int]:
    """The reductions of activations, and the collectives, in a program and all inside it."""
    found = {"reductions": 0, "collectives": 0}
    for equation in equations(program):
        name = equation.primitive.name
        large = any(getattr(v.aval, "size", 0) >= size for v in equation.invars)
        found["reductions"] += name in _SUMS and large
        found["collectives"] += name.startswith(_COLLECTIVES)
    return found


def tables(data: dict[str, Any]) -> Iterator[Table]:
    """A layer, a gradient, a block under remat."""
    shape = "x".join(map(str, data["shape"]))
    table = Table(title=f"kept between the passes by one layer outside jit, {shape}: times x")
    _by_dtype(table, data["layer"], lambda row, _: f"{row['of x']:.3f}")
    yield table
    table = Table(
        title=f"temporary bytes of the compiled gradient of {data['depth']} conv+BN+relu, {shape}"
    )

    def cell(row: dict[str, Any], reference: dict[str, Any]) -> str:
        return f"{row['bytes'] / 1e6:,.1f} MB ({row['bytes'] / reference['bytes']:.2f})"

    _by_dtype(table, data["gradient"], cell)
    yield table
    table = Table(
        title="conv+BN+relu under jax.checkpoint: kept beside the arguments; backward, in the jaxpr"
    )
    for column in ("policy", "dtype", "MB", "times x", "reductions", "collectives"):
        table.add_column(column, justify="right")
    for row in data["remat"]:
        counts = (str(row[key]) for key in ("reductions", "collectives"))
        kept = f"{row['bytes'] / 1e6:.1f}", f"{row['of x']:.2f}"
        table.add_row(row["policy"], row["dtype"], *kept, *counts)
    yield table


def _by_dtype(table: Table, rows: list[dict[str, Any]], cell: Callable[..., str]) -> None:
    for column in ("", *DTYPES):
        table.add_column(column, justify="right")
    found = {(row["contender"], row["dtype"]): row for row in rows}
    for name in dict.fromkeys(row["contender"] for row in rows):
        cells = (cell(found[name, dtype], found[REFERENCE, dtype]) for dtype in DTYPES)
        table.add_row(name, *cells, style="bold" if name == OURS else None)
