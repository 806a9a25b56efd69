"""Rules that find faults in the batch norms of a model, one function per fault.

Each returns a `Finding` or None. The rules that explain why running and batch statistics differ are
in `misfits`.
"""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from bnjax._words import number_of
from bnjax.globs import strangers
from bnjax.models.diagnosis.evidence import (
    APART,
    FEW_VALUES,
    INVERTED,
    Evidence,
    Finding,
    count_of,
    farthest,
    part,
    paths_of,
)
from bnjax.models.diagnosis.measuring import Layer

# Like FEW_VALUES, for values that depend on each other, such as the pixels of an image: how much
# the statistics of 12 independent values vary, sqrt(1/12 + 1/24).
NOISY = 0.35
# A channel with a variance below eps comes out with less than 0.7 of its deviation. A dead one is
# constant compared to its neighbours, too: to a thousandth of eps and of their variance.
DEAD = 1e-3
# Below this fraction of its layer's largest scale, a channel is constant next to its neighbours.
# Layers that start at zero, such as the last of a residual block, have no such channels.
NO_SCALE = 1e-3
# A few constant channels are normal: border pixels of images, units that never fire.
MANY = 0.1
# Statistics this far off surely cost accuracy, unless it is chance.
UNCLEAR = 0.5
# Normal values pass this many standard deviations once in a billion.
EXTREME = 6.0


def poisoned(evidence: Evidence) -> Finding | None:
    """NaN, inf or a negative variance among the running statistics."""
    bad = [x for x in evidence.measured.layers if x.poisoned.any()]
    if not bad:
        return None
    channels = sum(int(x.poisoned.sum()) for x in bad)
    negative = sum(int((x.var < 0).sum()) for x in bad)
    return Finding(
        "statistics poisoned",
        "error",
        bad[0].path,
        paths_of(bad),
        f"NaN, inf or a negative variance in {number_of(channels, 'channel')} of {count_of(bad)} "
        f"({negative} negative).",
        {"channels": channels, "negative": negative},
        ("A batch with NaN or inf" if negative < channels else "A variance that cancelled")
        + " was committed to the statistics.",
        evidence.repairs.recalibrate
        + "  # and train with bnjax.training.train_step: it rejects such steps",
    )


def not_finite(evidence: Evidence) -> Finding | None:
    """Batches whose statistics are not finite."""
    bad = [x for x in evidence.measured.layers if np.any(x.lost)]
    if not bad:
        return None
    batches, channels = int(np.max(bad[0].lost)), int(np.count_nonzero(bad[0].lost))
    total = evidence.measured.batches
    where = f"{batches} of {total} batches have" if total > 1 else "The batch has"
    some = batches < total
    return Finding(
        "values not finite",
        "error",
        bad[0].path,
        paths_of(bad),
        f"{where} NaN or inf in {number_of(channels, 'channel')} where it starts.",
        {"batches": batches, "channels": channels},
        "The inputs of these batches hold NaN or inf, or overflow before this layer."
        if some
        else "There is NaN or inf in the inputs or in the parameters before this layer: the repair "
        "shows where.",
        evidence.repairs.finite + "  # find it",
    )


def near_overflow(evidence: Evidence) -> Finding | None:
    """Inputs of a layer that approach the largest number of their dtype."""
    reach = {
        x.path: float(np.max(np.abs(x.batch_mean) + EXTREME * x.std)) / _largest(x.kind.dtype)
        for x in evidence.layers
    }
    bad = [path for path, part in reach.items() if part > 1]
    if not bad:
        return None
    worst = max(bad, key=lambda path: reach[path])
    return Finding(
        "range exhausted",
        "warning",
        worst,
        tuple(bad),
        f"Six standard deviations from the mean is {reach[worst]:.2g} times the largest number of "
        "the input's dtype.",
        {"reach": reach[worst]},
        "The activations are too large for half precision, and will be inf.",
        "model = Model(dtype=jnp.bfloat16)  # or scale the input, or keep this layer in float32",
    )


def not_known(evidence: Evidence) -> Finding | None:
    """Unknown modules that look like batch norms."""
    unknown = evidence.measured.strangers
    if not unknown:
        return None
    return Finding(
        "not diagnosed",
        "warning",
        min(unknown),
        tuple(sorted(unknown)),
        f"{strangers(unknown)}.",
        {"modules": len(unknown)},
        "bnjax does not know how these classes use their statistics.",
        f"bnjax.register({unknown[min(unknown)]}, facts)  # how to read its fields and its call",
    )


def devices_disagree(evidence: Evidence) -> Finding | None:
    """Statistics of several devices that differ."""
    apart = {path: d for path, d in evidence.measured.unequal.items() if d > APART}
    if not apart:
        return None
    worst = max(apart, key=lambda path: apart[path])
    return Finding(
        "devices disagree",
        "error",
        worst,
        tuple(apart),
        f"The statistics of devices differ by up to {apart[worst]:.3g} standard deviations.",
        {"distance": apart[worst]},
        "Each device kept the statistics of its own part of the batch: no layer has an axis name.",
        evidence.repairs.merge + "  # then bnjax.recalibrate; train with axis_name='data'",
    )


def depends_on_batch(evidence: Evidence) -> Finding | None:
    """An evaluation that normalizes by the batch, and may update the statistics."""
    measured, repairs = evidence.measured, evidence.repairs
    moved, untracked = measured.moved, measured.untracked
    paths = moved or untracked + measured.by_batch
    if not paths:
        return None
    if moved:
        cause, repair = f"Evaluation runs in training mode, {repairs.left_on}.", repairs.stay
    elif untracked:
        cause = "The layers keep no running statistics (track_running_stats=False)."
        repair = "BatchNorm2d(..., track_running_stats=True)  # then bnjax.recalibrate"
    else:
        cause = "Evaluation runs in training mode (use_running_average=False)."
        repair = repairs.evaluate
    does = "changed the statistics of" if moved else "normalizes by the batch in"
    return Finding(
        "statistics move in eval" if moved else "eval depends on the batch",
        "error",
        paths[0],
        paths,
        f"An evaluation {does} {count_of(paths)}; with other batch mates, an example's output "
        f"changes by {part(measured.mates)} its deviation.",
        {"layers": len(paths), "mates": measured.mates},
        cause,
        repair,
    )


def in_training_mode(evidence: Evidence) -> Finding | None:
    """An nnx model that was passed in training mode."""
    paths = evidence.measured.training
    if not paths:
        return None
    return Finding(
        "in training mode",
        "warning",
        paths[0],
        paths,
        f"The model was diagnosed as after `.eval()`, but {count_of(paths)} would train: outputs "
        f"would differ from those in evaluation by {part(evidence.measured.gap)} their deviation.",
        {"layers": len(paths), "gap": evidence.measured.gap},
        "Is this how you evaluate it? Then each example depends on its batch mates, and each "
        "evaluation moves the statistics.",
        "model.eval()  # before you evaluate, and before bnjax.diagnose",
    )


def momentum_inverted(evidence: Evidence) -> Finding | None:
    """A momentum of the other convention."""
    trained = [x for x in evidence.measured.layers if not x.kind.frozen]
    bad = [x for x in trained if (x.kind.weight or 0) >= INVERTED]
    if not bad:
        return None
    kind, weight = bad[0].kind, bad[0].kind.weight or 0
    written = 1 - weight if kind.flax else weight
    right, other = f"{1 - written:.3g}", "PyTorch's" if kind.flax else "Flax's"
    noisiest = max(bad, key=lambda x: x.spread)
    several = evidence.measured.batches > 1
    scatter = (
        f"; batches vary by {noisiest.spread:.2f} standard deviations at {noisiest.where}"
        if several
        else ""
    )
    return Finding(
        "momentum looks inverted",
        "warning",
        bad[0].path,
        paths_of(bad),
        f"momentum={written:.3g} in {count_of(bad)} gives the newest batch a weight of "
        f"{weight:.3g}{scatter}.",
        {"momentum": written, "weight": weight} | ({"spread": noisiest.spread} if several else {}),
        f"The value follows {other} convention, so the statistics are those of the last batch or "
        "two.",
        f"{kind.layer}(..., momentum={right})  # then bnjax.recalibrate",
    )


def batch_too_small(evidence: Evidence) -> Finding | None:
    """Batches with too few values to normalize by."""
    measured = evidence.measured
    # If the training is on record, its batches count, not these.
    recorded = evidence.record.get("examples", ())
    larger = max([measured.examples, *recorded]) / max(measured.examples, 1)
    noise = {x.path: x.spread / math.sqrt(larger) for x in measured.layers}

    def noisy(layer: Layer) -> bool:
        # With one value per example, values are independent, and their number is enough.
        return layer.values > measured.examples and noise[layer.path] > NOISY

    few = [x for x in evidence.present if x.values * larger <= FEW_VALUES or noisy(x)]
    unlike = evidence.unlike
    bad = [x for x in few if not x.kind.frozen and x not in unlike]
    if not bad:
        return None
    worst = min(bad, key=lambda x: (x.values, -noise[x.path]))
    values, examples = worst.values * larger, measured.examples * larger
    spread = {"spread": noise[worst.path]} if worst.seen and measured.batches > 1 else {}
    times = max(2 * FEW_VALUES / max(values, 1), (2 * noise[worst.path] / NOISY) ** 2)
    lost = f"the statistics vary by {noise[worst.path]:.2f} standard deviations between batches"
    facts = [lost] if spread else [] if worst.seen else ["a variance is not defined"]
    facts.append(f"outputs in evaluation differ from those in training by {part(measured.gap)}")
    return Finding(
        "batch too small",
        "warning",
        worst.path,
        paths_of(bad),
        f"{number_of(round(values), 'value')} per channel in a batch of {examples:.0f}: "
        f"{', and '.join(facts)} their deviation.",
        {"values": values, "examples": examples, "gap": measured.gap} | spread,
        "In training each example is normalized by a handful of others, in evaluation by all."
        + ("" if recorded else " Pass `history=` if the training had more examples in each."),
        f"batch_size = {math.ceil(examples * times)}"
        f"  # or pool devices by axis_name, or fine-tune frozen: {evidence.repairs.freeze}",
    )


def batches_not_alike(evidence: Evidence) -> Finding | None:
    """Batches that hold different kinds of data."""
    bad, chance, examples = evidence.unlike, evidence.chance, evidence.measured.examples
    if not bad:
        return None
    worst = max(bad, key=lambda x: x.spread)
    return Finding(
        "batches not alike",
        "warning",
        worst.path,
        paths_of(bad),
        f"The statistics vary by {worst.spread:.2f} standard deviations from batch to batch; those "
        f"of {examples} shuffled examples vary by {chance:.2f}.",
        {"spread": worst.spread, "expected": chance, "examples": examples},
        "The data are sorted, such as by class, user or time, so each batch holds only some kinds.",
        "order = np.random.permutation(len(x))"
        "  # shuffle the data; if the training's were sorted, train again",
    )


def dead_channels(evidence: Evidence) -> Finding | None:
    """Channels that are constant or scaled to nothing, or so small that eps sets their scale."""
    layers = _before_zeros(evidence)
    away = {x.path: _scaled_away(evidence, x) for x in layers}
    small = {x.path: x.batch_var < x.kind.eps for x in layers}
    dead = {
        x.path: (x.batch_var <= DEAD * np.minimum(x.kind.eps, x.batch_var.max())) | away[x.path]
        for x in layers
    }
    bad = [x for x in layers if np.mean(small[x.path] | dead[x.path]) > MANY]
    if not bad:
        return None
    worst = max(bad, key=lambda x: np.mean(small[x.path] | dead[x.path]))
    kind, largest, mine = worst.kind, float(worst.batch_var.max()), dead[worst.path]
    size, constant, below = worst.var.size, int(mine.sum()), int((small[worst.path] & ~mine).sum())
    scaled, weak = int(away[worst.path].sum()), constant < below
    if weak:
        cause = "The input of the layer is so small that eps, not its variance, sets the scale."
        repair = f"{kind.layer}(..., {'epsilon' if kind.flax else 'eps'}={_power(largest)})"
        repair += "  # or scale the input up"
    elif scaled == size and not np.any(worst.scale):
        cause = "Its scales are exactly zero, where they started, though the network has trained: "
        cause += "no gradient passes a relu at zero, or nothing trains them"
        cause += "." if evidence.steps else ", or they are new. Pass `steps=` to find out."
        repair = f"{kind.layer}(..., scale_init=jax.nn.initializers.ones)  # and train again"
    else:
        cause = "The channels before this layer never fire."
        cause = "Its scales have gone to zero." if 2 * scaled > constant else cause
        repair = "optax.adamw(lr, mask=bnjax.decay_mask)  # and train again, with a lower rate"
    return Finding(
        "eps dominates" if weak else "dead channels",
        "warning",
        worst.path,
        paths_of(bad),
        f"Of {number_of(size, 'channel')} {constant} have a constant output ({scaled} by their "
        f"scale) and {below} have a variance below eps={kind.eps:.0e}; the largest is "
        f"{largest:.1e}.",
        {"channels": size, "constant": constant, "below_eps": below, "largest": largest},
        cause,
        repair,
    )


def too_few_data(evidence: Evidence) -> Finding | None:
    """Layers that look wrong on so little data that it may be chance."""
    measured = evidence.measured
    bad = [x for x in evidence.layers if x.distance > UNCLEAR]
    if not bad:
        return None
    worst = farthest(bad)
    return Finding(
        "too few data",
        "warning",
        worst.path,
        paths_of(bad),
        f"{worst.where} is {worst.distance:.2g} standard deviations from these data, and "
        f"{number_of(measured.batches, 'batch')} of {number_of(measured.examples, 'example')} may "
        "be as far by chance.",
        {"distance": worst.distance, "batches": measured.batches, "examples": measured.examples},
        "With so few examples, wrong statistics can't be distinguished from chance.",
        "bnjax.diagnose(model, variables, batches)  # eight batches of the training's size",
    )


def _scaled_away(evidence: Evidence, layer: Layer) -> np.ndarray:
    """The channels that a layer scales to nothing, compared to others.

    Those are of the same layer or, if scales of other layers have moved, of any layer.
    """
    scale = np.abs(np.ones(layer.var.size) if layer.scale is None else layer.scale)
    if not scale.any():
        return np.full(scale.size, evidence.has_trained)
    return scale < NO_SCALE * max(scale.max(), evidence.scales_moved)


def _before_zeros(evidence: Evidence) -> tuple[Layer, ...]:
    """In a network that is not yet trained, the layers up to the first that is scaled by zero.

    The layers after it are constant until the first step.
    """
    layers = evidence.layers
    zeros = (n for n, x in enumerate(layers, 1) if x.scale is not None and not x.scale.any())
    return layers if evidence.has_trained else layers[: next(zeros, len(layers))]


def _largest(dtype: Any) -> float:
    return float(jnp.finfo(dtype).max) if jnp.issubdtype(dtype, jnp.inexact) else math.inf


def _power(value: float) -> str:
    """An eps that is well below this variance."""
    return f"1e{math.floor(math.log10(max(value, 1e-30))) - 3}"
