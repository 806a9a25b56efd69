"""Count, mean and variance of a batch, and the exact merge of two."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bnjax.core.measuring import measure
from bnjax.core.moments import Moments, merge
from tests.support import oracle
from tests.support.cases import each_case
from tests.support.oracle import assert_close

MASKS = ((4, 1, 1), (4, 3, 1), (4, 1, 5), (4, 3, 5), (1, 1, 5), (1, 3, 1), (1, 3, 5))
HALF = ("bfloat16", "float16")


def assert_moments(moments: Moments, x, reduced=(0,), seen=True, *, within=1e-6) -> None:
    """The moments are those of x: the mean to a part of the standard deviation, m2 of itself."""
    mean, var = oracle.measure(x, reduced, seen)
    count = np.sum(np.broadcast_to(seen, np.shape(x)), reduced)
    spread = np.where(var > 0, var, 1)
    # Summed in float64: origin and offset hold more digits than their float32 sum.
    offset = (np.asarray(moments.origin, np.float64) - mean) + np.asarray(moments.offset)
    assert_close(jnp.broadcast_to(moments.count, var.shape), count)
    assert_close(offset / np.sqrt(spread), np.zeros(var.shape), atol=within)
    assert_close(moments.m2 / spread, var * count / spread, rtol=within)


def is_empty(moments: Moments) -> bool:
    return not any(np.any(leaf) for leaf in (moments.count, moments.mean, moments.m2))


@each_case
@pytest.mark.parametrize("mean", [0.5, -1e4])
def test_moments_are_those_of_float64(rng, case, mean):
    x = case.values(rng, mean)
    moments = measure(jnp.asarray(x), (case.axis % x.ndim,))
    assert_moments(moments, x, case.reduced)
    assert moments.count.shape == ()


@pytest.mark.parametrize("shape", MASKS, ids=str)
@pytest.mark.parametrize("mean", [0.5, 1e5])
def test_masked_values_do_not_move_the_moments(rng, shape, mean):
    x = (mean + rng.standard_normal((4, 3, 5))).astype(np.float32)
    mask = rng.random(shape) < 0.6
    mask[0] = True
    moments = measure(jnp.asarray(np.where(mask, x, np.nan)), (2,), jnp.asarray(mask))
    assert_moments(moments, x, (0, 1), mask)


def test_a_channel_without_a_visible_value_has_count_zero_and_no_moments(rng):
    mask = jnp.array([[True, False]])
    moments = measure(jnp.asarray(rng.standard_normal((6, 2))), (1,), mask)
    assert_close(moments.count, np.array([6, 0]))
    assert_close([moments.mean[1], moments.m2[1], moments.variance()[1]], [0.0, 0.0, 0.0])


@pytest.mark.parametrize("mask", [None, jnp.ones((0, 1), bool)], ids=["plain", "masked"])
def test_an_empty_batch_has_count_zero_and_no_moments(mask):
    moments = measure(jnp.ones((0, 3)), (1,), mask)
    assert is_empty(moments)


def test_a_tuple_of_feature_axes_gives_moments_of_their_shape(rng):
    x = rng.standard_normal((6, 3, 4, 2)).astype(np.float32)
    moments = measure(jnp.asarray(x), (1, 3))
    assert_moments(moments, x, (0, 2))


def test_moments_over_no_axis_are_those_of_single_values(rng):
    x = rng.standard_normal((3, 2)).astype(np.float32)
    assert_moments(measure(jnp.asarray(x), (0, 1)), x, ())


@pytest.mark.parametrize("dtype", [*HALF, "uint8", "int32"])
@pytest.mark.parametrize("masked", [False, True])
def test_narrow_values_have_the_moments_of_the_same_values_in_float32(rng, dtype, masked):
    x = jnp.asarray(100 + 20 * rng.standard_normal((64, 3))).astype(dtype)
    mask = jnp.asarray(rng.random((64, 1)) < 0.7) if masked else None
    narrow, wide = (measure(v, (1,), mask) for v in (x, x.astype(jnp.float32)))
    assert_close(narrow, wide)
    assert {leaf.dtype for leaf in jax.tree.leaves(narrow)} == {jnp.dtype("float32")}


@pytest.mark.usefixtures("x64")
def test_float64_values_have_float64_moments(rng):
    x = 5 + rng.standard_normal((64, 3))
    moments = measure(jnp.asarray(x), (1,))
    assert_moments(moments, x, within=1e-14)
    assert {leaf.dtype for leaf in jax.tree.leaves(moments)} == {jnp.dtype("float64")}


def test_complex_values_have_a_complex_mean_and_a_real_variance(rng):
    x = (rng.standard_normal((64, 3)) + 1j * rng.standard_normal((64, 3)) + 5j).astype("complex64")
    moments = measure(jnp.asarray(x), (1,))
    mean, var = oracle.measure(x, (0,))
    assert_close([moments.mean, moments.variance()], [mean, var], rtol=1e-6)
    assert moments.m2.dtype == jnp.float32


def test_the_correction_divides_by_less_and_never_by_zero():
    moments = measure(jnp.array([[1.0], [2.0], [6.0]]), (1,))
    assert_close([moments.variance(c)[0] for c in (0, 1)], [14 / 3, 7.0], rtol=1e-6)
    assert_close(measure(jnp.array([[4.0]]), (1,)).variance(1), np.zeros(1))


def test_moments_of_four_million_values_lose_no_digits(rng):
    x = (1e4 + rng.standard_normal((2**22, 1))).astype(np.float32)
    assert_moments(measure(jnp.asarray(x), (1,)), x, within=1e-5)


def test_derivatives_are_those_of_the_mean_and_the_variance(rng):
    x = 1e4 + rng.standard_normal((9, 2)).astype(np.float32)
    slope = jax.jacobian(lambda x: [measure(x, (1,)).mean[0], measure(x, (1,)).variance()[0]])
    d_mean, d_var = slope(jnp.asarray(x))
    off = np.stack([np.ones(9), np.zeros(9)], 1)
    deviation = x.astype(np.float64) - x.mean(0, dtype=np.float64)
    assert_close([d_mean, d_var], [off / 9, off * deviation * 2 / 9], rtol=1e-6)


@given(
    sizes=st.lists(st.integers(0, 20), min_size=2, max_size=4),
    mean=st.sampled_from([0.0, 3.0, 1e4, -1e5]),
    seed=st.integers(0, 2**32 - 1),
)
def test_merging_the_parts_gives_the_whole(sizes, mean, seed):
    x = np.random.default_rng(seed).standard_normal((sum(sizes), 3))
    x = (mean + x).astype(np.float32)
    parts = np.split(x, np.cumsum(sizes)[:-1])
    merged = functools.reduce(merge, (measure(jnp.asarray(part), (1,)) for part in parts))
    if len(x):
        assert_moments(merged, x)
    else:
        assert is_empty(merged)


@pytest.mark.parametrize("axis", [-1, 1])
def test_masked_parts_merge_to_the_masked_whole(rng, axis):
    x = rng.standard_normal((10, 3, 4)).astype(np.float32) + 1e3
    mask = rng.random((10, 3, 4)) < 0.5
    mask[:5, :, 0] = mask[:5, 0] = False  # empty on one side, in some channels
    parts = [
        measure(jnp.asarray(x[rows]), (axis % 3,), jnp.asarray(mask[rows]))
        for rows in (slice(0, 5), slice(5, 10))
    ]
    reduced = tuple(i for i in range(3) if i != axis % 3)
    assert_moments(merge(*parts), x, reduced, mask, within=2e-6)


@pytest.mark.parametrize("gap", [0.0, 3.0, 1e3, -2e5, 1e7])
def test_merging_cancels_no_digits_where_the_means_are_far_apart(rng, gap):
    a, b = rng.standard_normal((2, 50, 3)).astype(np.float32)
    a, b = a + np.float32(1e5), b + np.float32(1e5 + gap)
    merged = merge(measure(jnp.asarray(a), (1,)), measure(jnp.asarray(b), (1,)))
    assert_moments(merged, np.concatenate([a, b]))


@pytest.mark.parametrize("level", [0.0, 1e5, 1e30])
def test_an_empty_side_changes_nothing(rng, level):
    some = measure(jnp.asarray(level + rng.standard_normal((7, 3)), jnp.float32), (1,))
    none = measure(jnp.ones((0, 3)), (1,))
    assert_close([merge(some, none), merge(none, some)], [some, some])
    assert is_empty(merge(none, none))


def test_the_order_of_merging_does_not_matter(rng):
    parts = [rng.standard_normal((n, 3)) + 1e4 * m for n, m in ((3, 1), (40, 0), (1, 5), (9, -2))]
    x = np.concatenate(parts).astype(np.float32)
    a, b, c, d = (measure(jnp.asarray(part, jnp.float32), (1,)) for part in parts)
    for merged in (
        merge(merge(merge(a, b), c), d),
        merge(d, merge(c, merge(b, a))),
        merge(merge(d, a), merge(b, c)),
    ):
        assert_moments(merged, x)


def test_a_thousand_batches_merge_in_a_scan_without_drift(rng):
    x = (1e4 + rng.standard_normal((1000, 32, 2))).astype(np.float32)

    def step(total, batch):
        return merge(total, measure(batch, (1,))), None

    total, _ = jax.jit(lambda x: jax.lax.scan(step, measure(x[0], (1,)), x[1:]))(jnp.asarray(x))
    assert_moments(total, x.reshape(-1, 2), within=1e-5)
