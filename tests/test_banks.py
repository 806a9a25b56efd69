"""Banks give the same as independent layers, each on its own examples."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import bnjax
from tests.support import banks
from tests.support.banks import BANK, BANKS, NC, NLC, by_numpy, by_torch, found, make
from tests.support.oracle import assert_close

pytestmark = pytest.mark.quick_compile

each_case = pytest.mark.parametrize("case", banks.CASES, ids=lambda case: case.name)
each_affine = pytest.mark.parametrize("affine", [True, False, "own", "both"], ids=str)


@each_case
@each_affine
@pytest.mark.parametrize("mutable", [True, False], ids=["train", "evaluate"])
def test_a_mixed_batch_equals_independent_torch_layers(case, affine, mutable):
    data = make(case, affine)
    assert not (data.bank == 1).any()
    assert_close(found(data, mutable=mutable), by_torch(data, mutable=mutable), rtol=1e-5)


@each_case
@each_affine
def test_in_float64_all_digits_are_equal(x64, case, affine):
    data = make(case, affine, dtype=np.float64)
    assert_close(found(data), by_torch(data), rtol=1e-12)


@pytest.mark.parametrize("axis", [0, 1, 2, -1, (1, 3)])
@pytest.mark.parametrize("affine", [True, "own"], ids=str)
def test_any_axis_may_be_the_channels(axis, affine):
    rng = np.random.default_rng(0)
    shape = (3, 4, 5, 6)
    features = tuple(np.array(shape)[np.atleast_1d(axis)])
    examples = shape[0] if axis != 0 else shape[1]
    bank = rng.integers(0, 3, examples).astype(np.int32)
    rows = (3,) if affine == "own" else ()
    scale, bias = rng.normal(size=(2, *rows, *features)).astype("f")
    stats = {"mean": np.zeros((3, *features), "f"), "var": np.ones((3, *features), "f")}
    x = rng.normal(size=shape).astype("f")
    params = {"scale": scale, "bias": bias}
    y, moved = bnjax.batch_norm(params, stats, x, mutable=True, axis=axis, bank=bank)
    for number in {*bank.tolist()}:
        alone = np.compress(bank == number, x, axis=int(axis == 0))
        old = {name: value[number] for name, value in stats.items()}
        own = {name: value[number] if rows else value for name, value in params.items()}
        wanted, new = bnjax.batch_norm(own, old, alone, mutable=True, axis=axis)
        assert_close(np.compress(bank == number, y, axis=int(axis == 0)), wanted, rtol=1e-5)
        assert_close({name: value[number] for name, value in moved.items()}, new, rtol=1e-5)


@given(
    bank=st.lists(st.integers(0, 5), min_size=1, max_size=12),
    case=st.sampled_from(banks.CASES),
    seed=st.integers(0, 100),
)
def test_any_division_into_banks_equals_independent_layers(bank, case, seed):
    case = case._replace(shape=(len(bank), *case.shape[1:]))
    if np.prod([case.shape[axis] for axis in case.reduced]) == 1:
        return  # PyTorch's rule for whole batches
    data = make(case, "both", np.array(bank, np.int32), 6, seed=seed)
    alone = {n for n in bank if bank.count(n) == 1} if case.name == "NC" else set()
    kept = jnp.array([n in alone for n in bank])
    outcome = found(data)
    if not alone:
        assert_close(outcome, by_torch(data), rtol=2e-5)
    else:
        held = data._replace(bank=np.where(kept, 9, data.bank))  # no layer's
        wanted = by_torch(held)
        assert_close(outcome.y[~kept], wanted.y[~kept], rtol=2e-5)
        assert_close(outcome.batch_stats, wanted.batch_stats, rtol=2e-5)


@pytest.mark.parametrize("banks", [1, 2, 16, 17, 40])
@pytest.mark.parametrize("case", [NC, NLC], ids=lambda case: case.name)
def test_few_banks_and_many(banks, case):
    case = case._replace(shape=(160, *case.shape[1:]))
    bank = (np.arange(160) * 7 % banks).astype(np.int32)
    data = make(case, "own", bank, banks)
    assert_close(found(data), by_torch(data), rtol=1e-5)


def test_a_bank_with_one_example_outputs_the_bias_and_keeps_its_statistics():
    bank = np.array([0, 1, 0, 0], np.int32)
    data = make(NC._replace(shape=(4, 5)), "own", bank, 2)
    outcome = found(data)
    assert_close(outcome.y[1], data.params["bias"][1], atol=1e-6)
    for name, value in outcome.batch_stats.items():
        np.testing.assert_array_equal(value[1], data.batch_stats[name][1])
        assert (value[0] != data.batch_stats[name][0]).all()
    np.testing.assert_array_equal(outcome.dx[1], 0)
    assert_close(outcome.dparams["bias"][1], data.cotangent[1], atol=1e-6)
    np.testing.assert_array_equal(outcome.dparams["scale"][1], 0)
    # With Flax's correction it is a batch: its variance is 0.
    moved = found(data, correction=0).batch_stats
    assert_close(moved["mean"][1], 0.9 * data.batch_stats["mean"][1] + 0.1 * data.x[1], rtol=1e-6)
    assert_close(moved["var"][1], 0.9 * data.batch_stats["var"][1], rtol=1e-6)


def test_each_bank_has_its_own_count_in_the_unbiased_variance():
    bank = np.array([0] * 9 + [1, 1, 1], np.int32)
    data = make(NC, True, bank, 2)
    moved = found(data, momentum=1.0).batch_stats
    wanted = np.stack([data.x[:9].var(0, ddof=1), data.x[9:].var(0, ddof=1)])
    assert_close(moved["var"], wanted, rtol=1e-5)


def test_absent_banks_keep_their_statistics_to_the_last_bit():
    data = make()
    moved = found(data).batch_stats
    for name, value in moved.items():
        np.testing.assert_array_equal(value[1], data.batch_stats[name][1])


@pytest.mark.parametrize("banks_apart", [1e3, 1e5])
@pytest.mark.parametrize("case", [NC, NLC], ids=lambda case: case.name)
def test_banks_far_apart_and_far_from_zero_lose_no_digits(case, banks_apart):
    data = make(case._replace(shape=(48, *case.shape[1:])), True, np.tile(BANK, 4), far=banks_apart)
    assert_close(found(data), by_numpy(data), rtol=3e-6)


@pytest.mark.parametrize("case", [NC, NLC], ids=lambda case: case.name)
@pytest.mark.parametrize("wild", [np.nan, np.inf, -np.inf, 1e38])
def test_values_that_are_not_finite_stay_in_their_bank(case, wild):
    data = make(case, "own")
    x = data.x.copy()
    x[5, ..., 2] = wild
    assert data.bank[5] == 2
    others = data.bank != 2
    rows = np.arange(BANKS) != 2
    clean, hit = found(data), found(data._replace(x=x))
    assert_close((hit.y[others], hit.dx[others]), (clean.y[others], clean.dx[others]), rtol=1e-6)
    for a, b in ((hit.batch_stats, clean.batch_stats), (hit.dparams, clean.dparams)):
        of_others = jax.tree.map(lambda v: v[rows], (a, b))
        assert_close(*of_others, rtol=1e-6)
    if not np.isfinite(wild):
        assert np.isnan(hit.y[~others][..., 2]).any()
        kept = {name: value[2, 2] for name, value in hit.batch_stats.items()}
        assert kept == {name: value[2, 2] for name, value in data.batch_stats.items()}
        calm = np.arange(5) != 2
        assert_close(hit.y[..., calm], clean.y[..., calm], rtol=1e-6)


@pytest.mark.parametrize("number", [0, 2])
@pytest.mark.parametrize("kind", [int, np.int64, np.asarray, jnp.uint8], ids=lambda k: k.__name__)
@each_affine
def test_one_bank_for_all_examples_equals_a_batch_norm(number, kind, affine):
    data, bank = make(NLC, affine), kind(number)
    alone = data._replace(bank=np.full(12, number))
    y, moved = bnjax.batch_norm(data.params, data.batch_stats, data.x, bank=bank, mutable=True)
    wanted = by_torch(alone)
    assert_close((y, moved), (wanted.y, wanted.batch_stats), rtol=1e-5)
    traced = found(data._replace(bank=jnp.asarray(bank)))
    assert_close(traced, wanted, rtol=1e-5)


def test_a_static_bank_is_bit_for_bit_the_plain_function():
    data = make()
    own = {name: value[2] for name, value in data.batch_stats.items()}

    def step(stats, bank):
        return jax.jit(
            lambda params, x: bnjax.batch_norm(params, stats, x, mutable=True, bank=bank)
        )(data.params, data.x)

    y, moved = step(data.batch_stats, 2)
    wanted, new = step(own, None)
    np.testing.assert_array_equal(y, wanted)
    for name, value in moved.items():
        np.testing.assert_array_equal(value[2], new[name])
        others = (np.delete(each, 2, 0) for each in (value, data.batch_stats[name]))
        np.testing.assert_array_equal(*others)


@pytest.mark.parametrize("shape", [(256, 64), (64, 2, 2, 16), (16, 8, 8, 16)])
def test_only_x_is_kept_for_the_backward_pass(shape):
    """The statistics of each example may be as large as x."""
    params, stats = bnjax.init(shape[-1], banks=2)
    bank, x = jnp.arange(shape[0]) % 2, jnp.ones(shape)

    @jax.jit
    def pull(x: jax.Array) -> Any:
        def step(params: Any, x: jax.Array) -> Any:
            return bnjax.batch_norm(params, stats, x, bank=bank, mutable=True)

        return jax.vjp(step, params, x, has_aux=True)[1]

    kept = sum(leaf.size for leaf in jax.tree.leaves(pull(x)))
    assert kept < x.size + 20 * shape[-1] + 2 * shape[0]
