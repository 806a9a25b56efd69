"""Linen and nnx layers with banks."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import bnjax
from tests.support import banks
from tests.support.banks import NAMES, NLC, by_plain, by_torch
from tests.support.oracle import assert_close

pytestmark = pytest.mark.quick_compile

BANK = banks.BANK - (banks.BANK == 3)  # of three: 0 and 2
DATA = {affine: banks.make(NLC, affine, BANK, 3) for affine in (True, False, "own", "both")}
X = DATA[True].x
INDICES: dict[str, Any] = {"mixed": BANK, "name": "dark", "number": 2, "traced": jnp.int32(2)}

each_affine = pytest.mark.parametrize("affine", DATA, ids=str)
each_index = pytest.mark.parametrize("index", INDICES)
KINDS = ("torch", "drop_in")
each_kind = pytest.mark.parametrize("kind", KINDS)
each_mode = pytest.mark.parametrize("mutable", [True, False], ids=["train", "evaluate"])


def settings(kind: str, affine: Any) -> dict[str, Any]:
    if kind == "torch":
        return {"affine": affine, "banks": NAMES}
    return {"use_scale": affine, "use_bias": affine, "banks": NAMES, "momentum": 0.9}


def expected(affine: Any, index: str, kind: str, mutable: bool) -> Any:
    data = DATA[affine]
    data = data if index == "mixed" else data._replace(bank=np.full(12, 2))
    if kind == "torch":
        return by_torch(data, mutable=mutable)
    return by_plain(data, mutable=mutable, correction=0)


@each_kind
@each_affine
@each_index
@each_mode
def test_a_linen_layer(kind, affine, index, mutable):
    data, told = DATA[affine], settings(kind, affine)
    layer: Any = (
        bnjax.BatchNorm1d(5, **told)
        if kind == "torch"
        else bnjax.linen.BatchNorm(not mutable, **told)
    )
    new = layer.init(jax.random.key(0), data.x)
    assert jax.tree.map(jnp.shape, new.get("params", {})) == jax.tree.map(np.shape, data.params)
    assert jax.tree.map(jnp.shape, new["batch_stats"]) == jax.tree.map(np.shape, data.batch_stats)
    variables = {"params": data.params, "batch_stats": data.batch_stats}
    y, updates = layer.apply(
        variables, data.x, bank=INDICES[index], mutable=["batch_stats"] if mutable else []
    )
    wanted = expected(affine, index, kind, mutable)
    assert_close(y, wanted.y, rtol=1e-5)
    assert_close(updates.get("batch_stats", data.batch_stats), wanted.batch_stats, rtol=1e-5)


@each_kind
@each_affine
@each_index
@each_mode
def test_an_nnx_layer(kind, affine, index, mutable):
    data, told = DATA[affine], settings(kind, affine)
    make: Any = bnjax.nnx.BatchNorm1d if kind == "torch" else bnjax.nnx.BatchNorm
    layer = make(5, **told, rngs=nnx.Rngs(0))
    for name, value in {**data.params, **data.batch_stats}.items():
        assert getattr(layer, name)[...].shape == value.shape
        getattr(layer, name)[...] = value
    layer.train() if mutable else layer.eval()
    y = layer(jnp.asarray(data.x), bank=INDICES[index])
    wanted = expected(affine, index, kind, mutable)
    assert_close(y, wanted.y, rtol=1e-5)
    stats = {name: getattr(layer, name)[...] for name in ("mean", "var")}
    assert_close(stats, wanted.batch_stats, rtol=1e-5)


@pytest.mark.parametrize(
    ("kind", "affine", "names"),
    [
        ({"use_scale": "own"}, True, {"scale": (3, 5), "bias": (5,)}),
        ({"use_scale": False, "use_bias": "both"}, True, {"bias": (5,), "bank_bias": (3, 5)}),
    ],
)
def test_scale_and_bias_of_the_drop_in_are_chosen_separately(kind, affine, names):
    layer = bnjax.linen.BatchNorm(False, banks=3, **kind)
    variables = layer.init(jax.random.key(0), X)
    assert jax.tree.map(jnp.shape, variables["params"]) == names
    y, _ = layer.apply(variables, X, bank=BANK, mutable=["batch_stats"])
    assert y.shape == X.shape


def test_banks_by_number_are_called_by_number():
    layer = bnjax.BatchNorm1d(5, banks=3)
    variables = layer.init(jax.random.key(0), X)
    for bank in (1, "1", jnp.int32(1), np.full(12, 1)):
        _, updates = layer.apply(variables, X, bank=bank, mutable=["batch_stats"])
        moved = np.asarray(updates["batch_stats"]["mean"]).any(1)
        assert moved.tolist() == [False, True, False]


def test_layers_under_vmap_and_scan_have_their_own_banks():
    def stacked(kind: str) -> Any:
        axes = {"variable_axes": {"params": 0, "batch_stats": 0}, "split_rngs": {"params": True}}
        layer = bnjax.BatchNorm1d
        if kind == "vmap":
            return nn.vmap(layer, in_axes=0, **axes)(5, banks=NAMES)

        class Step(nn.Module):
            @nn.compact
            def __call__(self, carry, x):
                return carry, bnjax.BatchNorm1d(5, banks=NAMES, name="bn")(x)

        return nn.scan(Step, **axes, length=2)()

    xs = jnp.stack([DATA[True].x, DATA[True].x * 2 + 1])
    for kind in ("vmap", "scan"):
        layer = stacked(kind)
        args = (xs,) if kind == "vmap" else (0.0, xs)
        with bnjax.bank(BANK):
            variables = layer.init(jax.random.key(0), *args)
            y, updates = layer.apply(variables, *args, mutable=["batch_stats"])
        y = y if kind == "vmap" else y[1]
        stats = updates["batch_stats"] if kind == "vmap" else updates["batch_stats"]["bn"]
        assert stats["mean"].shape == (2, 3, 5)
        _, new = bnjax.init(5, banks=3)
        for number in range(2):
            wanted = bnjax.batch_norm({}, new, xs[number], bank=BANK, mutable=True)
            assert_close(y[number], wanted[0], rtol=1e-5)
            moved = {name: value[number] for name, value in stats.items()}
            assert_close(moved, wanted[1], rtol=1e-5)
