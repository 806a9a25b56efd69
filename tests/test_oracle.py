"""The oracle is right, and the comparison can fail."""

import re

import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.cases import NHWC
from tests.support.oracle import Outcome, assert_close, batch_norm

DIFFERENT = (
    pytest.param(np.ones(3), np.ones((3, 1)), "shape", id="shape"),
    pytest.param(np.ones(3), np.ones(1), "shape", id="broadcast"),
    pytest.param(np.array([1.0, np.nan]), np.ones(2), "nan", id="nan"),
    pytest.param(np.ones(2), np.array([1.0, np.nan]), "nan", id="missing nan"),
    pytest.param(np.array([np.inf]), np.array([-np.inf]), "inf", id="infinity"),
    pytest.param(np.ones(2), np.array([1.0, 1.0 + 1e-4]), "Not equal", id="value"),
    pytest.param({"mean": 1.0}, {"var": 1.0}, "PyTreeDef", id="key"),
    pytest.param({"a": {"b": 1.0}}, {"a": {"b": 2.0}}, r"['a']['b']", id="nested value"),
    pytest.param(np.array([1 + 1j]), np.array([1 - 1j]), "Not equal", id="imaginary part"),
)


@pytest.mark.parametrize(("actual", "expected", "text"), DIFFERENT)
def test_comparison_fails_on_a_difference(actual, expected, text):
    with pytest.raises(AssertionError, match=re.escape(text)):
        assert_close(actual, expected, atol=1e-6)


def test_comparison_looks_at_values_and_not_at_dtypes():
    assert_close(jnp.ones(2, jnp.bfloat16), np.ones(2))
    assert_close({"a": jnp.array([jnp.nan, 1])}, {"a": np.array([np.nan, 1.0])})


def test_relative_tolerance_is_that_of_the_largest_finite_entry():
    assert_close(np.array([1e-3, 1e3, np.inf]), np.array([0, 1e3, np.inf]), rtol=1e-5)
    with pytest.raises(AssertionError, match="Not equal"):
        assert_close(np.array([2e-2, 1e3, np.inf]), np.array([0, 1e3, np.inf]), rtol=1e-5)


def test_oracle_gives_the_numbers_of_a_hand_calculation():
    stats = {"mean": np.zeros(1), "var": np.ones(1)}
    x = np.array([[1.0], [2.0], [3.0], [100.0]])
    found = batch_norm(
        {"scale": np.array([2.0])},
        stats,
        x,
        np.ones_like(x),
        mutable=True,
        eps=0,
        mask=np.array([[True], [True], [True], [False]]),
    )
    root = np.sqrt(1.5)
    assert_close(found.y[:, 0], 2 * root * np.array([-1, 0, 1, 98]), rtol=1e-15)
    assert_close(found.batch_stats, {"mean": np.array([0.2]), "var": np.ones(1)}, rtol=1e-15)


@pytest.mark.parametrize("mutable", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_gradients_of_the_oracle_are_its_finite_differences(rng, mutable, masked):
    case = NHWC
    x, dy, tangent = (case.values(rng).astype(np.float64) for _ in range(3))
    params, stats = case.params(rng), case.batch_stats(rng)
    dparams = case.params(rng)
    mask = case.row_mask(3) if masked else None

    def run(step: float) -> Outcome:
        moved = {key: params[key] + np.float64(step) * dparams[key] for key in params}
        return batch_norm(moved, stats, x + step * tangent, dy, mutable=mutable, mask=mask)

    slope = np.sum(dy * (run(1e-5).y - run(-1e-5).y)) / 2e-5
    found = run(0.0)
    along = np.sum(found.dx * tangent) + sum(
        np.sum(found.dparams[key] * dparams[key]) for key in params
    )
    assert_close(along, slope, rtol=1e-8)
