"""The input shapes that all tests share, and functions that run batch norm on them."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bnjax
from bnjax.core import compat
from tests.support.oracle import Outcome


@contextlib.contextmanager
def as_on_accelerators(platform: str = "default") -> Iterator[None]:
    """A context in which programs are traced as for another platform than the CPU."""
    find = compat.implementation

    def there(name: str, functions: dict[str, Callable[..., Any]], here: str) -> Any:
        return find(name, functions, platform if name == "centred" else here)

    jax.clear_caches()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compat, "implementation", there)
        yield
    jax.clear_caches()


class Case(NamedTuple):
    """An input layout, and a layer for it."""

    name: str
    shape: tuple[int, ...]
    axis: int
    layer: Callable[..., Any]

    @property
    def channels(self) -> int:
        return self.shape[self.axis]

    @property
    def reduced(self) -> tuple[int, ...]:
        return tuple(i for i in range(len(self.shape)) if i != self.axis % len(self.shape))

    def values(self, rng: np.random.Generator, mean: float = 0.5, std: float = 1.5) -> Any:
        return (mean + std * rng.standard_normal(self.shape)).astype(np.float32)

    def params(self, rng: np.random.Generator) -> dict[str, Any]:
        scale, bias = rng.standard_normal((2, self.channels)).astype(np.float32)
        return {"scale": scale, "bias": bias}

    def batch_stats(self, rng: np.random.Generator) -> dict[str, Any]:
        mean, var = rng.standard_normal((2, self.channels)).astype(np.float32)
        return {"mean": mean, "var": np.abs(var) + np.float32(0.1)}

    def row_mask(self, rows: int) -> Any:
        """A mask of the first rows of the batch."""
        return (np.arange(self.shape[0]) < rows).reshape((-1,) + (1,) * (len(self.shape) - 1))


NC = Case("NC", (8, 5), -1, bnjax.BatchNorm1d)
NHWC = Case("NHWC", (4, 3, 5, 6), -1, bnjax.BatchNorm2d)
NCHW = Case("NCHW", (4, 6, 3, 5), 1, bnjax.BatchNorm2d)
CASES = (
    NC,
    Case("NC_two_rows", (2, 3), -1, bnjax.BatchNorm1d),
    Case("NC_primes", (101, 13), 1, bnjax.BatchNorm1d),
    Case("NLC", (4, 6, 5), -1, bnjax.BatchNorm1d),
    Case("NCL", (4, 5, 6), 1, bnjax.BatchNorm1d),
    Case("NLC_batch_of_one", (1, 7, 3), -1, bnjax.BatchNorm1d),
    Case("NCL_length_one", (6, 3, 1), 1, bnjax.BatchNorm1d),
    NHWC,
    NCHW,
    Case("NCHW_one_row_of_one_image", (1, 3, 1, 9), 1, bnjax.BatchNorm2d),
    Case("NDHWC", (2, 3, 4, 2, 5), -1, bnjax.BatchNorm3d),
    Case("NCDHW", (2, 5, 3, 4, 2), 1, bnjax.BatchNorm3d),
    Case("NDHWC_one_channel", (3, 1, 2, 1, 1), -1, bnjax.BatchNorm3d),
)

VARIANTS = ("with_jit", "without_jit", "with_device", "without_device", "with_pmap")

each_variant = pytest.mark.parametrize("variant", VARIANTS, indirect=True)
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


Apply = Callable[[Any, Any], tuple[jax.Array, Any]]
SETTINGS = ("mutable", "axis", "eps", "momentum", "correction", "dtype")


def outcome(apply: Apply, params: Any, x: Any, cotangent: Any) -> Outcome:
    """The outcome of `apply(params, x) -> (y, batch_stats)`."""

    def loss(params, x):
        y, batch_stats = apply(params, x)
        return jnp.sum(y * cotangent), (y, batch_stats)

    (dparams, dx), (y, batch_stats) = jax.grad(loss, (0, 1), has_aux=True)(params, x)
    return Outcome(y, batch_stats, dx, dparams)


@functools.partial(jax.jit, static_argnames=SETTINGS)
def run(params: Any, batch_stats: Any, x: Any, cotangent: Any, **settings: Any) -> Outcome:
    """The outcome of `bnjax.batch_norm`, compiled."""

    def apply(params, x):
        return bnjax.batch_norm(params, batch_stats, x, **settings)

    return outcome(apply, params, x, cotangent)


@functools.partial(jax.jit, static_argnames=("layer", "mutable"))
def run_layer(layer: Any, variables: Any, x: Any, cotangent: Any, *, mutable: bool) -> Outcome:
    """The outcome of a linen layer, compiled."""
    held = variables.get("batch_stats", {})

    def apply(params, x):
        y, updates = layer.apply(
            {"params": params, "batch_stats": held}, x, mutable=["batch_stats"] * mutable
        )
        return y, updates.get("batch_stats", held)

    return outcome(apply, variables.get("params", {}), x, cotangent)
