"""Explain why a network with batch norm is good in training and bad in evaluation: diagnose."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from flax import linen as nn
from flax import nnx

from bnjax.models import checks
from bnjax.models.batches import Inputs, LossFn, layout
from bnjax.models.diagnosis import findings, policies
from bnjax.models.diagnosis.evidence import Evidence
from bnjax.models.diagnosis.evidence import Finding as Finding
from bnjax.models.diagnosis.measuring import measured
from bnjax.models.diagnosis.misfits import misfits
from bnjax.models.diagnosis.report import Report as Report
from bnjax.models.diagnosis.report import row_of
from bnjax.models.saved import variables_of_model

_RULES = (
    findings.poisoned,
    findings.not_finite,
    findings.not_known,
    findings.devices_disagree,
    findings.depends_on_batch,
    policies.by_policy,
    policies.renorm_limited,
    findings.in_training_mode,
    findings.momentum_inverted,
    findings.batch_too_small,
    findings.batches_not_alike,
    findings.dead_channels,
    findings.near_overflow,
)


def diagnose(
    model: nn.Module | nnx.Module,
    variables: Any,
    batches: Iterable[Any],
    *,
    loss_fn: LossFn | None = None,
    steps: int | None = None,
    history: Mapping[str, Any] | None = None,
    inputs: Inputs = "x",
    per_example: Sequence[str] | None = None,
    apply_kwargs: Mapping[str, Any] | None = None,
) -> Report:
    """Find what is wrong with the batch norms of a model: which layer, why, and how to fix it.

    Each batch runs through the model twice in one compiled step: as you evaluate, and with batch
    norms in training. O(C) numbers are kept per layer: how far its running statistics are from
    those of the batches, how much those vary, and how many values there are per channel. Nothing
    that you pass in is changed.

    Guide: examples/guides/diagnosis.md

    Args:
        model: a linen or nnx model with bnjax's or Flax's own batch norms. An nnx model is
            evaluated as after `.eval()`; if it is in training mode, the report warns.
        variables: its variables, a `TrainState` or the result of `bnjax.load`, as for
            `recalibrate`. Statistics with a leading device axis are compared between devices, and
            merged.
        batches: inputs of the model, or dicts with `"x"`, optionally `"mask"`, bool (N,), and what
            the loss needs. Use training data and the batch size of the training; eight batches are
            enough.
        loss_fn: `loss_fn(outputs, batch)`, as for `training.train_step`: adds loss and metrics in
            both modes to the report.
        steps: how many steps the model was trained for, to recognize statistics that lag.
        history: a record from `training.history`. It has the steps and the batch size, and helps
            to distinguish averaged weights from shifted data, and layers left in evaluation from
            new ones.
        inputs: which entries of a batch to call the model with, as for `training.train_step`.
        per_example: names of the entries that have one value per example, as there.
        apply_kwargs: the arguments that you evaluate the model with, such as `{"train": False}`;
            include `"mutable"` if you pass it.

    Returns:
        The report: `print(report)`, `report.findings`, `report.to_json()`, `report.plot(path)`.

    Raises:
        ValueError: there is no batch or no batch norm, or the variables do not fit the model.
        TypeError: the model is not a Flax model.

    >>> import jax, jax.numpy as jnp, bnjax
    >>> x = jax.random.normal(jax.random.key(0), (64, 3)) + 5
    >>> layer = bnjax.BatchNorm1d()
    >>> variables = layer.init(jax.random.key(1), x)
    >>> [finding.kind for finding in diagnose(layer, variables, [x]).findings]
    ['never updated']
    >>> diagnose(layer, bnjax.recalibrate(layer, variables, [x]), [x]).healthy
    True
    """
    checks.flax_model(model)
    variables = variables_of_model(model, variables)
    seen = measured(
        model, variables, batches, loss_fn, layout(inputs, per_example), dict(apply_kwargs or {})
    )
    return report_of(Evidence(seen, steps, history or {}))


def report_of(evidence: Evidence) -> Report:
    """Apply all rules to the evidence."""
    seen = evidence.measured
    found = [finding for rule in _RULES if (finding := rule(evidence))] + misfits(evidence)
    if not found and (unclear := findings.too_few_data(evidence)):
        found = [unclear]
    return Report(
        findings=tuple(sorted(found, key=lambda finding: finding.severity)),
        layers=tuple(row_of(layer, seen.batches) for layer in seen.layers),
        outputs={"gap": seen.gap, "mates": seen.mates},
        losses=seen.losses,
        batches=seen.batches,
        _measured=seen,
    )
