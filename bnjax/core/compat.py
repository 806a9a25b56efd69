"""Every private or unstable part of JAX that bnjax uses; tests/test_compat.py detects changes."""

import functools
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.extend.core import ClosedJaxpr, Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir, partial_eval

Function = Callable[..., Any]

# A thread-local setting whose value is part of JAX's cache keys; call it to get a context.
context = jax.make_user_context

# With `plain(True)`, batch norm is plain jnp, without primitives, custom derivatives or `cond`. It
# reads x more often, and serves transformations without rules for these, such as
# `jax.experimental.jet`, which in jax 0.10 fails at any `custom_jvp`, even that of `jax.nn.relu`.
plain: Any = context(False)


def plain_for(x: jax.Array) -> Any:
    """A context that makes batch norm plain if x is a Taylor series of `jet`."""
    jet = sys.modules.get("jax.experimental.jet")
    return plain(plain.value or (jet is not None and isinstance(x, jet.JetTracer)))


def is_traced(value: Any) -> bool:
    """Whether a value is a tracer."""
    return isinstance(value, Tracer)


def varying_axes(x: jax.Array) -> frozenset[str]:
    """The axes of a `shard_map` with `check_vma=True` along which `x` varies between devices."""
    return jax.typeof(x).mat.varying


def gathers_at_once(names: Sequence[str]) -> bool:
    """Whether one all-gather can cover all these mapped axes; it can't over several vmaps."""
    if len(names) > 1:
        try:
            lax.all_gather(0.0, tuple(names))
        except AssertionError:  # JAX has no rule for it
            return False
    return True


def split_over(context: Any) -> int:
    """The number of devices over which XLA may split arrays in a program being lowered.

    Inside `shard_map` and `pmap` it splits nothing, so the number is 1.
    """
    axes = context.module_context.axis_context
    if (mesh := getattr(axes, "mesh", None)) is not None:
        return math.prod(n for name, n in mesh.shape.items() if name not in axes.manual_axes)
    return getattr(axes, "num_devices", None) or jax.device_count()


_devices_of_program = Primitive("devices_of_program")
_devices_of_program.def_impl(jax.device_count)
_devices_of_program.def_abstract_eval(lambda: jax.typeof(np.int32(0)))
mlir.register_lowering(
    _devices_of_program, lambda context: [mlir.ir_constant(np.int32(split_over(context)))]
)


def devices_of_program() -> jax.Array:
    """`split_over`, as a number that becomes known when a program is lowered."""
    return _devices_of_program.bind()


def linear(
    name: str, function: Function, *, on_cpu: Function | None = None, on_gpu: Function | None = None
) -> Primitive:
    """Create a primitive for a linear function from several arrays to several.

    Args:
        name: its name in a program.
        function: its implementation, which takes arrays and static keywords.
        on_cpu: another implementation for CPUs, which also takes `devices`, the number of devices
            over which arrays may be split.
        on_gpu: another implementation for GPUs, likewise.
    """
    made = Primitive(name)
    made.multiple_results = True
    specials = {"cpu": on_cpu, "cuda": on_gpu, "rocm": on_gpu}
    specials = {platform: f for platform, f in specials.items() if f is not None}

    def eager(*arrays: jax.Array, **static: Any) -> Any:
        bound = {name: functools.partial(f, devices=1, **static) for name, f in specials.items()}
        default = functools.partial(function, **static)
        return lax.platform_dependent(*arrays, default=default, **bound)

    made.def_impl(jax.jit(eager, static_argnames=("reduced", "sources", "shape", "banks")))
    made.def_abstract_eval(
        lambda *avals, **static: list(
            jax.make_jaxpr(functools.partial(function, **static))(*avals).out_avals
        )
    )
    mlir.register_lowering(made, mlir.lower_fun(function, multiple_results=True))

    def register(special: Function, platform: str) -> None:
        def lower(context: Any, *arrays: Any, **static: Any) -> Any:
            bound = functools.partial(special, devices=split_over(context))
            return mlir.lower_fun(bound, multiple_results=True)(context, *arrays, **static)

        mlir.register_lowering(made, lower, platform=platform)

    for platform, special in specials.items():
        register(special, platform)
    return made


def transposed(made: Primitive, transpose: Function, batched: Function) -> None:
    """Define the derivatives and `vmap` of a primitive from `linear`.

    Args:
        made: the primitive.
        transpose: `transpose(cotangents, shape, **static)` returns those of the arrays, which have
            that shape.
        batched: `batched(arrays, **static)` for arrays with an additional leading axis.
    """

    def transpose_rule(cotangents: Sequence[Any], *arrays: Any, **static: Any) -> list[Any]:
        unknown = [ad.is_undefined_primal(array) for array in arrays]
        shape = jax.numpy.shape(arrays[0].aval if unknown[0] else arrays[0])
        results = transpose(tuple(map(ad.instantiate_zeros, cotangents)), shape, **static)
        return [r if asked else None for r, asked in zip(results, unknown, strict=True)]

    def batching_rule(arrays: Sequence[Any], dims: Sequence[int | None], **static: Any) -> Any:
        pairs = list(zip(arrays, dims, strict=True))
        size = next(array.shape[dim] for array, dim in pairs if dim is not None)
        fronted = [
            jax.numpy.broadcast_to(array, (size, *array.shape))
            if dim is None
            else jax.numpy.moveaxis(array, dim, 0)
            for array, dim in pairs
        ]
        results = batched(fronted, **static)
        return results, [0] * len(results)

    ad.deflinear2(made, transpose_rule)
    batching.primitive_batchers[made] = batching_rule


def each_others_transpose(first: Primitive, second: Primitive, batched: Function) -> None:
    """Teach two primitives of `linear` that each is the other's transpose, given an index.

    Args:
        first: a primitive of an index, which has no derivative, and of arrays.
        second: the other one; both have the same static keywords.
        batched: `batched(made, arrays, dims, **static)` gives results and axis of one under `vmap`.
    """
    for made, other in ((first, second), (second, first)):

        def jvp(primals: Sequence[Any], tangents: Sequence[Any], made=made, **static: Any) -> Any:
            index, *values = primals
            moved = map(ad.instantiate_zeros, tangents[1:])
            return made.bind(index, *values, **static), made.bind(index, *moved, **static)

        def transpose(cotangents: Sequence[Any], index: Any, *_: Any, other=other, **static: Any):
            known = map(ad.instantiate_zeros, cotangents)
            return [None, *other.bind(index, *known, **static)]

        def batching_rule(arrays: Sequence[Any], dims: Sequence[Any], made=made, **static: Any):
            results, dim = batched(made, arrays, dims, **static)
            return results, [dim] * len(results)

        ad.primitive_jvps[made] = jvp
        ad.primitive_transposes[made] = transpose
        batching.primitive_batchers[made] = batching_rule


def needed(traced: Any, outputs: Sequence[bool]) -> tuple[Function, list[bool]]:
    """What is left of a traced function when only these outputs matter, and the inputs it needs."""
    part, inputs = partial_eval.dce_jaxpr(traced.jaxpr, list(outputs))
    return jaxpr_as_fun(ClosedJaxpr(part, traced.consts)), list(inputs)
