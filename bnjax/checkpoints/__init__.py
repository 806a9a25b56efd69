"""Read, write and inspect checkpoint files, and convert from and to PyTorch."""
