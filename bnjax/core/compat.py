"""Every private or unstable part of JAX that bnjax uses; tests/test_compat.py detects changes."""

import functools
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax
from jax.core import Tracer
from jax.extend.core import ClosedJaxpr, Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir, partial_eval

Function = Callable[..., Any]

_STATIC = "reduced", "sources", "shape", "banks", "mapped"

# A thread-local setting whose value is part of JAX's cache keys; call it to get a context.
context = jax.make_user_context

# With `plain(True)`, batch norm is plain jnp, without primitives, custom derivatives or `cond`. It
# reads x more often, and serves transformations without rules for these, such as
# `jax.experimental.jet`, which in jax 0.10 fails at any `custom_jvp`, even that of `jax.nn.relu`.
plain: Any = context(False)


def traces() -> Any:
    """JAX's cache of traces, or None where this version has another one."""
    module = sys.modules.get("jax._src.interpreters.partial_eval")
    cache = getattr(module, "trace_to_jaxpr", None)
    return cache if hasattr(cache, "evict_weakref") else None


def forget(key: object) -> None:
    """Drop the traces that JAX keeps under a part of a context's value that won't occur again.

    JAX bounds all its caches but this one. Functions that are needed again are traced again.
    """
    cache = traces()
    if cache is None:
        return
    for reference, values, *_ in cache.cache_keys():
        function = reference()
        if function and any(key in value for value in values if isinstance(value, tuple)):
            cache.evict_weakref(function)


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


def implementation(name: str, functions: dict[str, Function], platform: str) -> Function:
    """The one of a primitive's functions that serves a platform; tests put others here."""
    return functions.get(platform, functions["default"])


def primitive(
    name: str, default: Function, types: Function | None = None, **platforms: Function
) -> Primitive:
    """Create a primitive whose implementation is traced when it is lowered, for that platform.

    Args:
        name: its name in a program.
        default: its implementation, a function of several arrays and static keywords, of which one
            is `devices`, the number of devices over which arrays may be split.
        types: a function without `devices` that is quick to trace and returns arrays of the same
            types; by default the implementation.
        **platforms: other implementations, by JAX's names of platforms.
    """
    made, functions = Primitive(name), {"default": default, **platforms}
    made.multiple_results = True

    def on(platform: str) -> Function:
        return implementation(name, functions, platform)

    def eager(*arrays: jax.Array, **static: Any) -> Any:
        bound = {p: functools.partial(on(p), devices=1, **static) for p in functions}
        return lax.platform_dependent(*arrays, **bound)

    def result_types(*avals: Any, **static: Any) -> list[Any]:
        return list(jax.make_jaxpr(functools.partial(types or default, **static))(*avals).out_avals)

    def lower(platform: str, context: Any, *arrays: Any, **static: Any) -> Any:
        bound = functools.partial(on(platform), devices=split_over(context))
        return mlir.lower_fun(bound, multiple_results=True)(context, *arrays, **static)

    made.def_impl(jax.jit(eager, static_argnames=_STATIC))
    made.def_abstract_eval(result_types)
    for platform in functions:
        key = None if platform == "default" else platform
        mlir.register_lowering(made, functools.partial(lower, platform), platform=key)
    return made


def by_platform(name: str, default: Function, types: Function, **platforms: Function) -> Function:
    """Create a function from `primitive` that has no derivative; `vmap` maps what is lowered."""

    def under_vmaps(function: Function) -> Function:
        def run(*arrays: Any, mapped: Sequence[Sequence[int | None]], **static: Any) -> Any:
            call = functools.partial(function, **static)
            for dims in mapped:  # the innermost first
                call = jax.vmap(call, dims)
            return call(*arrays)

        return run

    def batched(arrays: Sequence[Any], dims: Sequence[Any], mapped: Any, **static: Any) -> Any:
        results = made.bind(*arrays, mapped=(*mapped, tuple(dims)), **static)
        return results, [0] * len(results)

    mapped = {platform: under_vmaps(function) for platform, function in platforms.items()}
    made = primitive(name, under_vmaps(default), under_vmaps(types), **mapped)
    batching.primitive_batchers[made] = batched
    return functools.partial(made.bind, mapped=())


def transposed(made: Primitive, transpose: Function, batched: Function) -> None:
    """Define the derivatives and `vmap` of a linear primitive.

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
    """Teach two linear primitives that each is the other's transpose, given an index.

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
