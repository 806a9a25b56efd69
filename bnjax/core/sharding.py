"""How arrays are placed on meshes and mapped axes, according to their types."""

from collections.abc import Callable, Sequence
from typing import Any

import chex
import jax
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from bnjax.core.compat import varying_axes


def on_auto_axes(
    function: Callable[..., Any], args: tuple, x: jax.Array, like: chex.ArrayTree
) -> Any:
    """Call `function(*args)`, with its results sharded over a mesh like the arrays in `like`.

    Explicit mesh axes, over which x may be sharded, forbid slicing and padding a sharded axis.
    Inside the function they are left to the compiler, like those of an Auto mesh.
    """
    mesh = jax.typeof(x).sharding.mesh
    if not any(jax.typeof(x).sharding.spec):
        return function(*args)
    leaves, tree = jax.tree.flatten(args)
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, jax.Array)]

    def on_arrays(*arrays: jax.Array) -> Any:
        new = dict(zip(places, arrays, strict=True))
        return function(*tree.unflatten(new.get(i, leaf) for i, leaf in enumerate(leaves)))

    def split(array: jax.Array) -> NamedSharding:
        return NamedSharding(mesh, P(*jax.typeof(array).sharding.spec))

    inside = jax.sharding.auto_axes(
        on_arrays, axes=mesh.explicit_axes, out_sharding=jax.tree.map(split, like)
    )
    return inside(*(leaves[i] for i in places))


def varying_alike(arrays: Sequence[jax.Array]) -> list[jax.Array]:
    """Mark all arrays as varying along every axis along which any of them varies."""
    axes = frozenset[str]().union(*map(varying_axes, arrays))

    def cast(x: jax.Array) -> jax.Array:
        new = axes - varying_axes(x)
        return lax.pcast(x, tuple(sorted(new)), to="varying") if new else x

    return list(map(cast, arrays))
