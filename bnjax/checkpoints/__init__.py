"""Checkpoint files: read, written, inspected, and converted from and to PyTorch."""
