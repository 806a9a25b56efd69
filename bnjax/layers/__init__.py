"""Flax layers over the core, for linen and nnx: they own variables and call `batch_norm`."""
