"""Run several banks at once, and independent layers on the examples of each."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bnjax
from tests.support import oracle
from tests.support.cases import NCHW, NHWC, Case, outcome
from tests.support.oracle import Outcome

NAMES = ("clean", "noisy", "dark")  # of banks
BANK = np.array([2, 0, 0, 3, 3, 2, 0, 3, 0, 2, 2, 3], np.int32)  # of 4 banks; bank 1 is absent
BANKS = 4
CASES = (
    Case("NC", (12, 5), -1, bnjax.BatchNorm1d),
    Case("NLC", (12, 3, 5), -1, bnjax.BatchNorm1d),
    Case("NCL", (12, 5, 3), 1, bnjax.BatchNorm1d),
    NHWC._replace(shape=(12, 3, 2, 6)),
    NCHW._replace(shape=(12, 6, 3, 2)),
    Case("NDHWC", (12, 2, 3, 2, 4), -1, bnjax.BatchNorm3d),
    Case("NCDHW", (12, 4, 2, 3, 2), 1, bnjax.BatchNorm3d),
)
NC, NLC, *_ = CASES


class Data(NamedTuple):
    """The arguments of a step in which each example has its bank."""

    params: Any
    batch_stats: Any
    x: Any
    bank: Any
    cotangent: Any
    axis: int = -1
    mask: Any = None

    @property
    def arrays(self) -> tuple[Any, ...]:
        """The arrays of a step."""
        return self.params, self.batch_stats, self.x, self.bank, self.cotangent, self.mask

    def of_bank(self, number: int) -> "Data":
        """The examples of a bank, with its own statistics and affine map."""
        these = self.bank == number
        mask = self.mask
        if mask is not None and len(mask) > 1:
            mask = mask[these]
        return Data(
            {name: self._row(name, number) for name in ("scale", "bias") if name in self.params},
            {name: value[number] for name, value in self.batch_stats.items()},
            self.x[these],
            None,
            self.cotangent[these],
            self.axis,
            mask,
        )

    def _row(self, name: str, number: int) -> Any:
        value = self.params[name]
        value = value[number] if value.ndim == 2 else value
        own = self.params.get(f"bank_{name}")
        return value if own is None else value + own[number]


def make(
    case: Case = NLC,
    affine: Any = True,
    bank: Any = BANK,
    banks: int = BANKS,
    *,
    far: float = 0.0,
    dtype: Any = np.float32,
    seed: int = 0,
) -> Data:
    """Random data; `far` is the distance between banks."""
    rng = np.random.default_rng(seed)
    channels = case.channels

    def values(*shape: int) -> Any:
        return rng.standard_normal(shape).astype(dtype)

    params = {}
    if affine:
        rows = (banks,) if affine == "own" else ()
        params = {"scale": 1 + values(*rows, channels), "bias": values(*rows, channels)}
    if affine == "both":
        params |= {f"bank_{name}": values(banks, channels) for name in ("scale", "bias")}
    stats = {"mean": values(banks, channels), "var": np.abs(values(banks, channels)) + dtype(0.1)}
    where = np.reshape(np.asarray(bank), (-1, *[1] * (len(case.shape) - 1)))
    x = ((1 + where) * values(*case.shape) + 0.5 + far * where).astype(dtype)
    return Data(params, stats, x, bank, values(*case.shape), case.axis)


@functools.partial(jax.jit, static_argnames=("axis", "mutable", "correction", "momentum"))
def run(
    params: Any, batch_stats: Any, x: Any, bank: Any, cotangent: Any, mask: Any, **told: Any
) -> Outcome:
    """The outcome of `bnjax.batch_norm`, compiled."""

    def apply(params, x):
        return bnjax.batch_norm(params, batch_stats, x, bank=bank, mask=mask, **told)

    return outcome(apply, params, x, cotangent)


def run_each(data: Data, each: Callable[[Data], Outcome]) -> Outcome:
    """The outcome of all banks, each run separately, with gradients summed."""
    found = jax.tree.map(lambda a: np.array(a, np.float64), Outcome(data.x, data.batch_stats, 0, 0))
    y, dx = found.y, np.zeros(data.x.shape)
    grads = {name: np.zeros(value.shape) for name, value in data.params.items()}
    for number in range(len(data.batch_stats["mean"])):
        these = data.bank == number
        if not these.any():
            continue
        alone = each(data.of_bank(number))
        y[these], dx[these] = alone.y, alone.dx
        for name, value in alone.batch_stats.items():
            found.batch_stats[name][number] = value
        for name, value in alone.dparams.items():
            if data.params[name].ndim == 2:
                grads[name][number] += value
            else:
                grads[name] += value
            if f"bank_{name}" in grads:
                grads[f"bank_{name}"][number] += value
    return Outcome(y, found.batch_stats, dx, grads)


def by_numpy(data: Data, **told: Any) -> Outcome:
    """The outcome of textbook formulas on the examples of each bank, in float64."""

    def each(alone: Data) -> Outcome:
        arrays = alone.params, alone.batch_stats, alone.x, alone.cotangent
        told_all = {"mutable": True, "axis": data.axis, "mask": alone.mask} | told
        return oracle.batch_norm(*arrays, **told_all)

    return run_each(data, each)


def by_torch(data: Data, *, mutable: bool = True, momentum: float | None = 0.1) -> Outcome:
    """The outcome of independent PyTorch layers on the examples of each bank."""
    return run_each(data, functools.partial(_torch_layer, mutable=mutable, momentum=momentum))


def _torch_layer(data: Data, *, mutable: bool, momentum: float | None) -> Outcome:
    torch = pytest.importorskip("torch")

    kinds = torch.nn.BatchNorm1d, torch.nn.BatchNorm1d, torch.nn.BatchNorm2d, torch.nn.BatchNorm3d
    channels = len(data.batch_stats["mean"])
    layer = kinds[data.x.ndim - 2](channels, momentum=momentum, affine=bool(data.params))
    layer = layer.to(getattr(torch, str(data.x.dtype)))
    named = {"scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
    held = {**data.params, **data.batch_stats}
    state = {named[name]: torch.from_numpy(np.array(value)) for name, value in held.items()}
    layer.load_state_dict(state, strict=False)
    layer.train(mutable)
    x = torch.from_numpy(np.moveaxis(data.x, data.axis, 1).copy()).requires_grad_()
    y = layer(x)
    (y * torch.from_numpy(np.moveaxis(data.cotangent, data.axis, 1).copy())).sum().backward()

    def back(value: Any) -> Any:
        return np.moveaxis(value.detach().numpy(), 1, data.axis)

    moved = {name: getattr(layer, named[name]).numpy() for name in ("mean", "var")}
    grads = {name: getattr(layer, named[name]).grad.numpy() for name in data.params}
    return Outcome(back(y), moved, back(x.grad), grads)


def found(data: Data, **told: Any) -> Outcome:
    """The outcome of bnjax for all banks at once, on the host."""
    told = {"mutable": True, "axis": data.axis, "correction": 1, "momentum": 0.1} | told
    return jax.device_get(run(*data.arrays, **told))


def tree(value: Any) -> Any:
    """JAX arrays from NumPy arrays."""
    return jax.tree.map(jnp.asarray, value)


def by_plain(data: Data, **told: Any) -> Outcome:
    """The outcome of `bnjax.batch_norm` without banks on the examples of each."""

    def each(alone: Data) -> Outcome:
        params, stats, x, cotangent = map(tree, (*alone.arrays[:3], alone.cotangent))
        told_all = {"mutable": True, "axis": data.axis, "mask": alone.mask} | told

        def apply(params, x):
            return bnjax.batch_norm(params, stats, x, **told_all)

        return jax.device_get(outcome(apply, params, x, cotangent))

    return run_each(data, each)
