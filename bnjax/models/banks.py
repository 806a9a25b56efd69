"""Which bank a model's layers use, said from outside: bank."""

import contextlib
from collections.abc import Iterator
from typing import Any

import chex

from bnjax.layers.conventions import current
from bnjax.models.contexts import Frame, Reentrant, holding


class bank(Reentrant):  # noqa: N801 - used as a function is
    """A context in which layers with `banks` use this one, in any linen or nnx model.

    A call of a layer that names a bank itself uses that one. Contexts nest, and the inner one wins.
    Each belongs to the thread and to the asyncio task that entered it. Functions under `jit` are
    compiled for each bank that is given by name.

    In the steps of bnjax, and in `recalibrate` and `diagnose`, give the bank of each example as an
    entry `"bank"` of the batch instead, int32 (N,).

    Args:
        which: the name or the number of a bank, or an int32 array of shape (N,), one for each
            example; arrays may be traced, in a context that is entered where they are.

    >>> import bnjax, jax, jax.numpy as jnp
    >>> layer = bnjax.BatchNorm1d(2, banks=("source", "target"))
    >>> x = jnp.array([[1.0, 2.0], [3.0, 4.0]])
    >>> variables = layer.init(jax.random.key(0), x)
    >>> with bank("target"):
    ...     y, updates = layer.apply(variables, x, mutable=["batch_stats"])
    >>> updates["batch_stats"]["mean"].round(2).tolist()
    [[0.0, 0.0], [0.20000000298023224, 0.30000001192092896]]
    """

    def __init__(self, which: int | str | chex.Array) -> None:
        self._which = which

    @contextlib.contextmanager
    def _entered(self) -> Iterator[None]:
        plain: Any = isinstance(self._which, int | str)
        frame = Frame(("bank", self._which) if plain else object())
        before = current.set(self._which)
        try:
            with holding(frame):
                yield
        finally:
            current.reset(before)
