"""PyTorch tensors as NumPy arrays and back, bit for bit."""

from typing import Any

import numpy as np

_BFLOAT16 = "bfloat16"


def as_numpy(value: Any) -> np.ndarray | None:
    """The numbers of a tensor or an array, shared where that is possible; None if it has none.

    NumPy knows no bfloat16, so such a tensor comes as the bfloat16 that JAX registers with NumPy.
    """
    try:
        if hasattr(value, "detach"):
            value = value.detach().cpu()
            if str(value.dtype) == f"torch.{_BFLOAT16}":
                import torch

                return value.contiguous().view(torch.int16).numpy().view(_BFLOAT16)
            return value.numpy()
        array = np.asarray(value) if hasattr(value, "dtype") else None
    except (AttributeError, NotImplementedError, RuntimeError, TypeError):
        return None
    return None if array is None or array.dtype.hasobject else array


def as_tensor(array: np.ndarray) -> Any:
    """A new `torch.Tensor` with the same numbers. Needs torch."""
    import torch

    array = np.array(array, order="C")
    if array.dtype.name == _BFLOAT16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)
