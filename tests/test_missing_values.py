"""Values that are not finite, not seen or not there: they move no statistics, spoil no gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bnjax
from tests.support.cases import NC, NCHW, NHWC, Outcome, each_case, run
from tests.support.oracle import assert_close

pytestmark = pytest.mark.quick_compile

BAD = (np.nan, np.inf, -np.inf)


def train(stats, x, **settings):
    return bnjax.batch_norm({}, stats, x, mutable=True, **settings)


@each_case
def test_a_channel_that_is_not_finite_keeps_its_statistics_and_shows_it(rng, case):
    x, stats = case.values(rng), case.batch_stats(rng)
    good_y, good = train(stats, x, axis=case.axis)
    spoilt = np.moveaxis(x.copy(), case.axis, -1)
    spoilt[..., -1].flat[1] = rng.choice(BAD)
    y, moved = train(stats, np.moveaxis(spoilt, -1, case.axis), axis=case.axis)
    y, good_y = (np.moveaxis(np.asarray(v), case.axis, -1) for v in (y, good_y))
    assert np.isnan(y[..., -1]).any()
    assert_close(y[..., :-1], good_y[..., :-1])
    for key in stats:
        assert_close(moved[key][-1], stats[key][-1])
        assert_close(moved[key][:-1], good[key][:-1])


@pytest.mark.parametrize("bad", BAD)
def test_a_batch_that_is_all_bad_leaves_every_statistic_and_later_ones_move_again(rng, bad):
    x, stats = NHWC.values(rng), NHWC.batch_stats(rng)
    _, same = train(stats, np.full_like(x, bad))
    assert_close(same, stats)
    assert_close(train(same, x)[1], train(stats, x)[1])


def test_an_overflow_of_half_precision_leaves_the_statistics(rng):
    x = jnp.asarray(NHWC.values(rng), jnp.float16) * jnp.float16(60000)
    stats = NHWC.batch_stats(rng)
    assert jnp.isinf(x).any((0, 1, 2)).all()
    assert_close(train(stats, x)[1], stats)


def test_values_whose_variance_overflows_leave_the_statistics(rng):
    stats = NHWC.batch_stats(rng)
    y, moved = train(stats, NHWC.values(rng) * np.float32(1e30))
    assert_close(moved, stats)
    assert not np.isfinite(y).any()


@pytest.mark.parametrize("bad", BAD)
def test_the_cumulative_average_does_not_count_a_bad_batch(rng, bad):
    x, stats = NHWC.values(rng), bnjax.init(6, momentum=None)[1]
    _, same = train(stats, np.full_like(x, bad), momentum=None)
    _, unseen = train(stats, x, momentum=None, mask=np.zeros((1, 1, 1, 1), bool))
    assert_close([same, unseen], [stats, stats])
    assert train(same, x, momentum=None)[1]["count"] == 1


@pytest.mark.parametrize("shape", [(0, 3), (0, 4, 3), (2, 0, 3), (0, 4, 4, 3), (2, 4, 0, 3)])
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("mutable", [True, False], ids=["train", "eval"])
def test_an_empty_batch_leaves_the_statistics(rng, shape, masked, mutable):
    case = NHWC._replace(shape=shape)
    stats, params, x = case.batch_stats(rng), case.params(rng), np.ones(shape, np.float32)
    mask = np.ones((1,) * x.ndim, bool) if masked else None
    found = run(params, stats, x, x, mutable=mutable, mask=mask)
    zeros = {"scale": np.zeros(3), "bias": np.zeros(3)}
    assert_close(found, Outcome(x, stats, x, zeros))


@pytest.mark.parametrize("mutable", [True, False], ids=["train", "eval"])
def test_a_batch_without_channels_is_returned_as_it_is(mutable):
    y, moved = bnjax.batch_norm(*bnjax.init(0), jnp.ones((3, 0)), mutable=mutable)
    assert_close((y, moved), (np.ones((3, 0)), bnjax.init(0)[1]))


@pytest.mark.parametrize("fill", [0.0, *BAD])
def test_an_all_false_mask_normalizes_with_mean_zero_and_variance_one(rng, fill):
    x, dy = NHWC.values(rng), NHWC.values(rng)
    x[0] = fill
    params, stats = NHWC.params(rng), NHWC.batch_stats(rng)
    found = run(params, stats, x, dy, mutable=True, mask=np.zeros((4, 1, 1, 1), bool))
    shrunk = np.where(np.isfinite(x), x, 0) / np.sqrt(1 + 1e-5)
    assert_close(found.batch_stats, stats)
    assert_close(found.y, shrunk * params["scale"] + params["bias"], rtol=1e-6)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))


def test_a_channel_that_is_all_masked_keeps_its_statistics_alone(rng):
    x, stats = NCHW.values(rng), NCHW.batch_stats(rng)
    hidden = np.arange(6) == 2
    _, moved = train(stats, x, axis=1, mask=~hidden[:, None, None])
    _, plain = train(stats, x, axis=1)
    for key in stats:
        assert_close(moved[key], np.where(hidden, stats[key], plain[key]), rtol=1e-6)


def test_a_single_visible_value_gives_the_bias_and_leaves_unbiased_statistics(rng):
    x, stats, bias = NC.values(rng), NC.batch_stats(rng), jnp.arange(5.0)
    mask = NC.row_mask(1)
    y, moved = bnjax.batch_norm({"bias": bias}, stats, x, mutable=True, mask=mask)
    assert_close(y[0], bias)
    assert_close(moved, stats)
    _, biased = train(stats, x, mask=mask, correction=0)
    assert_close(biased["var"], 0.9 * stats["var"], rtol=1e-6)


MASKS = (
    pytest.param(np.arange(4).reshape(4, 1, 1, 1) < 2, id="rows"),
    pytest.param(np.arange(5).reshape(1, 1, 5, 1) < 3, id="columns"),
    pytest.param(np.arange(360).reshape(4, 3, 5, 6) % 7 < 4, id="by channel"),
)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("mutable", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("fill", [*BAD, 3e38])
def test_what_stands_under_a_mask_reaches_nothing_that_is_seen(rng, mask, mutable, fill):
    x, params, stats = NHWC.values(rng), NHWC.params(rng), NHWC.batch_stats(rng)
    dy = np.where(mask, NHWC.values(rng), np.float32(0))

    def seen(filling):
        filled = np.where(mask, x, np.float32(filling))
        found = run(params, stats, filled, dy, mutable=mutable, mask=mask)
        return found._replace(y=np.where(mask, found.y, 0))

    found = seen(fill)
    assert_close(found, seen(0.0))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("mutable", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("fill", BAD)
def test_outputs_and_gradients_are_finite_where_nan_is_masked_and_its_output_is_used(
    rng, mask, mutable, fill
):
    x = np.where(mask, NHWC.values(rng), np.float32(fill))
    params, stats, dy = NHWC.params(rng), NHWC.batch_stats(rng), NHWC.values(rng)
    found = run(params, stats, x, dy, mutable=mutable, mask=mask)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("mutable", [True, False], ids=["train", "eval"])
def test_nan_under_a_mask_stays_there_in_half_precision(rng, dtype, mutable):
    mask = NHWC.row_mask(2)
    x = jnp.asarray(np.where(mask, NHWC.values(rng), np.nan), dtype)
    params, stats = NHWC.params(rng), NHWC.batch_stats(rng)
    found = run(params, stats, x, NHWC.values(rng), mutable=mutable, mask=mask)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))


def test_nan_under_a_mask_does_not_reach_second_derivatives(rng):
    mask = NHWC.row_mask(2)
    tangent = NHWC.values(rng)

    def hvp(filling):
        x = np.where(mask, NHWC.values(np.random.default_rng(1)), np.float32(filling))

        def loss(x):
            y, _ = bnjax.batch_norm({}, {}, x, mutable=True, mask=mask)
            return jnp.sum(jnp.where(mask, y, 0) ** 3)

        return jax.jvp(jax.grad(loss), (jnp.asarray(x),), (jnp.asarray(tangent),))[1]

    assert_close(np.where(mask, hvp(np.nan), 0), np.where(mask, hvp(0.0), 0))
    assert np.isfinite(hvp(np.nan)).all()
