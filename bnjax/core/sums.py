"""Several sums over an array in one reading of it, and their transpose.

The sums of a batch norm come in pairs: of x and of its squares, of a cotangent and of its product
with x. Each pair costs one pass over memory. Forward mode, reverse mode and `vmap` know both
directions, at any order: `sums` and `spread` are linear, and each is the other's transpose.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from bnjax.core.sharding import varying_alike

Axes = tuple[int, ...]

# XLA unrolls the inner loop over so many terms, and vectorizes the one around it.
_TERMS = 16
_SMALL = 2**12  # values, of which a pass costs less than one kernel more


def sums(values: Sequence[jax.Array], reduced: Axes) -> tuple[jax.Array, ...]:
    """The sum of each of several arrays of one shape over the axes `reduced`."""
    return tuple(_sums.bind(*values, reduced=tuple(reduced)))


def spread(vectors: Sequence[jax.Array], shape: Axes, reduced: Axes) -> tuple[jax.Array, ...]:
    """Each of several arrays, repeated along the axes `reduced` of `shape`.

    Those that are the same on all devices are taken as not, if another one differs: so that devices
    add up the gradients of a vector, not those of its copies.
    """
    vectors = varying_alike(vectors)
    return tuple(_spread.bind(*vectors, shape=tuple(shape), reduced=tuple(reduced)))


def _each_by_itself(*values: jax.Array, reduced: Axes) -> list[jax.Array]:
    return [jnp.sum(value, reduced) for value in values]


def _in_one_reading(*values: jax.Array, reduced: Axes) -> Sequence[jax.Array]:
    """For CPUs: all in a short inner loop along one axis, then what is left of them alike.

    For sums over everything at once, XLA's CPU compiler has fast kernels for one array alone; its
    own loop over several is not vectorized, unless the reduced axis is so short that it is
    unrolled. Sums of sums are more exact, too.
    """
    shape = values[0].shape
    known = all(isinstance(size, int) for size in shape)
    if len(values) == 1 or not known or math.prod(shape) < _SMALL:
        return _each_by_itself(*values, reduced=reduced)
    while math.prod(shape[axis] for axis in reduced) > _TERMS:
        axis, terms = _division(shape, reduced)
        if terms == 1:
            break
        split = (*shape[:axis], shape[axis] // terms, terms, *shape[axis + 1 :])
        zeros = tuple(np.zeros((), value.dtype) for value in values)
        rows = tuple(value.reshape(split) for value in values)
        values = lax.reduce(rows, zeros, _add, (axis + 1,))
        shape = values[0].shape
    return _each_by_itself(*values, reduced=reduced)


def _add(a: tuple[jax.Array, ...], b: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    return tuple(map(lax.add, a, b))


def _devices() -> int:
    return jax.device_count()


def _division(shape: Axes, reduced: Axes) -> tuple[int, int]:
    """Along which axis, and how many terms are summed."""

    def terms(axis: int) -> int:
        # An axis may be split over the devices: then its parts can be, too.
        parts = (k for k in range(1, _TERMS + 1) if shape[axis] % (k * _devices()) == 0)
        return max(parts, default=1)

    order = (*reduced[1:], reduced[0])  # the batch last
    axis = next((a for a in order if terms(a) > _TERMS // 2), max(order, key=terms))
    return axis, terms(axis)


def _primitive(name: str) -> Primitive:
    made = Primitive(name)
    made.multiple_results = True
    made.def_impl(jax.jit(made.bind, static_argnames=("reduced", "shape")))
    return made


_sums, _spread = _primitive("sums"), _primitive("spread")


@_sums.def_abstract_eval
def _sums_types(*values: Any, reduced: Axes) -> list[Any]:
    return _types(functools.partial(_each_by_itself, reduced=reduced), values)


def _repeated(*vectors: jax.Array, shape: Axes, reduced: Axes) -> list[jax.Array]:
    return [jnp.broadcast_to(jnp.expand_dims(vector, reduced), shape) for vector in vectors]


@_spread.def_abstract_eval
def _spread_types(*vectors: Any, **shape: Axes) -> list[Any]:
    return _types(functools.partial(_repeated, **shape), vectors)


def _types(function: Any, avals: Sequence[Any]) -> list[Any]:
    return list(jax.make_jaxpr(function)(*avals).out_avals)


def _transposed(bind: Any, cotangents: Sequence[Any], args: Sequence[Any]) -> list[Any]:
    results = bind(tuple(map(ad.instantiate_zeros, cotangents)))
    pairs = zip(results, args, strict=True)
    return [result if ad.is_undefined_primal(arg) else None for result, arg in pairs]


def _sums_transpose(cotangents: Sequence[Any], *values: Any, reduced: Axes) -> list[Any]:
    shape = jnp.shape(values[0].aval if ad.is_undefined_primal(values[0]) else values[0])
    bind = functools.partial(spread, shape=shape, reduced=reduced)
    return _transposed(bind, cotangents, values)


def _spread_transpose(
    cotangents: Sequence[Any], *vectors: Any, shape: Axes, reduced: Axes
) -> list[Any]:
    del shape
    return _transposed(functools.partial(sums, reduced=reduced), cotangents, vectors)


ad.deflinear2(_sums, _sums_transpose)
ad.deflinear2(_spread, _spread_transpose)


def _at_front(arrays: Sequence[jax.Array], dims: Sequence[int | None]) -> list[jax.Array]:
    """All with the mapped axis as their first."""
    pairs = list(zip(arrays, dims, strict=True))
    size = next(array.shape[dim] for array, dim in pairs if dim is not None)
    return [
        jnp.broadcast_to(array, (size, *array.shape))
        if dim is None
        else jnp.moveaxis(array, dim, 0)
        for array, dim in pairs
    ]


def _sums_batched(values: Any, dims: Any, *, reduced: Axes) -> Any:
    results = sums(_at_front(values, dims), tuple(axis + 1 for axis in reduced))
    return results, [0] * len(results)


def _spread_batched(vectors: Any, dims: Any, *, shape: Axes, reduced: Axes) -> Any:
    vectors = _at_front(vectors, dims)
    shape = (vectors[0].shape[0], *shape)
    results = spread(vectors, shape, tuple(axis + 1 for axis in reduced))
    return results, [0] * len(results)


batching.primitive_batchers[_sums] = _sums_batched
batching.primitive_batchers[_spread] = _spread_batched


def _lowering(function: Any) -> Any:
    return mlir.lower_fun(function, multiple_results=True)


mlir.register_lowering(_sums, _lowering(_each_by_itself))
mlir.register_lowering(_sums, _lowering(_in_one_reading), platform="cpu")
mlir.register_lowering(_spread, _lowering(_repeated))
