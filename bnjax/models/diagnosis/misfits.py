"""Why running statistics are not those of the batches: one cause for each layer, surest first.

In training each layer is normalized by the batch, so the layer after it sees what it saw in the
training whatever the data's brightness or scale: shifted data show in the first layer above all.
Weights that are not those of the statistics show in every layer, and in the first least: of data of
mean zero no weights make another mean. Statistics on their way from mean 0 and variance 1 show the
same part of the way in each layer, in means as in variances.
"""

import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from bnjax.models.diagnosis.evidence import (
    APART,
    FAR,
    INVERTED,
    Evidence,
    Finding,
    count_of,
    farthest,
    part,
    paths_of,
)
from bnjax.models.diagnosis.measuring import Layer

# The initial values are gone when they weigh 1%; above 5% the variance is off by more than chance.
GONE, LAGGING = 0.01, 0.05
# How far the parts of the way may differ between layers. With weights that move during the training
# they differ by 0.04 to 0.06; where something else is wrong, by 0.3 and more.
CONSISTENT = 0.12
# How much of the squared distance the lag must explain. It explains over 0.9 of its own, and 0.1 to
# 0.7 of what other weights make, whose layers may still agree in their shares.
EXPLAINED = 0.75
# What says how far along the statistics are: targets this far from their start, in deviations.
INFORMATIVE = 0.1
# Shifted data move the layer they meet first 2 to 5 times as far as any after it; with other
# weights the first layer is at 0.1 to 0.9 of the farthest.
DOMINANT = 1.2
# With a layer's own statistics the loss of good weights falls; that of data the model was not made
# for does not.
HELPS = 0.8
# A running value stands still where its step is below half a unit in its last place.
STALLED = 0.5
# The norm of the same parameters, in float32, in another order of summation.
SAME_NORM = 1e-5


def misfits(evidence: Evidence) -> list[Finding]:
    """What explains the layers whose running statistics are far from those of the batches."""
    fresh = [x for x in evidence.measured.layers if not x.mean.any() and (x.var == 1).all()]
    others = [x for x in evidence.layers if x not in fresh]
    # Statistics merged from devices that disagree are an estimate, and fit nobody's data exactly;
    # batches that are not alike change what each layer after the first normalizes.
    apart = max(evidence.measured.unequal.values(), default=0) > APART
    blurred = apart or bool(evidence.unlike)
    far = [x for x in others if evidence.is_far(x) and not blurred]
    half = [x for x in others if jnp.finfo(x.dtype).bits < 32]
    stalled = [x for x in half if x in far and _stalls(x)]
    far = [x for x in far if x not in stalled]
    lagging = _lagging(evidence, far, others)
    far = [x for x in far if x not in lagging]
    found = []
    if fresh:
        found.append(never_updated(evidence, fresh))
    if half:
        found.append(half_precision(evidence, half, stalled))
    if lagging:
        found.append(lagging_behind(evidence, lagging))
    if far:
        cause = data_differ if _data_are_to_blame(evidence, far, others) else other_weights
        found.append(cause(evidence, far, others))
    return found


def never_updated(evidence: Evidence, fresh: Sequence[Layer]) -> Finding:
    """Statistics that are what initialization made them."""
    worst = farthest(fresh)
    cause, repair = _why_never(evidence, fresh)
    return Finding(
        "never updated",
        "error",
        worst.path,
        paths_of(fresh),
        f"Mean 0 and variance 1, exactly, in {count_of(fresh)} of {len(evidence.measured.layers)}; "
        f"the batches are {worst.distance:.2g} standard deviations away at '{worst.path}'.",
        {"layers": len(fresh), "distance": worst.distance},
        cause,
        repair,
    )


def _why_never(evidence: Evidence, fresh: Sequence[Layer]) -> tuple[str, str]:
    """Cause and repair, for those whose statistics never moved."""
    kind, repairs = fresh[0].kind, evidence.repairs
    if all(x.kind.momentum == 0 for x in fresh):
        written, usual = (1.0, 0.99) if kind.flax else (0.0, 0.1)
        cause = f"With momentum={written} a new batch has no weight."
        return cause, f"{kind.layer}(..., momentum={usual})  # then bnjax.recalibrate"
    if len(fresh) < len(evidence.measured.layers):
        cause = "Others were updated, so these are new, or evaluate while the model trains."
        return cause, repairs.hand_on
    return f"The updates were thrown away: {repairs.thrown_away}.", repairs.train


def half_precision(evidence: Evidence, half: Sequence[Layer], stalled: Sequence[Layer]) -> Finding:
    """Statistics in a dtype that an average with a small momentum does not move in."""
    worst = farthest(stalled or half)
    unit = float(jnp.finfo(worst.dtype).eps)
    stop = STALLED * unit / (worst.kind.momentum or 1.0)
    return Finding(
        "half-precision statistics",
        "error" if stalled else "warning",
        worst.path,
        paths_of(stalled or half),
        f"{worst.dtype.name} in {count_of(half)}: with a momentum of {worst.kind.momentum} a "
        f"value stands still within {stop:.1%} of its target; they are {worst.distance:.2g} "
        "standard deviations away.",
        {"stops_at": stop, "distance": worst.distance},
        f"Steps smaller than the resolution of {worst.dtype.name} ({unit:.1e}) are rounded away.",
        evidence.repairs.widen + "  # then bnjax.recalibrate",
    )


def lagging_behind(evidence: Evidence, lagging: Sequence[Layer]) -> Finding:
    """Statistics that have not arrived since the training began."""
    layer = farthest(lagging)
    momentum = layer.kind.momentum
    assert momentum is not None
    if evidence.steps is None:
        left = 1 - float(np.median([share for x in lagging for share in _shares(x)]))
        steps = math.log(max(left, 1e-9)) / math.log1p(-momentum)
        seen = f"look as after {steps:.0f} steps"
    else:
        steps, left = evidence.steps, (1 - momentum) ** evidence.steps
        seen = f"have seen {steps} steps"
    needed = math.ceil(math.log(GONE) / math.log1p(-momentum))
    fast = 1 - GONE ** (1 / max(steps, 1))
    written = 1 - fast if layer.kind.flax else fast
    return Finding(
        "lagging",
        "error",
        layer.path,
        paths_of(lagging),
        f"The statistics of {count_of(lagging)} {seen} and still hold {left:.0%} of their initial "
        f"values; with a new batch's weight of {momentum:.3g} it takes {needed} steps.",
        {"steps": steps, "left": left, "needed": needed, "distance": layer.distance},
        "The momentum is too small for so few steps.",
        evidence.repairs.recalibrate
        + (f"  # or train with momentum={written:.2g}" if fast < INVERTED else "  # or train on"),
    )


def data_differ(evidence: Evidence, far: Sequence[Layer], layers: Sequence[Layer]) -> Finding:
    """Data that are not like those of the training."""
    start = far[0]
    ratio, mean = start.var_off, start.mean_off
    return Finding(
        "data differ from training data",
        "error",
        start.path,
        paths_of(far),
        f"It starts in '{start.path}': its means are {mean:.2g} standard deviations away, and its "
        f"running variance is {ratio:.2g} times that of these data"
        + (f"; among {len(layers)} layers it is the farthest." if len(layers) > 1 else "."),
        {"mean_distance": mean, "var_ratio": ratio, "distance": start.distance},
        "These inputs have another mean, scale or content than those of the training.",
        "x = (x - train_mean) / train_std"
        f"  # as in the training; if the data are new: {evidence.repairs.recalibrate}",
    )


def other_weights(evidence: Evidence, far: Sequence[Layer], layers: Sequence[Layer]) -> Finding:
    """Statistics that were gathered with other parameters."""
    worst = farthest(far)
    return Finding(
        "statistics belong to other weights",
        "error",
        worst.path,
        paths_of(far),
        f"{len(far)} of {len(layers)} layers are off, by up to {worst.distance:.2g} standard "
        f"deviations at '{worst.path}', but the first, which sees the data themselves, by "
        f"{layers[0].distance:.2g}; outputs differ by {part(evidence.measured.gap)} their "
        "deviation.",
        {"layers": len(far), "distance": worst.distance, "first": layers[0].distance},
        "The weights are an average (EMA, SWA), of another step, or moved faster than the "
        "statistics follow.",
        evidence.repairs.recalibrate,
    )


def _data_are_to_blame(evidence: Evidence, far: Sequence[Layer], layers: Sequence[Layer]) -> bool:
    """Whether the data, rather than the weights, are not those of the statistics."""
    same = _same_weights(evidence)
    if same is not None:
        return same
    losses = evidence.measured.losses
    if losses["train"] and losses["train"]["loss"] > HELPS * losses["eval"]["loss"]:
        return True
    start = far[0]
    before = layers[: layers.index(start)]
    others = [x.distance for x in layers if x is not start]
    quiet = all(x.distance < FAR / 4 for x in before)
    return quiet and start.distance >= DOMINANT * max(others, default=0)


def _same_weights(evidence: Evidence) -> bool | None:
    """Whether the weights are those at the end of the record, if the statistics are."""
    record = evidence.record
    if not record.get("params_norm"):
        return None
    for layer in evidence.measured.layers:
        kept = record["layers"].get(layer.path)
        if kept is not None:
            last = np.asarray(kept["mean"][-1])
            if not np.allclose(last, layer.mean[: last.size], rtol=1e-5, atol=1e-7):
                return None
    norm = record["params_norm"][-1]
    return abs(evidence.measured.params_norm - norm) <= SAME_NORM * norm


def _lagging(evidence: Evidence, far: Sequence[Layer], layers: Sequence[Layer]) -> list[Layer]:
    """The layers that still hold a part of their initial values, the same one in each."""
    some = [x for x in far if x.kind.momentum and x.kind.momentum < 1]
    if evidence.steps is not None:
        return [x for x in some if (1 - (x.kind.momentum or 0)) ** evidence.steps > LAGGING]
    paces = {x.kind.momentum for x in some}
    # Those that have arrived count as well: what lags, lags in all layers of a momentum.
    shares = [share for x in layers if x.kind.momentum in paces for share in _shares(x)]
    if len(shares) < 2:
        return []
    share = float(np.median(shares))
    consistent = float(np.mean(np.abs(np.array(shares) - share))) < CONSISTENT
    explained = float(np.median([_explained(x, share) for x in some])) > EXPLAINED
    return some if 0 <= share < 1 - LAGGING and consistent and explained else []


def _shares(layer: Layer) -> list[float]:
    """Which parts of the way from 0 and 1 to the batches' mean and variance they have come."""
    return [
        float(done @ way / (way @ way))
        for way, done in _ways(layer)
        if np.mean(way**2) > INFORMATIVE
    ]


def _explained(layer: Layer, share: float) -> float:
    """Which part of the squared distance goes away if they had come this part of the way.

    And of what they have moved: where the data are far away, any statistics look like none.
    """
    way, done = (np.concatenate(parts) for parts in zip(*_ways(layer), strict=True))
    left = np.sum((done - share * way) ** 2)
    return float(1 - left / min(np.sum((done - way) ** 2), 2 * np.sum(done**2)))


def _ways(layer: Layer) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
    """From 0 and 1 to the batches' mean and variance, and to the running ones; in deviations."""
    fine = ~layer.poisoned
    std = layer.std[fine]
    return (
        (np.real(layer.batch_mean[fine]) / std, np.real(layer.mean[fine]) / std),
        ((layer.batch_var[fine] - 1) / std**2, (layer.var[fine] - 1) / std**2),
    )


def _stalls(layer: Layer) -> bool:
    """Whether the running values are as near as their dtype lets them come."""
    stop = STALLED * float(jnp.finfo(layer.dtype).eps) / (layer.kind.momentum or 1.0)
    off = np.abs(layer.mean - layer.batch_mean), np.abs(layer.var - layer.batch_var)
    reach = np.abs(layer.mean), np.abs(layer.var)
    # Twice, for a batch is not the target itself, and neighbours of the layer stall as well.
    near = [np.mean(a <= 2 * stop * b + 0.1 * layer.std) for a, b in zip(off, reach, strict=True)]
    return bool(min(near) > 0.8)
