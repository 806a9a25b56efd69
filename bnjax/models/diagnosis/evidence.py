"""The evidence that the rules judge, and the findings that they return."""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from bnjax._words import number_of
from bnjax.models.diagnosis.measuring import Layer, Measured
from bnjax.models.diagnosis.repairs import Repairs, repairs

# Distances between a layer's outputs in evaluation and in training, in standard deviations.
# Networks trained for ten times 1/momentum steps stay below 0.13 and lose nothing measurable. At
# 0.2 in several layers they lose accuracy (weights of one epoch with statistics of the one before:
# 0.98 falls to 0.89). If the loss is higher in evaluation, or the record shows other weights, half
# of it is enough: healthy networks have a lower loss in evaluation, which has no batch noise, or
# at most 1.3 times the loss while the statistics trail.
FAR = 0.2
WORSE = 1.5
# Running statistics vary as batches do. Three deviations, because there are many layers.
SIGMAS = 3.0
# In Group Normalization (Wu and He 2018, figure 1), batch norm's error rises with 8 images or fewer
# per normalization, and steeply with 4 and 2.
FEW_VALUES = 8
# Statistics of i.i.d. examples vary by sqrt(1.5 / examples) if these are normal, and by 1.5 times
# that if a tenth of the values make up the variance. Eight batches estimate it to a fifth, so for
# vectors some layer exceeds 1. Batches of one class each reach 1.2 (16 examples) and 2.2 (64). The
# lower limit applies where batches normalize worse than the running statistics: the loss is higher
# (WORSE), and outputs differ by more than their deviation, as unrelated ones do.
UNLIKE, UNLIKE_AND_WORSE = 1.6, 1.0
# A weight of half or more for the newest batch hardly smooths at all, and the other convention's
# usual 0.9 and 0.99 are in that range. The layers themselves warn from here on.
INVERTED = 0.5
# How far the norm of the same parameters may differ in float32, by the order of summation.
SAME_NORM = 1e-5
# Statistics that were pooled over devices agree to rounding.
APART = 1e-3

Severity = Literal["error", "warning"]


@dataclasses.dataclass(frozen=True, repr=False)
class Finding:
    """One thing that is wrong.

    Attributes:
        kind: the fault, such as "never updated".
        severity: "error" if evaluation is wrong now, "warning" if it may become so.
        layer: path of the layer where it starts or is worst; "" for a batch norm at the top.
        layers: paths of all layers that have it.
        evidence: the measurements, in a sentence.
        numbers: the measurements, by name.
        cause: how it comes about, in a sentence.
        repair: the line of code that fixes it.
    """

    kind: str
    severity: Severity
    layer: str
    layers: tuple[str, ...]
    evidence: str
    numbers: Mapping[str, float]
    cause: str
    repair: str

    def __repr__(self) -> str:
        """What is wrong and where, on one line."""
        return f"Finding({self.kind!r}, {self.severity}, at {self.layer or 'the top'!r})"


@dataclasses.dataclass(frozen=True)
class Evidence:
    """The measurements and the record that the rules judge."""

    measured: Measured
    given_steps: int | None
    record: Mapping[str, Any]  # what `training.history` kept of the training, or nothing

    @property
    def steps(self) -> int | None:
        """How many steps the model was trained for, if known."""
        recorded = self.record.get("step") if self.record_fits else None
        steps = recorded[-1] if self.given_steps is None and recorded else self.given_steps
        return None if steps is None else int(steps)

    @property
    def has_trained(self) -> bool:
        """Whether the model was surely trained, judged by its steps or by scales that have moved.

        In a first step some scales do not move, such as before a layer that starts at zero.
        """
        return (self.steps or 0) > 1 or self.scales_moved > 0

    @property
    def scales_moved(self) -> float:
        """How far scales have moved from their start, where all channels of a layer are equal."""
        scales = [x.scale for x in self.measured.layers if x.scale is not None]
        return float(np.median([np.std(scale) for scale in scales if scale.any()] or [0]))

    @property
    def repairs(self) -> Repairs:
        """The lines of code that fix such a model."""
        return repairs(self.measured.nnx, self.measured.kwargs)

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The layers that ran in training and have finite statistics."""
        return tuple(x for x in self.measured.layers if x.compared)

    @property
    def present(self) -> tuple[Layer, ...]:
        """The layers without banks that no example belonged to."""
        return tuple(x for x in self.measured.layers if not x.absent)

    def spread(self, layer: Layer) -> float:
        """How much the layer's statistics vary between batches; with one batch, by chance."""
        return layer.spread if self.measured.batches > 1 else self.chance

    @property
    def unlike(self) -> list[Layer]:
        """The layers whose statistics vary more than those of i.i.d. batches."""
        worse = self._worse("train", "eval") and self.measured.gap > 1

        def limit(layer: Layer) -> float:
            # A layer that is farther off than batches vary is wrong for another reason.
            among = worse and layer.distance < SIGMAS * layer.spread
            return UNLIKE_AND_WORSE if among else UNLIKE

        several = (x for x in self.measured.layers if x.values > FEW_VALUES)
        return [x for x in several if x.spread > limit(x) * self.chance]

    @property
    def chance(self) -> float:
        """How much the statistics of independent normal examples vary, in deviations."""
        return math.sqrt(1.5 / max(self.measured.examples, 1))

    def is_far(self, layer: Layer) -> bool:
        """Whether running and batch statistics differ by more than chance."""
        momentum = layer.kind.weight or 0.0
        chance = math.sqrt(1 / max(self.measured.batches, 1) + momentum / (2 - momentum))
        far = FAR / 2 if self.suspect else FAR
        return layer.distance > max(far, SIGMAS * self.spread(layer) * chance)

    @property
    def suspect(self) -> bool:
        """Whether the loss or the record, rather than distances, show wrong statistics."""
        lost = any(x.fresh or x.poisoned.any() for x in self.present)  # explains it
        return self.same_weights is False or (self._worse("eval", "train") and not lost)

    @functools.cached_property
    def same_weights(self) -> bool | None:
        """Whether weights and statistics both match the end of the record; None if neither does."""
        norms = self.record.get("params_norm")
        if not norms:
            return None
        weights = abs(self.measured.params_norm - norms[-1]) <= SAME_NORM * norms[-1]
        return weights and self.record_fits if weights or self.record_fits else None

    @property
    def record_fits(self) -> bool:
        """Whether the statistics match the end of the record, as far as it has them."""
        pairs = ((x, self.recorded(x).get("mean")) for x in self.measured.layers)
        return all(
            np.allclose(kept[-1], x.mean[: len(kept[-1])], rtol=1e-5, atol=1e-7)
            for x, kept in pairs
            if kept
        )

    def recorded(self, layer: Layer) -> Mapping[str, Any]:
        """The record of a layer."""
        return self.record.get("layers", {}).get(layer.path, {})

    def _worse(self, mode: str, other: str) -> bool:
        """Whether the loss, if known, is higher in one mode by more than chance."""
        one, two = (self.measured.losses[name].get("loss", math.nan) for name in (mode, other))
        return one - two > (WORSE - 1) * abs(two)


def part(value: float) -> str:
    """A multiple of a deviation, in words to put before "deviation"."""
    if not math.isfinite(value):
        return "NaN times"
    return f"{value:.0%} of" if value < 10 else f"{value:.0f} times"


def paths_of(layers: Sequence[Layer]) -> tuple[str, ...]:
    """The paths of these layers."""
    return tuple(layer.path for layer in layers)


def farthest(layers: Sequence[Layer]) -> Layer:
    """The layer whose running statistics are farthest from those of the batches."""
    return max(layers, key=lambda layer: layer.distance)


def count_of(layers: Sequence[Any]) -> str:
    """How many layers, in words."""
    return number_of(len(layers), "layer")
