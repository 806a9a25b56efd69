"""Policies: which statistics a layer normalizes with (`using=`), and how running ones start."""

from bnjax.core.policies import Batch, Blend, Debiased, Example, Policy, Renorm, Running

__all__ = ["Batch", "Blend", "Debiased", "Example", "Policy", "Renorm", "Running"]
