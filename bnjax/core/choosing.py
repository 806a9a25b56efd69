"""Choose the moments and the affine map to normalize with, shared or for each example."""

from collections.abc import Mapping

import chex
import jax
import jax.numpy as jnp
from jax import lax

from bnjax.core import banks
from bnjax.core.affine import as_varying, composed, scale_and_shift
from bnjax.core.devices import total
from bnjax.core.measuring import moments_of
from bnjax.core.moments import Moments, at_least
from bnjax.core.partition import Parts, Sharing
from bnjax.core.policies import Affine, Seen, fixed
from bnjax.core.settings import Settings


def choose(
    batch: Moments | None,
    before: Mapping[str, jax.Array],
    after: Mapping[str, jax.Array],
    sharing: Sharing,
    settings: Settings,
) -> tuple[Moments, Affine]:
    """Choose the moments to normalize with, and a policy's affine map, applied before learned ones.

    Args:
        batch: the moments of the batch, if they were measured.
        before: the running statistics before this batch.
        after: the running statistics after this batch.
        sharing: which examples share moments.
        settings: the settings of the call.
    """
    if settings.using is None and settings.by_batch:
        assert batch is not None, "Settings.measures"
        return batch, {}
    mean, var = _running(before, sharing)
    if settings.using is None:
        return fixed(mean, var), {}

    def examples() -> chex.Numeric:
        count = sharing.examples()
        if settings.axis_name is None or sharing.group is not None:
            return count
        return total(count, settings.axis_name, settings.axis_index_groups)

    def each() -> tuple[Moments, jax.Array, jax.Array]:
        moments = moments_of(sharing.each)
        of_mean, of_var = sharing.to_each(mean, var)
        return moments, of_mean, of_var

    moved = _running(after, sharing) if settings.moves else None
    seen = Seen(batch, mean, var, moved, settings.eps, settings.mutable, examples, each)
    return settings.using.choose(seen)


def _running(stats: Mapping[str, jax.Array], sharing: Sharing) -> tuple[jax.Array, jax.Array]:
    dtype = sharing.whole.x.dtype
    mean, var = at_least(dtype, stats["mean"]), at_least(jnp.finfo(dtype).dtype, stats["var"])
    return sharing.beside(mean), sharing.beside(var)


def applied(
    chosen: Moments,
    first: Affine,
    learned: Affine,
    given: Affine,
    sharing: Sharing,
    settings: Settings,
) -> tuple[Parts, jax.Array, jax.Array, jax.Array]:
    """The values, the origin to subtract, the factor to multiply by and the shift to add.

    Args:
        chosen: the moments.
        first: the affine map of a policy.
        learned: that of the layer, with the shape of its statistics.
        given: those of the examples, passed to the call, with the batch axis first.
        sharing: which examples share moments.
        settings: the settings of the call.
    """
    dtype = sharing.whole.x.dtype
    per_example = settings.using is not None and settings.using.per_example
    learned = {key: sharing.beside(value) for key, value in learned.items()}
    if per_example:
        learned = dict(zip(learned, sharing.to_each(*learned.values()), strict=True))
    scale, shift = scale_and_shift(composed(dtype, first, learned), chosen, settings.eps)
    if not (given or per_example or sharing.bank is not None):
        return sharing.parts, *as_varying(sharing.parts, chosen.origin, scale, shift)
    parts = sharing.each
    origin, scale, shift = as_varying(parts, chosen.origin, scale, shift)
    if not per_example:
        (origin,) = sharing.to_each(lax.stop_gradient(origin))
        scale, shift = sharing.to_each(scale, shift)  # together: one pass in the backward pass
    if sharing.bank is not None:
        lost = banks.nowhere(sharing.bank, sharing.banks).reshape(-1, *(1,) * len(settings.axes))
        given = {**given, "bias": given.get("bias", 0) + lost}
    given = {key: jnp.moveaxis(value, 0, sharing.batch) for key, value in given.items()}
    last = composed(dtype, {"scale": scale, "bias": shift}, given)
    return parts, origin, last["scale"], last["bias"]
