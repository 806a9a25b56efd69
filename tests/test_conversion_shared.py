"""Arrays under several names, and parametrized weights."""

import contextlib
import re
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bnjax
from tests.support.state_dicts import F32, mismatch, params, refused

pytestmark = pytest.mark.quick_compile

# Tied weights


def tied() -> dict[str, np.ndarray]:
    weight = np.arange(6, dtype=F32).reshape(2, 3)
    return {"embed.weight": weight, "head.weight": weight, "head.bias": np.ones(2, F32)}


@pytest.mark.parametrize("name", ["embed", "head"])
def test_a_tied_weight_is_read_by_its_name_in_flax_and_written_under_all(name):
    state_dict = tied()
    leaf = "embedding" if name == "embed" else "kernel"
    arrays = {"embed": state_dict["embed.weight"], "head": state_dict["head.weight"].T}
    variables = params(**{name: {leaf: np.zeros_like(arrays[name])}})
    variables["params"].setdefault("head", {})["bias"] = np.zeros(2, F32)
    new = bnjax.from_torch(state_dict, None, variables)
    np.testing.assert_array_equal(new["params"][name][leaf], arrays[name])
    more = jax.tree.map(lambda a: a + 1, new)
    every: list[dict[str, Any]] = [
        {},
        {"ignore": f"{'head' if name == 'embed' else 'embed'}.weight"},
    ]
    for options in every:
        back = bnjax.to_torch(more, state_dict, **options, numpy=True)
        chex.assert_trees_all_equal(back, {k: v + 1 for k, v in state_dict.items()})


def test_equal_weights_are_reported_and_can_be_renamed_to_one_name():
    state_dict = {name: array.copy() for name, array in tied().items()}
    variables = params(
        embed={"embedding": state_dict["embed.weight"]}, head={"bias": np.ones(2, F32)}
    )
    assert refused(state_dict, variables) == [
        "only in PyTorch: head.weight (2, 3). It equals embed.weight: skip it with `ignore`, or "
        "`rename` both to one name"
    ]
    rename = {"head.weight": "embed/embedding"}
    new = bnjax.from_torch(state_dict, None, variables, rename=rename)
    more = jax.tree.map(lambda a: a + 1, new)
    back = bnjax.to_torch(more, state_dict, rename=rename, numpy=True)
    chex.assert_trees_all_equal(back, {k: v + 1 for k, v in state_dict.items()})
    state_dict["head.weight"] = state_dict["head.weight"] + 1
    line = "only in PyTorch: embed.weight (2, 3); nearest: params/embed/embedding"
    with pytest.raises(ValueError, match=mismatch(line)):
        bnjax.from_torch(state_dict, None, variables, rename=rename)


def test_a_warning_says_if_an_ignored_equal_array_keeps_its_old_values():
    state_dict = {name: array.copy() for name, array in tied().items()}
    variables = params(
        embed={"embedding": state_dict["embed.weight"]}, head={"bias": np.ones(2, F32)}
    )
    assert bnjax.to_torch(variables, state_dict, ignore="head.weight", numpy=True).keys()
    more = jax.tree.map(lambda a: a + 1, variables)
    message = (
        "`ignore` keeps the old values of head.weight, which equals embed.weight in `like`. If "
        "these are tied in PyTorch, `rename` both to one name instead, so that both are updated."
    )
    with pytest.warns(UserWarning, match=f"^{re.escape(message)}$"):
        back = bnjax.to_torch(more, state_dict, ignore="head.weight", numpy=True)
    np.testing.assert_array_equal(back["head.weight"], state_dict["head.weight"])


def test_a_module_registered_twice_is_written_under_both_names():
    torch = pytest.importorskip("torch")

    class Twice(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = torch.nn.Linear(1, 1, bias=False)
            self.b = torch.nn.Sequential(self.a, torch.nn.BatchNorm1d(1))

    theirs = Twice()
    variables = {"params": {"a": {"kernel": jnp.array([[7.0]])}}}
    state_dict = bnjax.to_torch(variables, theirs.state_dict(), ignore="b/1/*")
    theirs.load_state_dict(state_dict)
    assert theirs.a.weight.item() == 7.0


# Parametrized weights


REMOVE = (
    ": this parametrization computes the weight instead of saving it. Remove it before "
    "`state_dict()`: torch.nn.utils."
)
PARAMETRIZED = [
    ("weight_norm", "weight norm", "remove_weight_norm(module)"),
    ("spectral_norm", "spectral norm", "remove_spectral_norm(module)"),
    (
        "parametrizations.weight_norm",
        "weight norm",
        "parametrize.remove_parametrizations(module, 'weight')",
    ),
    (
        "parametrizations.spectral_norm",
        "spectral norm",
        "parametrize.remove_parametrizations(module, 'weight')",
    ),
    (
        "parametrizations.orthogonal",
        "parametrization",
        "parametrize.remove_parametrizations(module, 'weight')",
    ),
    ("prune.l1_unstructured", "pruning", "prune.remove(module, 'weight')"),
]


@pytest.mark.parametrize(("function", "kind", "repair"), PARAMETRIZED)
def test_parametrizations_are_named_with_the_call_that_removes_them(function, kind, repair):
    torch = pytest.importorskip("torch")
    pytest.importorskip("torch.nn.utils.prune")
    make: Any = torch.nn.utils
    for part in function.split("."):
        make = getattr(make, part)
    options = {"name": "weight", "amount": 1} if kind == "pruning" else {}
    theirs = torch.nn.Sequential(*(torch.nn.Linear(3, 3) for _ in range(5)))
    with pytest.warns() if function == "weight_norm" else contextlib.nullcontext():
        for layer in theirs:
            make(layer, **options)
    variables = params(**{f"layers_{n}": {"kernel": np.ones((3, 3), F32)} for n in range(5)})
    for n in range(5):
        variables["params"][f"layers_{n}"]["bias"] = np.ones(3, F32)
    message = mismatch(f"{kind} of 0.weight, 1.weight, 2.weight and 2 more{REMOVE}{repair}")
    with pytest.raises(ValueError, match=message):
        bnjax.from_torch(theirs.state_dict(), None, variables)
    remove: Any = eval(f"torch.nn.utils.{repair.partition('(')[0]}", {"torch": torch})
    for layer in theirs:
        remove(layer, *(["weight"] if "'weight'" in repair else []))
    bnjax.from_torch(theirs.state_dict(), None, variables)
