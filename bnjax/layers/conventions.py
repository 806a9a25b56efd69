"""What the fields of linen and nnx layers mean in PyTorch's convention and in Flax's."""

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

# The spatial axes that a 1d, 2d or 3d layer accepts.
SPATIAL = {1: ("", "L"), 2: ("HW",), 3: ("DHW",)}


def is_torch(layer: Any) -> bool:
    """Whether a layer has PyTorch's fields rather than Flax's."""
    return hasattr(layer, "track_running_stats")


def check(layer: Any) -> None:
    """Check the settings of a new layer; warn if they look like the other convention's."""
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
    """Check the rank, dtype and channels of the input to a layer with PyTorch's fields."""
    if is_torch(layer):
        name = type(layer).__name__
        checks.torch_input(x, layer._spatial, layer.axis, layer.num_features, name, any_rank)


def settings(layer: Any) -> dict[str, Any]:
    """The settings that a layer passes to the core, in PyTorch's terms."""
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
    """Convert a momentum from Flax's convention to PyTorch's, or back."""
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
    """A momentum schedule in the other convention."""

    schedule: Callable[[Any], Any]

    def __call__(self, count: Any) -> Any:
        return 1 - self.schedule(count)


def parameters(layer: Any) -> tuple[str, ...]:
    """The names of the parameters that a layer learns."""
    used: dict[str, Any] = dict(zip(("scale", "bias"), _affine(layer), strict=True))
    names = [name for name in used if used[name]]
    return (*names, *(f"bank_{name}" for name in names if used[name] == "both"))


def parameter_shape(layer: Any, name: str, features: chex.Shape) -> chex.Shape:
    """The shape of a parameter; with banks, some have a row for each bank."""
    used: dict[str, Any] = dict(zip(("scale", "bias"), _affine(layer), strict=True))
    own = used.get(name) == "own"
    return (*rows(layer), *features) if own or name.startswith("bank_") else tuple(features)


def initializer(layer: Any, name: str) -> Initializer:
    """The initializer of a parameter; what a bank adds to a shared one starts at 0."""
    return zeros if name.startswith("bank_") else getattr(layer, f"{name}_init")


def _affine(layer: Any) -> tuple[Any, Any]:
    """Whether a layer learns scale and bias: True, False, "own" for each bank, or "both"."""
    if is_torch(layer):
        return layer.affine, layer.affine
    return layer.use_scale, layer.use_bias


def number_of_banks(layer: Any) -> int | None:
    """How many sets of statistics a layer keeps; None if it has no banks."""
    banks = getattr(layer, "banks", None)
    return banks if banks is None or isinstance(banks, int) else len(banks)


def rows(layer: Any) -> tuple[int, ...]:
    """The leading shape of the statistics: one axis if there are banks."""
    banks = number_of_banks(layer)
    return () if banks is None else (banks,)


def statistics(layer: Any) -> tuple[str, ...]:
    """The names of the statistics that a layer keeps."""
    if not getattr(layer, "track_running_stats", True):
        return ()
    count = ("count",) if counts(layer.momentum, getattr(layer, "using", None)) else ()
    return ("mean", "var", *count, *(POOLED if isinstance(layer.momentum, str) else ()))


def with_kept(expected: tuple[str, ...], held: Collection[str]) -> tuple[str, ...]:
    """The expected statistics, and those held for settings that are now overridden."""
    beside = (name for name in ("count", *POOLED) if name in held and name not in expected)
    return (*expected, *beside)


def first_statistics(layer: Any, shape: chex.Shape, dtype: Dtype) -> BatchStats:
    """The statistics of a new layer; for complex input, the mean is complex from the start."""
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
    """Keep statistics in `param_dtype`, even half precision, if a drop-in layer asks for it."""
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
    """The output of a layer and its new statistics."""
    options = settings(layer) | changes
    options["bank"] = bank_of(layer, changes.get("bank"))
    y, moved = batch_norm(params, stats, x, mutable=mutable, **options)
    return y, _as_kept(layer, moved)


def bank_of(layer: Any, given: Any) -> Any:
    """The bank of a call as a number or an array, from its argument or a context."""
    banks = getattr(layer, "banks", None)
    if banks is None:
        checks.no_bank(given)
        return None
    return checks.bank_by_name(current.get() if given is None else given, banks)


# The bank that a context sets for all layers with banks.
current: ContextVar[Any] = ContextVar("bnjax.bank", default=None)
# The names that layers give to banks; few, since users write them by hand.
named_banks: set[tuple[str, ...]] = set()


@contextlib.contextmanager
def naming(layer: Any, where: str | Callable[[], str]) -> Iterator[None]:
    """A context that adds the layer and its place in the model, if known, to every error."""
    try:
        yield
    except Exception as error:
        if place := where if isinstance(where, str) else where():
            error.add_note(f"In {type(layer).__name__} {place}.")
        raise
