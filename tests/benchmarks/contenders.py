"""The batch norms of JAX's libraries, each as one function of values and input.

An entry of `available` imports its library, and returns a function `(values, x, mask, train, axis)
-> (y, (mean, var))`. A library that is not installed is named in `missing`.
"""

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

import bnjax


class Values(NamedTuple):
    """The variables of a layer, each of shape (C,)."""

    scale: jax.Array
    bias: jax.Array
    mean: jax.Array
    var: jax.Array


Apply = Callable[..., tuple[jax.Array, Any]]
REFERENCE = "flax.linen"
OURS = "bnjax"


def affine(values: Values, x: jax.Array, mask: Any, train: bool, axis: int) -> Any:
    """What is left of a batch norm that takes no statistics: no contender, but a yardstick."""
    scale, bias = (_along(value, x, axis) for value in (values.scale, values.bias))
    return (x * scale + bias).astype(x.dtype), (values.mean, values.var)


def linen(layer: Callable[..., nn.Module]) -> Apply:
    """A layer with the signature of `flax.linen.BatchNorm`."""

    def apply(values: Values, x: jax.Array, mask: Any, train: bool, axis: int) -> Any:
        module = layer(not train, axis=axis, dtype=x.dtype)
        stats = {"mean": values.mean, "var": values.var}
        variables = {
            "params": {"scale": values.scale, "bias": values.bias},
            "batch_stats": stats,
        }
        if not train:
            return module.apply(variables, x), (values.mean, values.var)
        y, moved = module.apply(variables, x, mask=mask, mutable=["batch_stats"])
        return y, (moved["batch_stats"]["mean"], moved["batch_stats"]["var"])

    return apply


def _nnx() -> Apply:
    def apply(values: Values, x: jax.Array, mask: Any, train: bool, axis: int) -> Any:
        settings = {"use_running_average": not train, "axis": axis, "dtype": x.dtype}
        layer = nnx.BatchNorm(x.shape[axis], rngs=nnx.Rngs(0), **settings)
        for name, value in values._asdict().items():
            getattr(layer, name)[...] = value
        y = layer(x, mask=mask)
        return y, (layer.mean[...], layer.var[...])

    return apply


def _haiku() -> Apply:
    haiku = importlib.import_module("haiku")

    def apply(values: Values, x: jax.Array, mask: Any, train: bool, axis: int) -> Any:
        layout = "channels_last" if axis == -1 else "channels_first"

        def layer(x: jax.Array) -> jax.Array:
            return haiku.BatchNorm(True, True, 0.99, data_format=layout)(x, train)

        wide = {name: _along(value, x, axis) for name, value in values._asdict().items()}
        # Haiku's parameters have the dtype of the input.
        params = {"scale": wide["scale"], "offset": wide["bias"]}
        state = {
            f"batch_norm/~/{name}_ema": {
                "counter": jnp.int32(1),
                "hidden": wide[name],
                "average": wide[name],
            }
            for name in ("mean", "var")
        }
        params = {"batch_norm": {name: value.astype(x.dtype) for name, value in params.items()}}
        y, moved = haiku.transform_with_state(layer).apply(params, state, None, x)
        return y, tuple(moved[f"batch_norm/~/{name}_ema"]["average"] for name in ("mean", "var"))

    return apply


def _equinox() -> Apply:
    equinox = importlib.import_module("equinox")

    @functools.cache
    def made(channels: int) -> Any:
        with jax.ensure_compile_time_eval():
            make = equinox.nn.make_with_state(equinox.nn.BatchNorm)
            return make(channels, "batch", mode="batch")

    def apply(values: Values, x: jax.Array, mask: Any, train: bool, axis: int) -> Any:
        layer, state = made(x.shape[axis])
        layer = equinox.tree_at(
            lambda layer: (layer.weight, layer.bias), layer, (values.scale, values.bias)
        )
        state = jax.tree.map(lambda leaf: leaf, state)  # a state can be used only once
        state = state.set(layer.batch_state_index, (values.mean, values.var))

        def one(x: jax.Array) -> Any:  # it knows channels first alone
            x = jnp.moveaxis(x, -1, 0) if axis == -1 else x
            y, moved = layer(x, state, inference=not train)
            return jnp.moveaxis(y, 0, -1) if axis == -1 else y, moved

        y, moved = jax.vmap(one, axis_name="batch", out_axes=(0, None))(x)
        return y.astype(x.dtype), moved.get(layer.batch_state_index)

    return apply


def _keras() -> Apply:
    keras = importlib.import_module("keras")

    @functools.cache
    def made(shape: tuple[int, ...], axis: int, half: bool) -> Any:
        with jax.ensure_compile_time_eval():
            policy = "mixed_bfloat16" if half else "float32"
            layer = keras.layers.BatchNormalization(axis=axis, epsilon=1e-5, dtype=policy)
            layer.build(shape)
            return layer

    def apply(values: Values, x: jax.Array, mask: Any, train: bool, axis: int) -> Any:
        layer = made(x.shape, axis, x.dtype == jnp.bfloat16)
        mask = None if mask is None else jnp.squeeze(mask, axis)
        trained, kept = [values.scale, values.bias], [values.mean, values.var]
        return layer.stateless_call(trained, kept, x, training=train, mask=mask)

    return apply


def _along(value: jax.Array, x: jax.Array, axis: int) -> jax.Array:
    """A value for each channel, so that it broadcasts against x."""
    return jnp.expand_dims(value, [i for i in range(x.ndim) if i != axis % x.ndim])


_LIBRARIES = {
    OURS: lambda: linen(bnjax.linen.BatchNorm),
    REFERENCE: lambda: linen(nn.BatchNorm),
    "flax.nnx": _nnx,
    "haiku": _haiku,
    "equinox": _equinox,
    "keras": _keras,
}
MASKED = (OURS, REFERENCE, "flax.nnx", "keras")


@functools.cache
def available(quick: bool = False) -> dict[str, Apply]:
    """The layers that are installed here; if quick, bnjax's and the reference alone."""
    found = {}
    for name in (OURS, REFERENCE) if quick else _LIBRARIES:
        try:
            found[name] = _LIBRARIES[name]()
        except ImportError:
            continue
    return found


def missing(quick: bool = False) -> list[str]:
    """The libraries that are not installed here."""
    wanted = (OURS, REFERENCE) if quick else _LIBRARIES
    absent = [name for name in wanted if name not in available(quick)]
    return absent if importlib.util.find_spec("torch") else [*absent, "torch"]
