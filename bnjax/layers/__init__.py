"""Flax layers over the core, of linen and of nnx: they own variables and call `batch_norm`."""
