"""Why running statistics differ from those of the batches: one cause per layer, surest first.

In training mode each layer is normalized by the batch, so the next layer sees what it saw during
training, whatever the brightness or scale of the data. So shifted data show in the first layer
above all. Weights that do not belong to the statistics show in every layer, and least in the first:
whatever the weights, data with mean zero keep it. Statistics on their way from mean 0 and variance
1 have come the same fraction of the way in each layer, in means as in variances.
"""

import math
from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np

from bnjax._words import number_of
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

# Initial values are gone when they weigh 1%. Above 5% the variance is off by more than chance.
GONE, LAGGING = 0.01, 0.05
# How much the fraction of the way may differ between layers, long ways weighing more. It differs by
# 0.1 at most where weights move during training. If something else is wrong, it differs by more, or
# the lag explains little.
CONSISTENT = 0.12
# How much of the squared distance the lag must explain. A real lag explains 0.6 and more, even with
# fast weights; with other weights, whose layers may agree, it explains less than 0.5. A single
# layer follows the weights before it more directly, so that its lag may explain 0.57.
EXPLAINED, EXPLAINED_ALONE = 0.6, 0.55
# Targets at least this far from the start, in deviations, show how far statistics have come.
INFORMATIVE = 0.1
# Statistics trail the weights by 1/momentum steps. The first weights, five deviations away at most,
# still weigh as much as the initial values. So even good weights move a layer by 0.2 (learning
# rates up to 0.01, trained for 6/momentum steps) to 0.4 (3/momentum).
TRAILING, FIRST_WEIGHTS = 0.25, 5.0
# Shifted data move the first layer they reach 1.6 (noise) to 30 times as far as any later one. With
# other weights the first layer is at 0.1 to 0.9 of the farthest, and the second may be at 1.4.
DOMINANT = 1.5
# Fraction of the distance that the last recorded batch must show, too, to count as the same data.
SAME_DATA = 0.5
# A running value stops moving when its step is below half a unit in the last place.
STALLED = 0.5


def misfits(evidence: Evidence) -> list[Finding]:
    """Explain the layers whose running statistics are far from those of the batches."""
    layers = evidence.present
    fresh = [x for x in layers if x.fresh]
    others = [x for x in evidence.layers if x not in fresh]
    # Statistics merged from devices that disagree are estimates and fit no data exactly. Batches of
    # different kinds change what each layer after the first normalizes.
    apart = max(evidence.measured.unequal.values(), default=0) > APART
    blurred = apart or bool(evidence.unlike)
    far = [x for x in others if evidence.is_far(x) and not blurred]
    held = [x for x in layers if x.kind.weight == 0 and not x.kind.frozen]
    still = [x for x in held if x in fresh or x in far]
    fresh, far = ([x for x in some if x not in still] for some in (fresh, far))
    half = [x for x in others if jnp.finfo(x.dtype).bits < 32]
    stalled = [x for x in half if x in far and _stalls(x)]
    far = [x for x in far if x not in stalled]
    left = {x.path: _left(evidence, x, others) for x in far}
    lagging, far = _lagging(evidence, far, left)
    found = []
    if still:
        found.append(stands_still(still))
    if fresh:
        found.append(never_updated(evidence, fresh, len(fresh) + len(still) < len(layers)))
    if half:
        found.append(half_precision(evidence, half, stalled))
    if lagging:
        found.append(lagging_behind(evidence, lagging, left))
    sure = evidence.suspect and not lagging
    if far and _data_are_to_blame(evidence, far, others, left):
        found.append(data_differ(evidence, far, others))
    elif far := [x for x in far if sure or x.distance > _reach(left[x.path])]:
        found.append(other_weights(evidence, far, others))
    return found


def stands_still(still: Sequence[Layer]) -> Finding:
    """Statistics with a momentum that gives new batches no weight."""
    kind, worst = still[0].kind, farthest(still)
    written, usual = (1.0, 0.99) if kind.flax else (0.0, 0.1)
    return Finding(
        "momentum moves nothing",
        "error",
        worst.path,
        paths_of(still),
        f"momentum={written} in {count_of(still)}; the statistics are {worst.distance:.2g} "
        f"standard deviations from those of these data.",
        {"momentum": written, "layers": len(still), "distance": worst.distance},
        f"With momentum={written} a new batch has no weight, so statistics never move in training.",
        f"{kind.layer}(..., momentum={usual})  # then bnjax.recalibrate",
    )


def never_updated(evidence: Evidence, fresh: Sequence[Layer], alone: bool) -> Finding:
    """Statistics that still have their initial values, in all layers or in some."""
    worst, repairs, total = farthest(fresh), evidence.repairs, len(evidence.present)
    lost = f"the updates were thrown away: {repairs.thrown_away}."
    unused = _unused(evidence, fresh)
    if unused:
        cause = "The training had no examples of these banks, but of others."
    elif alone and _seen_to_evaluate(evidence, fresh):
        cause = "These layers evaluate while the model trains: its mode is not passed on to them."
    elif alone:
        cause = (
            "These layers evaluate while the model trains, as its mode is not passed on to them,"
        )
        cause += " or they are new. Pass `history=` of the training to find out."
    elif evidence.has_trained:
        cause = lost[0].upper() + lost[1:]
    else:
        cause = f"The model is new, or {lost} Pass `steps=` of the training to find out."
    return Finding(
        "left in evaluation" if alone and not unused else "never updated",
        "error",
        worst.path,
        paths_of(fresh),
        f"Mean 0 and variance 1, exactly, in {count_of(fresh)} of {total}; these data are "
        f"{worst.distance:.2g} standard deviations away at {worst.where}.",
        {"layers": len(fresh), "distance": worst.distance},
        cause,
        repairs.recalibrate if unused else repairs.hand_on if alone else repairs.train,
    )


def _unused(evidence: Evidence, fresh: Sequence[Layer]) -> bool:
    """Whether these are banks of layers of which other banks have been updated."""
    moved = {x.path.rpartition("[")[0] for x in evidence.measured.layers if not x.fresh}
    return all(x.kind.banks is not None and x.path.rpartition("[")[0] in moved for x in fresh)


def _seen_to_evaluate(evidence: Evidence, fresh: Sequence[Layer]) -> bool:
    """Whether the record shows that these layers stood still while others moved."""
    kept = {x.path: evidence.recorded(x).get("mean") for x in evidence.measured.layers}
    moved = any(rows and rows[0] != rows[-1] for rows in kept.values())
    return evidence.record_fits and moved and all(kept[x.path] for x in fresh)


def half_precision(evidence: Evidence, half: Sequence[Layer], stalled: Sequence[Layer]) -> Finding:
    """Statistics in a dtype that is too coarse for a small momentum to move them."""
    worst = farthest(stalled or half)
    unit = float(jnp.finfo(worst.dtype).eps)
    stop = STALLED * unit / (worst.kind.weight or 1.0)
    return Finding(
        "half-precision statistics",
        "error" if stalled else "warning",
        worst.path,
        paths_of(stalled or half),
        f"{worst.dtype.name} in {count_of(half)}: with a momentum of {worst.kind.weight} a "
        f"value stalls within {stop:.1%} of its target; they are {worst.distance:.2g} "
        "standard deviations away.",
        {"stops_at": stop, "distance": worst.distance},
        f"Steps smaller than the resolution of {worst.dtype.name} ({unit:.1e}) are rounded away.",
        evidence.repairs.widen + "  # then bnjax.recalibrate",
    )


def lagging_behind(
    evidence: Evidence, lagging: Sequence[Layer], parts: Mapping[str, float]
) -> Finding:
    """Statistics that have not caught up since training began."""
    layer = farthest(lagging)
    momentum = layer.kind.weight
    assert momentum is not None
    left, steps = parts[layer.path], evidence.steps
    if steps is None:
        steps = math.log(max(left, 1e-9)) / math.log1p(-momentum)
        seen, sure = f"look like after {steps:.0f} steps", " Pass `steps=` to be sure."
    else:
        seen, sure = f"have seen {number_of(steps, 'step')}", ""
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
        "The momentum is too small for so few steps." + sure,
        evidence.repairs.recalibrate
        + (f"  # or train with momentum={written:.2g}" if fast < INVERTED else "  # or train on"),
    )


def data_differ(evidence: Evidence, far: Sequence[Layer], layers: Sequence[Layer]) -> Finding:
    """Data that differ from the training data."""
    start = far[0]
    ratio, mean = start.var_off, start.mean_off
    most = len(layers) > 1 and start is farthest(layers)
    return Finding(
        "data differ from training data",
        "error",
        start.path,
        paths_of(far),
        f"It starts in {start.where}: its means are {mean:.2g} standard deviations away, and its "
        f"running variance is {ratio:.2g} times that of these data"
        + (f"; it is the farthest of {len(layers)} layers." if most else "."),
        {"mean_distance": mean, "var_ratio": ratio, "distance": start.distance},
        "These inputs differ in mean, scale or content from the training inputs."
        if evidence.same_weights
        else "These inputs differ in mean, scale or content from the training inputs, if the "
        "weights belong to the statistics: pass `history=` to be sure.",
        "x = (x - train_mean) / train_std"
        f"  # as in training; if the data are new: {evidence.repairs.recalibrate}",
    )


def other_weights(evidence: Evidence, far: Sequence[Layer], layers: Sequence[Layer]) -> Finding:
    """Statistics that were gathered with other parameters."""
    worst, first = farthest(far), layers[0].distance
    others = "" if len(layers) > 1 else ", or the data are others"
    causes = {
        True: "The weights moved faster than the statistics follow.",
        False: "Either weights or statistics are not those at the end of the record: the weights "
        "are an average (EMA, SWA), or the two are of different steps.",
        None: "The weights are an average (EMA, SWA), of another step, or moved faster than the "
        f"statistics follow{others}. Pass `history=` of the training to find out.",
    }
    return Finding(
        "statistics belong to other weights",
        "error",
        worst.path,
        paths_of(far),
        f"{len(far)} of {len(layers)} layers are off, by up to {worst.distance:.2g} standard "
        f"deviations at {worst.where}, and the first, which sees the data directly, by "
        f"{first:.2g}; outputs differ by {part(evidence.measured.gap)} their deviation.",
        {"layers": len(far), "distance": worst.distance, "first": first},
        causes[evidence.same_weights],
        evidence.repairs.recalibrate,
    )


def _data_are_to_blame(
    evidence: Evidence, far: Sequence[Layer], layers: Sequence[Layer], left: Mapping[str, float]
) -> bool:
    """Whether the data, rather than the weights, do not belong to the statistics."""
    start, same = far[0], evidence.same_weights
    others = [x.distance for x in layers if x is not start]
    # A distance that trailing explains is no sign of other data. Without the steps, the distances
    # of other layers show what trailing does; a single layer may trail as far as any.
    reach = FAR if others else _reach(LAGGING)
    if evidence.steps is not None:
        reach = _reach(left[start.path])
    if same is False or start.distance <= reach:
        return False
    trailed = _trailed(evidence, start)
    if same and trailed is not None:
        return not trailed
    before = layers[: layers.index(start)]
    quiet = all(x.distance < FAR / 4 for x in before)
    return quiet and start.distance >= DOMINANT * max(others, default=0)


def _trailed(evidence: Evidence, layer: Layer) -> bool | None:
    """Whether they were as far from the training's last batch; None if that is not recorded."""
    kept = evidence.recorded(layer)
    both = zip(kept.get("batch_mean", ()), kept.get("batch_var", ()), strict=True)
    last = [np.asarray(rows) for rows in both if np.isfinite(rows).all()][-1:]
    if not last:
        return None
    mean, var = last[0]
    some, std = slice(mean.size), layer.std[: mean.size]

    def off(mean: np.ndarray, var: np.ndarray) -> np.ndarray:
        return np.r_[(layer.mean[some] - mean) / std, (layer.var[some] - var) / (2 * std**2)].real

    now = off(layer.batch_mean[some], layer.batch_var[some])
    return bool(off(mean, var) @ now > SAME_DATA * now @ now)


def _reach(left: float) -> float:
    """How far statistics may trail the weights in a healthy training, in deviations."""
    return TRAILING + FIRST_WEIGHTS * min(left, LAGGING)


def _left(evidence: Evidence, layer: Layer, layers: Sequence[Layer]) -> float:
    """The fraction of the initial values that is left, by the steps or as all layers agree."""
    pace = layer.kind.weight
    if not pace or pace >= 1:
        return 0.0
    if evidence.steps is not None:
        return float((1 - pace) ** evidence.steps)
    # Layers that have caught up count, too: a lag affects all layers of the same momentum.
    alike = [x for x in layers if x.kind.weight == pace]
    shares = [share for x in alike for share in _shares(x)]
    if len(shares) < 2:
        return 0.0
    values, weights = np.array(sorted(shares)).T
    share = values[np.searchsorted(np.cumsum(weights), weights.sum() / 2)]
    differ = np.average(np.abs(values - share), weights=weights)
    if len(alike) == 1:  # its mean and its variance must agree, however long the way of one is
        differ = np.ptp(values)
    consistent = differ < CONSISTENT
    # One step already goes that far, but for noise.
    return float(1 - share) if pace / 2 <= share < 1 and consistent else 0.0


def _lagging(
    evidence: Evidence, far: Sequence[Layer], left: Mapping[str, float]
) -> tuple[list[Layer], list[Layer]]:
    """The layers that still hold some of their initial values, and those far for other reasons.

    Layers that hold only a little, which explains their distance, are in neither, unless the loss
    shows that it matters.
    """
    explained = {x.path: _explained(x, 1 - left[x.path]) for x in far}
    lagging = [x for x in far if left[x.path] > LAGGING]
    # If the steps are unknown, the distances themselves must show it.
    doubtful = evidence.steps is None and lagging
    needed = EXPLAINED if len(evidence.layers) > 1 else EXPLAINED_ALONE
    if doubtful and np.median([explained[x.path] for x in lagging]) <= needed:
        lagging = []
    small = [x for x in far if 0 < left[x.path] <= LAGGING and explained[x.path] > EXPLAINED]
    others = [x for x in far if x not in lagging and x not in small]
    if evidence.suspect and far and farthest(far) in small:
        lagging += [x for x in small if left[x.path] > GONE]
    return lagging, others


def _shares(layer: Layer) -> list[tuple[float, float]]:
    """Fractions of the way from 0 and 1 to the batches' mean and variance that they have come.

    Each has a weight: the longer the way, the surer the fraction.
    """
    return [
        (float(done @ way / (way @ way)), float(np.mean(way**2)))
        for way, done in _ways(layer)
        if np.mean(way**2) > INFORMATIVE
    ]


def _explained(layer: Layer, share: float) -> float:
    """The fraction of the squared distance that a lag of this share explains.

    It is relative to how far they have moved, too, because statistics far from the data all look
    like initial ones.
    """
    way, done = (np.concatenate(parts) for parts in zip(*_ways(layer), strict=True))
    left, moved = np.sum((done - share * way) ** 2), max(np.sum(done**2), 1e-30)
    return float(1 - left / min(np.sum((done - way) ** 2), 2 * moved))


def _ways(layer: Layer) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
    """The ways from 0 and 1 to the batches' statistics, and to the running ones; in deviations."""
    fine = ~layer.poisoned
    std = layer.std[fine]
    return (
        (np.real(layer.batch_mean[fine]) / std, np.real(layer.mean[fine]) / std),
        ((layer.batch_var[fine] - 1) / std**2, (layer.var[fine] - 1) / std**2),
    )


def _stalls(layer: Layer) -> bool:
    """Whether the running values are as close as their dtype allows."""
    stop = STALLED * float(jnp.finfo(layer.dtype).eps) / (layer.kind.weight or 1.0)
    off = np.abs(layer.mean - layer.batch_mean), np.abs(layer.var - layer.batch_var)
    reach = np.abs(layer.mean), np.abs(layer.var)
    # Twice, because a batch is not the target itself, and neighbouring layers stall as well.
    near = [np.mean(a <= 2 * stop * b + 0.1 * layer.std) for a, b in zip(off, reach, strict=True)]
    return bool(min(near) > 0.8)
