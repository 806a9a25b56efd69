"""PyTorch's convention and Flax's: what the fields of a layer mean, be it of linen or nnx."""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp
from flax.typing import Dtype

from bnjax.core import checks
from bnjax.core.batch_norm import BatchStats, batch_norm, init
from bnjax.core.moments import working_dtype

# The names of the spatial axes that a 1d, 2d or 3d layer takes.
SPATIAL = {1: ("", "L"), 2: ("HW",), 3: ("DHW",)}


def is_torch(layer: Any) -> bool:
    """Whether a layer has PyTorch's fields, or else Flax's."""
    return hasattr(layer, "track_running_stats")


def check(layer: Any) -> None:
    """A new layer has possible settings, which look like its own convention's."""
    torch = is_torch(layer)
    if getattr(layer, "num_features", None) is not None:
        checks.num_features(layer.num_features)
    checks.momentum(layer.momentum, cumulative=torch)
    name = "eps" if torch else "epsilon"
    checks.eps(getattr(layer, name), training=False, name=name)
    checks.plausible_momentum(layer.momentum, torch=torch)


def check_input(layer: Any, x: jax.Array, any_rank: str) -> None:
    """A layer with PyTorch's fields gets the rank, dtype and channels that it was made for."""
    if is_torch(layer):
        name = type(layer).__name__
        checks.torch_input(x, layer._spatial, layer.axis, layer.num_features, name, any_rank)


def settings(layer: Any) -> dict[str, Any]:
    """What a layer tells the core, in PyTorch's terms."""
    torch = is_torch(layer)
    return {
        "axis": layer.axis,
        "eps": layer.eps if torch else layer.epsilon,
        "momentum": layer.momentum if torch else 1 - layer.momentum,
        "correction": 1 if torch else 0,
        "axis_name": layer.axis_name,
        "axis_index_groups": layer.axis_index_groups,
        "virtual_batch_size": getattr(layer, "virtual_batch_size", None),
    }


def parameters(layer: Any) -> tuple[str, ...]:
    """The names of the parameters that a layer learns."""
    if is_torch(layer):
        return ("scale", "bias") if layer.affine else ()
    used = {"scale": layer.use_scale, "bias": layer.use_bias}
    return tuple(name for name in used if used[name])


def statistics(layer: Any) -> tuple[str, ...]:
    """The names of the statistics that a layer keeps."""
    if not getattr(layer, "track_running_stats", True):
        return ()
    return ("mean", "var", "count") if layer.momentum is None else ("mean", "var")


def first_statistics(layer: Any, shape: chex.Shape, dtype: Dtype) -> BatchStats:
    """The statistics of a new layer; those of complex values have a complex mean from the start."""
    _, stats = init(
        math.prod(shape),
        track_running_stats=bool(statistics(layer)),
        momentum=layer.momentum,
        dtype=layer.param_dtype if is_torch(layer) else jnp.float32,
    )
    if stats and jnp.issubdtype(dtype, jnp.complexfloating):
        stats["mean"] = stats["mean"].astype(working_dtype(dtype))
    stats = {name: value.reshape(shape if value.ndim else ()) for name, value in stats.items()}
    return _as_kept(layer, stats)


def _as_kept(layer: Any, stats: BatchStats) -> BatchStats:
    """Flax keeps statistics in `param_dtype`, be it half precision, where a layer asks for it."""
    if getattr(layer, "force_float32_reductions", True):
        return stats
    return {
        name: value if jnp.iscomplexobj(value) else value.astype(layer.param_dtype)
        for name, value in stats.items()
    }


def normalize(
    layer: Any,
    params: Mapping[str, jax.Array],
    stats: Mapping[str, jax.Array],
    x: jax.Array,
    *,
    mutable: bool,
    **changes: Any,
) -> tuple[jax.Array, BatchStats]:
    """The output of a layer, and its statistics after the call."""
    y, moved = batch_norm(params, stats, x, mutable=mutable, **{**settings(layer), **changes})
    return y, _as_kept(layer, moved)


@contextlib.contextmanager
def naming(layer: Any, where: str | Callable[[], str]) -> Iterator[None]:
    """A context in which every error says which layer it comes from, if that is anywhere."""
    try:
        yield
    except Exception as error:
        if place := where if isinstance(where, str) else where():
            error.add_note(f"In {type(layer).__name__} {place}.")
        raise
