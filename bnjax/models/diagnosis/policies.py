"""Find problems with policies; as in `findings`, each rule returns a `Finding` or None."""

import numpy as np

from bnjax._words import number_of
from bnjax.models.diagnosis.evidence import Evidence, Finding, count_of, part, paths_of

# Limits are meant for the few channels that are off by chance; this share of them is too many.
LIMITED = 0.5


def by_policy(evidence: Evidence) -> Finding | None:
    """A policy that makes evaluation depend on the batch."""
    policies = evidence.measured.by_policy
    if not policies:
        return None
    first = min(policies)
    return Finding(
        "eval depends on the batch",
        "warning",
        first,
        tuple(policies),
        f"using={policies[first]} in {count_of([*policies])}: in evaluation, an example's output "
        f"changes by {part(evidence.measured.mates)} its deviation with other batch mates.",
        {"layers": len(policies), "mates": evidence.measured.mates},
        "The policy takes the statistics of the batch, so large and mixed batches matter.",
        "with bnjax.override('**', using=None):  # or larger batches, or Blend with a larger prior",
    )


def renorm_limited(evidence: Evidence) -> Finding | None:
    """Batch renormalization that hits its limits most of the time."""
    bad = [x for x in evidence.layers if not x.fresh and np.mean(x.limited) > LIMITED]
    if not bad:
        return None
    worst = max(bad, key=lambda x: np.mean(x.limited))
    share, lags = float(np.mean(worst.limited)), evidence.is_far(worst)
    cause = (
        "The running statistics lag behind the weights, or come from other data."
        if lags
        else f"With {number_of(round(worst.values), 'value')} per channel, batches scatter by more "
        "than the limits allow."
    )
    repair = "norm = BatchNorm2d(..., using=bnjax.policies.Renorm(r_max=3, d_max=5))"
    return Finding(
        "renorm at its limits",
        "warning",
        worst.path,
        paths_of(bad),
        f"r or d is at its limit in {share:.0%} of the channels, so training normalizes with "
        "neither what evaluation uses nor the batch.",
        {"limited": share, "distance": worst.distance, "values": worst.values},
        cause,
        evidence.repairs.recalibrate + "  # and a larger momentum"
        if lags
        else repair + "  # or larger batches",
    )
