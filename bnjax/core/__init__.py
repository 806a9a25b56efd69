"""Batch normalization as arithmetic on arrays: plain dicts in, plain dicts out."""
