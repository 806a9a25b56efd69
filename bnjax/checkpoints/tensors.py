"""Convert PyTorch tensors to NumPy arrays and back, bit for bit."""

from typing import Any

import ml_dtypes  # noqa: F401 - registers JAX's dtypes with NumPy
import numpy as np

# PyTorch dtypes that JAX registers with NumPy under the same names.
_FLOAT8 = ("e4m3fn", "e4m3fnuz", "e5m2", "e5m2fnuz", "e8m0fnu")
SHARED = ("bfloat16", *(f"float8_{kind}" for kind in _FLOAT8))


def is_key(value: Any) -> bool:
    """Whether a value holds typed random keys, as `jax.random.key` makes them."""
    dtype = getattr(value, "dtype", None)
    if dtype is None or isinstance(dtype, np.dtype):
        return False
    import jax

    return jax.numpy.issubdtype(dtype, jax.dtypes.prng_key)


def as_numpy(value: Any) -> np.ndarray | None:
    """The values of a tensor or an array, without a copy where possible; None if it has none.

    NumPy lacks bfloat16 and float8: these use the dtypes that JAX registers with NumPy. Typed
    random keys become their data, in uint32.
    """
    try:
        if hasattr(value, "detach"):
            value = value.detach().cpu().resolve_conj().resolve_neg()
            name = str(value.dtype).removeprefix("torch.")
            if name in SHARED:
                import torch

                bits = torch.int16 if value.element_size() == 2 else torch.uint8
                return value.contiguous().view(bits).numpy().view(name)
            return value.numpy()
        if is_key(value):
            import jax

            value = jax.random.key_data(value)
        array = np.asarray(value) if hasattr(value, "dtype") else None
    except (AttributeError, NotImplementedError, RuntimeError, TypeError):
        return None
    return None if array is None or array.dtype.hasobject else array


def as_tensor(array: np.ndarray) -> Any:
    """A new `torch.Tensor` with the same values. Needs torch."""
    import torch

    array = np.array(array, order="C")
    if array.dtype.name in SHARED:
        bits = np.int16 if array.itemsize == 2 else np.uint8
        return torch.from_numpy(array.view(bits)).view(getattr(torch, array.dtype.name))
    return torch.from_numpy(array)
