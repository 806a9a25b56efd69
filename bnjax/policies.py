"""Policies (`using=`), which choose the statistics to normalize with; and `Debiased` momentum."""

from bnjax.core.policies import Batch, Blend, Debiased, Example, Policy, Renorm, Running

__all__ = ["Batch", "Blend", "Debiased", "Example", "Policy", "Renorm", "Running"]
