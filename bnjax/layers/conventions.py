"""PyTorch's convention and Flax's: what the fields of a layer mean, be it of linen or nnx."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

import chex
import jax
import jax.numpy as jnp
from flax.typing import Dtype, Initializer
from jax.nn.initializers import zeros

from bnjax.core import checks
from bnjax.core.batch_norm import BatchStats, batch_norm, init
from bnjax.core.checks import POOLED
from bnjax.core.moments import working_dtype
from bnjax.core.policies import Debiased, Policy
from bnjax.core.settings import counts

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
    checks.policy(layer.using, Policy)
    checks.has_running(bool(statistics(layer)) or layer.using is None, layer.using)
    checks.bank_names(layer.banks, bool(statistics(layer)))
    checks.number_of_banks(number_of_banks(layer), *_affine(layer))
    if layer.banks is not None and not isinstance(layer.banks, int):
        named_banks.add(tuple(layer.banks))
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
        "momentum": layer.momentum if torch else of_torch(layer.momentum),
        "using": getattr(layer, "using", None),
        "correction": 1 if torch else 0,
        "axis_name": layer.axis_name,
        "axis_index_groups": layer.axis_index_groups,
        "virtual_batch_size": getattr(layer, "virtual_batch_size", None),
    }


def of_torch(momentum: Any) -> Any:
    """Flax's momentum in PyTorch's convention, or the reverse."""
    if momentum is None or isinstance(momentum, str):
        return momentum
    if isinstance(momentum, Debiased):
        return Debiased(1 - momentum.momentum)
    return _Reversed(momentum) if callable(momentum) else 1 - momentum


def as_written(schedule: Any, *, torch: bool) -> Any:
    """A schedule whose values are in the convention of a layer, PyTorch's or Flax's."""
    if torch or not isinstance(schedule, Debiased):
        return schedule
    return _Reversed(Debiased(1 - schedule.momentum))


@dataclasses.dataclass(frozen=True)
class _Reversed:
    """A schedule of the other convention."""

    schedule: Callable[[Any], Any]

    def __call__(self, count: Any) -> Any:
        return 1 - self.schedule(count)


def parameters(layer: Any) -> tuple[str, ...]:
    """The names of the parameters that a layer learns."""
    used: dict[str, Any] = dict(zip(("scale", "bias"), _affine(layer), strict=True))
    names = [name for name in used if used[name]]
    return (*names, *(f"bank_{name}" for name in names if used[name] == "both"))


def parameter_shape(layer: Any, name: str, features: chex.Shape) -> chex.Shape:
    """The shape of a parameter: with banks, some have a row for each."""
    used: dict[str, Any] = dict(zip(("scale", "bias"), _affine(layer), strict=True))
    own = used.get(name) == "own"
    return (*rows(layer), *features) if own or name.startswith("bank_") else tuple(features)


def initializer(layer: Any, name: str) -> Initializer:
    """What a parameter starts from: what is added to that of all banks, from 0."""
    return zeros if name.startswith("bank_") else getattr(layer, f"{name}_init")


def _affine(layer: Any) -> tuple[Any, Any]:
    """Whether a layer learns scale and bias: yes, no, "own" ones for each bank, or "both"."""
    if is_torch(layer):
        return layer.affine, layer.affine
    return layer.use_scale, layer.use_bias


def number_of_banks(layer: Any) -> int | None:
    """How many sets of statistics a layer keeps; None if it has no banks."""
    banks = getattr(layer, "banks", None)
    return banks if banks is None or isinstance(banks, int) else len(banks)


def rows(layer: Any) -> tuple[int, ...]:
    """The axis of the banks, in the shape of a count."""
    banks = number_of_banks(layer)
    return () if banks is None else (banks,)


def statistics(layer: Any) -> tuple[str, ...]:
    """The names of the statistics that a layer keeps."""
    if not getattr(layer, "track_running_stats", True):
        return ()
    count = ("count",) if counts(layer.momentum, getattr(layer, "using", None)) else ()
    return ("mean", "var", *count, *(POOLED if isinstance(layer.momentum, str) else ()))


def with_kept(expected: tuple[str, ...], held: Collection[str]) -> tuple[str, ...]:
    """The names of statistics, with those that are kept for settings which others now replace."""
    beside = (name for name in ("count", *POOLED) if name in held and name not in expected)
    return (*expected, *beside)


def first_statistics(layer: Any, shape: chex.Shape, dtype: Dtype) -> BatchStats:
    """The statistics of a new layer; those of complex values have a complex mean from the start."""
    _, stats = init(
        math.prod(shape),
        track_running_stats=bool(statistics(layer)),
        momentum=layer.momentum,
        using=layer.using,
        banks=number_of_banks(layer),
        dtype=layer.param_dtype if is_torch(layer) else jnp.float32,
    )
    if jnp.issubdtype(dtype, jnp.complexfloating):
        means = {name: stats[name] for name in ("mean", "mean_low") if name in stats}
        stats |= {name: value.astype(working_dtype(dtype)) for name, value in means.items()}
    shapes = {name: (*rows(layer), *(() if name == "count" else shape)) for name in stats}
    stats = {name: value.reshape(shapes[name]) for name, value in stats.items()}
    return _as_kept(layer, stats)


def _as_kept(layer: Any, stats: BatchStats) -> BatchStats:
    """Flax keeps statistics in `param_dtype`, be it half precision, where a layer asks for it."""
    if getattr(layer, "force_float32_reductions", True):
        return stats
    return {
        name: value.astype(layer.param_dtype) if jnp.isrealobj(value) and name != "count" else value
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
    told = settings(layer) | changes
    told["bank"] = bank_of(layer, changes.get("bank"))
    y, moved = batch_norm(params, stats, x, mutable=mutable, **told)
    return y, _as_kept(layer, moved)


def bank_of(layer: Any, given: Any) -> Any:
    """The bank of a call as a number or an array: as given to it, or as a context says."""
    banks = getattr(layer, "banks", None)
    if banks is None:
        checks.no_bank(given)
        return None
    return checks.bank_by_name(current.get() if given is None else given, banks)


# What a context says, of all layers with banks.
current: ContextVar[Any] = ContextVar("bnjax.bank", default=None)
# The names that layers have given to banks: few, since they are the user's own words.
named_banks: set[tuple[str, ...]] = set()


@contextlib.contextmanager
def naming(layer: Any, where: str | Callable[[], str]) -> Iterator[None]:
    """A context in which every error says which layer it comes from, if that is anywhere."""
    try:
        yield
    except Exception as error:
        if place := where if isinstance(where, str) else where():
            error.add_note(f"In {type(layer).__name__} {place}.")
        raise
