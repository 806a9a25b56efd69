"""Branches are found anywhere in a model, or the report says why not."""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import bnjax
from tests.support.folded import EVAL, assert_same, branches, divisions, outputs, prepare

pytestmark = pytest.mark.quick_compile


class Around(nn.Module):
    way: Callable[..., Any]

    @nn.compact
    def __call__(self, x: jax.Array) -> Any:
        x = nn.relu(EVAL(name="other_bn")(nn.Dense(3, name="other")(x)))
        return self.way(nn.Conv(3, (3, 3), name="a"), nn.Conv(3, (1, 1), name="b"), x)


def norm(name: str = "bn", **fields: Any) -> nn.Module:
    return EVAL(name=name, **fields)


MERGED: dict[str, Any] = {
    "without batch norms": Around(lambda a, b, x: nn.relu(a(x) + b(x))),
    "one batch norm after the sum": Around(lambda a, b, x: norm()(a(x) + b(x))),
    "batch norms within and after": Around(
        lambda a, b, x: norm()(norm("c")(a(x)) + b(x) + norm("d")(x)) + norm("e")(x)
    ),
    "another summand": Around(lambda a, b, x: a(x) + x.mean() + b(x)),
    "the input itself": Around(lambda a, b, x: norm()(b(x)) + x + norm("c")(a(x))),
    "used twice": Around(lambda a, b, x: nn.relu(a(x) + b(x)).mean() + (a(z := x + 1) + b(z))),
    "under remat": Around(
        lambda a, b, x: (
            nn.remat(lambda m, n, x: norm()(m(x)) + n(x))(a, b, x)
            if False
            else nn.remat(lambda m, x: m(x))(a, x) + b(x)
        )
    ),
    "cast between": Around(lambda a, b, x: a(x).astype(jnp.float32) + b(x)),
    "a batch norm before, too": Around(lambda a, b, x: a(y := norm()(x)) + b(y) + norm("c")(y)),
}


@pytest.mark.parametrize("name", MERGED)
def test_branches_are_found_anywhere(name):
    model, variables, x = prepare(MERGED[name])
    folded = assert_same(model, variables, x)
    assert branches(folded)["b", "a"] is None
    assert "b" not in folded.variables["params"]
    if name != "the input itself":
        assert divisions(folded.apply, folded.variables, x) == 0


def test_batch_norms_in_and_after_branches_leave_one_conv():
    model, variables, x = prepare(MERGED["batch norms within and after"])
    folded = bnjax.fold(model, variables, x)
    assert folded.variables["params"].keys() == {"other", "a"}
    assert branches(folded) == {("b", "a"): None, ("d", "a"): None, ("e", "a"): None}


def twice(*arguments: Any, **options: Any) -> jax.Array:
    return 2 * jax.lax.conv_general_dilated(*arguments, **options)


ELSEWHERE = "'{}' is also used elsewhere"
REFUSALS: dict[str, tuple[Any, dict[tuple[str, str], str]]] = {
    "another input": (Around(lambda a, b, x: a(x) + b(x * 2)), {}),
    "relu between": (Around(lambda a, b, x: a(x) + nn.relu(b(x))), {}),
    "a product": (Around(lambda a, b, x: a(x) * b(x)), {}),
    "a difference": (Around(lambda a, b, x: a(x) - b(x)), {}),
    "used again": (Around(lambda a, b, x: (a(x) + (y := b(x))) * y), {}),
    "broadcast": (Around(lambda a, b, x: a(x) + b(x).mean((1, 2), keepdims=True)), {}),
    "used elsewhere": (
        Around(lambda a, b, x: (a(x) + b(x)) * b(x + 1)),
        {("b", "a"): ELSEWHERE.format("b")},
    ),
    "twice the same": (Around(lambda a, b, x: a(x) + a(x) + 0 * b(x).mean()), {}),
    "other strides": (
        Around(lambda a, b, x: nn.Conv(3, (3, 3), 2, name="c")(y := x[:, :1, :1]) + a(y)),
        {("a", "c"): "its strides differ"},
    ),
    "beyond the kernel": (
        Around(lambda a, b, x: nn.Conv(3, (1, 5), name="c")(x) + a(x)),
        {("c", "a"): "its kernel reaches beyond the other's"},
    ),
    "shifted beyond": (
        Around(lambda a, b, x: a(x) + nn.Conv(3, (3, 3), padding=((2, 0), (1, 1)), name="c")(x)),
        {("c", "a"): "its kernel reaches beyond the other's"},
    ),
    "padded otherwise": (
        Around(lambda a, b, x: a(x) + nn.Conv(3, (3, 3), padding="CIRCULAR", name="c")(x)),
        {("c", "a"): "it pads with other values"},
    ),
    "groups that do not divide": (
        Around(
            lambda a, b, x: (
                nn.Conv(6, (3, 3), feature_group_count=2, name="c")(y := x.repeat(2, 3))
                + nn.Conv(6, (1, 1), feature_group_count=3, name="d")(y)
            )
        ),
        {("d", "c"): "its number of groups is not a multiple of the other's"},
    ),
    "half precision": (
        Around(lambda a, b, x: a(x) + nn.Conv(3, (1, 1), dtype=jnp.bfloat16, name="c")(x)),
        {("c", "a"): "it computes in another dtype or precision"},
    ),
    "a mask on the largest": (
        Around(lambda a, b, x: b(x) + nn.Conv(3, (3, 3), mask=np.ones((3, 3, 3, 3)), name="c")(x)),
        {("b", "c"): "the other has a kernel mask"},
    ),
    "a mask that is computed": (
        Around(lambda a, b, x: a(x) + nn.Conv(3, (1, 1), mask=jnp.ones((1, 1, 3, 3)), name="c")(x)),
        {("c", "a"): "one of them has a mask that is computed in the model"},
    ),
    "a function of its own": (
        Around(lambda a, b, x: a(x) + nn.Conv(3, (1, 1), conv_general_dilated=twice, name="c")(x)),
        {("c", "a"): "one of them computes with a custom function"},
    ),
    "conv and dense": (
        Around(lambda a, b, x: a(x) + nn.DenseGeneral(3, name="c")(x)),
        {("c", "a"): "a Conv and a DenseGeneral can't be merged"},
    ),
    "tied": (
        Around(lambda a, b, x: a(x) + b(x) + b.variables["params"]["kernel"].sum()),
        {("b", "a"): "the kernel of 'b' is used outside it"},
    ),
    "a batch norm over another axis": (
        Around(lambda a, b, x: a(x) + norm(axis=1)(x)),
        {("bn", "a"): "its channels are not the last axis"},
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_merge_that_would_be_wrong_is_refused_with_a_reason(name):
    model, reasons = REFUSALS[name]
    model, variables, x = prepare(model)
    folded = bnjax.fold(model, variables, x)
    expected, actual = outputs(model, variables, folded, x)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-5 * np.abs(expected).max())
    assert branches(folded) == reasons
    stay = variables["params"].keys() - {"other_bn"}
    assert folded.variables["params"].keys() == stay


def test_the_report_names_branches():
    model, variables, x = prepare(REFUSALS["beyond the kernel"][0])
    text = re.sub(r"[ │┃\n]+", " ", str(bnjax.fold(model, variables, x).report))
    assert "c - not merged into a: its kernel reaches beyond the other's" in text
