"""What normalizes, and how the running statistics start: settings of layers, `using=` and more."""

from bnjax.core.policies import Batch, Blend, Debiased, Example, Policy, Renorm, Running

__all__ = ["Batch", "Blend", "Debiased", "Example", "Policy", "Renorm", "Running"]
