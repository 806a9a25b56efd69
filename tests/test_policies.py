"""Each policy against its formula in float64, in every kind of call."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bnjax
from bnjax.core.moments import Moments, merge
from bnjax.policies import Batch, Blend, Example, Renorm, Running
from tests.support import oracle
from tests.support.cases import CASES, NC, NCHW, NHWC, Case, outcome
from tests.support.oracle import Outcome, assert_close
from tests.support.policies import ROWS, blend, normalized, renorm, running

pytestmark = pytest.mark.quick_compile

LAYOUTS = [case for case in CASES if case.name in ("NC", "NLC_batch_of_one", "NCHW", "NDHWC")]

each_case = pytest.mark.parametrize("case", LAYOUTS, ids=lambda case: case.name)
each_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
each_mode = pytest.mark.parametrize("mutable", [True, False], ids=["train", "eval"])


def arrays(case: Case, seed: int = 0) -> tuple[Any, Any, Any, Any]:
    """Parameters, running statistics near those of the batch, x and a cotangent."""
    rng = np.random.default_rng(seed)
    params, stats = case.params(rng), case.batch_stats(rng)
    return params, stats, case.values(rng), case.values(rng)


@functools.partial(jax.jit, static_argnames=("mutable", "axis", "virtual_batch_size", "correction"))
def run(params: Any, stats: Any, x: Any, cotangent: Any, **settings: Any) -> Outcome:
    def apply(params, x):
        return bnjax.batch_norm(params, stats, x, **settings)

    return outcome(apply, params, x, cotangent)


def moved(case: Case, stats: Any, x: Any, mask: Any = None, **settings: Any) -> Any:
    """The statistics after a batch, which do not depend on the policy."""
    wanted = oracle.batch_norm({}, stats, x, x, mutable=True, axis=case.axis, mask=mask, **settings)
    return wanted.batch_stats


def assert_is(found: Outcome, wanted: Outcome, rtol: float = 3e-6, **statistics: Any) -> None:
    assert_close(found._replace(batch_stats={}), wanted._replace(batch_stats={}), rtol=rtol)
    assert_close(found.batch_stats, statistics or wanted.batch_stats, rtol=1e-6)


@each_row
@each_mode
@each_case
def test_output_gradients_and_statistics_match_the_formula(case, row, mutable):
    held = arrays(case)
    found = run(*held, mutable=mutable, axis=case.axis, using=row.policy, correction=0)
    choice, size = (row.train if mutable else row.evaluate), 1 if row.per_example else None
    wanted = normalized(*held, choice, axis=case.axis, size=size)
    after = moved(case, held[1], held[2], correction=0) if mutable else held[1]
    assert_is(found, wanted, 5e-6, **after)


def positions(case: Case) -> np.ndarray:
    sizes = [1 if a == case.axis % len(case.shape) else n for a, n in enumerate(case.shape)]
    return np.random.default_rng(3).random(sizes) < 0.7


MASKS = {
    "rows": lambda case: case.row_mask(3),
    "positions": positions,
    "channels": lambda case: np.random.default_rng(4).random(case.shape) < 0.7,
}


@each_row
@each_mode
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("case", [NC, NCHW], ids=lambda case: case.name)
def test_masked_values_do_not_affect_normalization(case, mask, row, mutable):
    held, mask = arrays(case), mask(case)
    settings = {"mutable": mutable, "axis": case.axis, "using": row.policy, "correction": 0}
    found = run(*held, mask=mask, **settings)
    choice, size = (row.train if mutable else row.evaluate), 1 if row.per_example else None
    wanted = normalized(*held, choice, axis=case.axis, mask=mask, size=size)
    after = moved(case, held[1], held[2], mask, correction=0) if mutable else held[1]
    assert_is(found, wanted, 2e-5, **after)
    # Masked values affect neither other outputs nor any gradient.
    wild = np.where(mask, held[2], np.float32(np.nan))
    quiet = np.where(mask, held[3], np.float32(0))
    of_nan, of_numbers = (run(*held[:2], x, quiet, mask=mask, **settings) for x in (wild, held[2]))
    for each in ("dx", "dparams", "batch_stats"):
        assert_close(getattr(of_nan, each), getattr(of_numbers, each), rtol=1e-6)
    assert_close(np.where(mask, of_nan.y, 0), np.where(mask, of_numbers.y, 0), rtol=1e-6)


@each_row
@pytest.mark.parametrize("size", [1, 3, 4, 8, 100])
def test_each_virtual_batch_chooses_separately_with_shared_running_statistics(row, size):
    case = Case("NLC", (8, 6, 5), -1, bnjax.BatchNorm1d)
    held = arrays(case)
    settings = {"mutable": True, "using": row.policy, "correction": 0}
    found = run(*held, virtual_batch_size=size, **settings)
    wanted = normalized(*held, row.train, size=1 if row.per_example else size)
    assert_is(found._replace(batch_stats={}), wanted._replace(batch_stats={}), 1e-5)
    plain = run(*held, virtual_batch_size=size, mutable=True, correction=0)
    assert_close(found.batch_stats, plain.batch_stats)


@each_row
def test_virtual_batches_with_few_counted_examples(row):
    held, mask = arrays(NC), np.ones(NC.shape, bool)
    mask[:3] = mask[4, 1] = mask[5, 3:] = False  # the first group is empty
    settings = {"mutable": True, "using": row.policy, "correction": 0, "virtual_batch_size": 3}
    found = run(*held, mask=mask, **settings)
    wanted = normalized(*held, row.train, mask=mask, size=1 if row.per_example else 3)
    last = np.arange(8) >= 3  # the output of the empty group only has to be finite
    y, dx = (np.where(last[:, None], getattr(found, name), 0) for name in ("y", "dx"))
    wanted_y, wanted_dx = (np.where(last[:, None], part, 0) for part in (wanted.y, wanted.dx))
    assert_close((y, dx), (wanted_y, wanted_dx), rtol=5e-5)
    assert np.isfinite(found.y).all()


@each_row
@each_mode
def test_a_fully_masked_batch_has_finite_outputs_and_updates_nothing(row, mutable):
    held = arrays(NC)
    settings = {"mutable": mutable, "using": row.policy}
    found = run(*held, mask=np.zeros((8, 1), bool), **settings)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))
    assert_close(found.batch_stats, held[1])
    empty = run(held[0], held[1], held[2][:0], held[3][:0], **settings)
    assert empty.y.shape == (0, 5)
    assert_close(empty.batch_stats, held[1])


@each_row
def test_several_feature_axes(row):
    rng = np.random.default_rng(0)
    x, cotangent = rng.standard_normal((2, 6, 3, 4)).astype(np.float32)
    case = Case("flat", (6, 12), -1, bnjax.BatchNorm1d)
    params, stats = case.params(rng), case.batch_stats(rng)
    wide = jax.tree.map(lambda leaf: leaf.reshape(3, 4), (params, stats))
    axes = {"mutable": True, "using": row.policy}
    found = run(*wide, x, cotangent, axis=(1, 2), **axes)
    flat = run(params, stats, x.reshape(6, 12), cotangent.reshape(6, 12), **axes)
    shapes = jax.tree.map(lambda leaf: leaf.reshape(*leaf.shape[:-1], 3, 4), flat)
    assert_close(found, shapes, rtol=1e-5)


def test_an_example_is_normalized_the_same_in_any_batch():
    held = arrays(NHWC)
    using = Example(0.3)
    for mutable in (True, False):
        whole, alone = (
            bnjax.batch_norm(*held[:2], x, mutable=mutable, using=using)[0]
            for x in (held[2], held[2][:1])
        )
        assert_close(whole[:1], alone, rtol=1e-6)


def test_running_statistics_after_the_update_normalize_without_a_gradient_through_them():
    params, stats, x, cotangent = arrays(NHWC)
    using = Running(updated=True)
    found = run(params, stats, x, cotangent, mutable=True, using=using, correction=0)
    after = moved(NHWC, stats, x, correction=0)
    wanted = normalized(params, after, x, cotangent, running)
    assert_is(found, wanted, 3e-6, **after)
    evaluated = run(params, stats, x, cotangent, mutable=False, using=using)
    assert_is(evaluated, normalized(params, stats, x, cotangent, running), 3e-6, **stats)


@each_case
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("size", [None, 2])
@pytest.mark.parametrize("limits", [(1, 0), (1.0, 0.0)])
def test_renorm_of_1_and_0_is_batch_norm_bit_for_bit(case, masked, size, limits):
    held = arrays(case)
    settings = {"mutable": True, "axis": case.axis, "virtual_batch_size": size, "correction": 0}
    settings["mask"] = case.row_mask(2) if masked else None
    found, plain = (run(*held, using=using, **settings) for using in (Renorm(*limits), None))
    jax.tree.map(np.testing.assert_array_equal, found, plain)


@each_case
@pytest.mark.parametrize("mean", [0.5, 1e4])
def test_without_limits_training_equals_evaluation_with_the_statistics_before(case, mean):
    params, stats, _, cotangent = arrays(case)
    x = case.values(np.random.default_rng(1), mean)
    stats = {"mean": (stats["mean"] + mean).astype(np.float32), "var": stats["var"]}
    using = Renorm(np.inf, np.inf)
    trained = run(
        params, stats, x, cotangent, mutable=True, axis=case.axis, using=using, correction=0
    )
    evaluated = run(params, stats, x, cotangent, mutable=False, axis=case.axis)
    assert_close(trained.y, evaluated.y, rtol=3e-6)


def test_the_biased_variance_decides_whatever_the_correction_says():
    held = arrays(NC)
    found, wanted = (run(*held, mutable=True, using=Renorm(1e9, 1e9), correction=n) for n in (1, 0))
    assert_close(found.y, wanted.y)
    np.testing.assert_allclose(found.batch_stats["var"], moved(NC, *held[1:3])["var"], rtol=1e-6)


@pytest.mark.parametrize("case", [NC, NHWC, NCHW], ids=lambda case: case.name)
@pytest.mark.parametrize("limits", [(3.0, 5.0), (1.2, 0.1)])
def test_the_gradient_to_x_is_that_of_batch_norm_with_another_scale(case, limits):
    params, stats, x, cotangent = arrays(case)
    _, var = oracle.measure(x, case.reduced)
    ratio = np.sqrt((var + 1e-5) / (stats["var"] + 1e-5))
    scale = (np.clip(ratio, 1 / limits[0], limits[0]) * params["scale"]).astype(np.float32)
    settings = {"mutable": True, "axis": case.axis}
    found = run(params, stats, x, cotangent, using=Renorm(*limits), **settings)
    plain = run({"scale": scale, "bias": params["bias"]}, stats, x, cotangent, **settings)
    assert_close(found.dx, plain.dx, rtol=2e-6)


@pytest.mark.parametrize("value", [0.0, 7.0, 12345.678])
def test_a_constant_channel_has_output_scale_d_plus_bias_and_finite_gradients(value):
    params, stats, x, cotangent = arrays(NC)
    x[:, 2] = value
    found = run(params, stats, x, cotangent, mutable=True, using=Renorm(3.0, 5.0))
    d = (np.float64(x[0, 2]) - stats["mean"][2]) / np.sqrt(stats["var"][2] + 1e-5)
    wanted = params["scale"][2] * np.clip(d, -5, 5) + params["bias"][2]
    np.testing.assert_allclose(found.y[:, 2], np.full(8, wanted), rtol=1e-6)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))
    assert_is(
        found, normalized(params, stats, x, cotangent, renorm(3.0, 5.0)), 1e-5, **found.batch_stats
    )


@each_row
@pytest.mark.parametrize("eps", [1e-3, 1e-5, 1.0])
def test_a_variance_near_eps_loses_no_precision(row, eps):
    params, stats, x, cotangent = arrays(Case("rows", (64, 5), -1, bnjax.BatchNorm1d))
    width = np.sqrt(eps) * np.array([0.1, 0.5, 0.8, 1.0, 2.0])
    x = (x * width).astype(np.float32)
    stats = {"mean": (0.1 * width).astype("f"), "var": (width**2 / 2).astype("f")}
    found = run(params, stats, x, cotangent, mutable=True, using=row.policy, eps=eps, correction=0)
    choice = row.train
    if isinstance(row.policy, Renorm):
        choice = renorm(row.policy.r_max, row.policy.d_max, eps)
    wanted = normalized(
        params, stats, x, cotangent, choice, eps=eps, size=1 if row.per_example else None
    )
    assert_is(found, wanted, 3e-6, **found.batch_stats)


@pytest.mark.parametrize("mean", [0.0, 100.0, 1e4])
@pytest.mark.parametrize("prior", [1, 16, 200])
def test_a_blend_is_the_statistics_of_the_pooled_data(mean, prior):
    rng = np.random.default_rng(0)
    old = (mean + 2 + rng.standard_normal((prior, 7, 5))).astype(np.float32)
    x = (mean + 3 * rng.standard_normal((24, 7, 5))).astype(np.float32)
    m, v = oracle.measure(old, (0, 1))
    held = {"mean": m.astype(np.float32), "var": v.astype(np.float32)}
    exact = {"mean": held["mean"].astype(np.float64), "var": held["var"].astype(np.float64)}
    y, _ = bnjax.batch_norm({}, held, x, mutable=False, using=Blend(prior=prior))
    # The old data, with the float32 mean that was kept.
    pooled = np.concatenate([old.astype(np.float64) + (exact["mean"] - m), x])
    pooled_mean, pooled_var = oracle.measure(pooled, (0, 1))
    wanted = (x.astype(np.float64) - pooled_mean) / np.sqrt(pooled_var + 1e-5)
    assert_close(y, wanted, rtol=1e-6)


def test_a_blend_is_the_merge_of_moments():
    params, stats, x, _ = arrays(NC)
    mean, var = oracle.measure(x, (0,))
    n, prior = len(x), 20.0
    old = Moments(
        jnp.float32(prior), jnp.asarray(stats["mean"]), jnp.zeros(5), stats["var"] * prior
    )
    new = Moments(jnp.float32(n), jnp.asarray(mean, "f"), jnp.zeros(5), jnp.asarray(var * n, "f"))
    both = merge(old, new)
    found, _ = bnjax.batch_norm(params, stats, x, mutable=False, using=Blend(prior=prior))
    pooled = {"mean": both.mean, "var": both.variance()}
    wanted, _ = bnjax.batch_norm(params, pooled, x, mutable=False)
    assert_close(found, wanted, rtol=2e-6)


def test_the_extremes_of_a_blend_are_the_batch_and_the_running_statistics():
    params, stats, x, cotangent = arrays(NHWC)

    def of(using: Any) -> Outcome:
        return run(params, stats, x, cotangent, mutable=False, using=using)

    assert_close(of(Blend(weight=1)), of(Batch()), rtol=1e-6)
    assert_close(of(Blend(prior=0)), of(Batch()), rtol=1e-6)
    assert_close(of(Blend(weight=0)), of(Running()), rtol=1e-6)
    assert_close(of(Blend(prior=np.inf)), of(Running()), rtol=1e-6)
    assert_close(of(Example(0)), of(Running()), rtol=1e-6)


def test_the_oracle_of_policies_matches_its_finite_differences():
    params, stats, x, cotangent = (jax.tree.map(np.float64, each) for each in arrays(NC))
    tangent = np.random.default_rng(9).standard_normal(x.shape)
    mask = np.random.default_rng(8).random(x.shape) < 0.8
    for choice in (blend(weight=0.3), blend(prior=5, between=False), lambda seen: blend()(seen)):

        def loss(step: float, choice: Any = choice) -> float:
            found = normalized(
                params, stats, x + step * tangent, cotangent, choice, mask=mask, size=4
            )
            return float(np.sum(found.y * cotangent))

        slope = (loss(1e-5) - loss(-1e-5)) / 2e-5
        dx = normalized(params, stats, x, cotangent, choice, mask=mask, size=4).dx
        np.testing.assert_allclose(np.sum(dx * tangent), slope, rtol=1e-8)


@each_row
@pytest.mark.parametrize("mask", [None, *MASKS.values()], ids=["all", *MASKS])
@pytest.mark.parametrize("case", [NC, NCHW], ids=lambda case: case.name)
def test_each_bank_chooses_for_its_own_examples(case, mask, row):
    params, stats, x, cotangent = arrays(case)
    others = case.batch_stats(np.random.default_rng(7))
    both = {name: np.stack([stats[name], others[name]]) for name in stats}
    bank, mask = np.arange(len(x)) % 2, None if mask is None else mask(case)
    settings = {"mutable": False, "axis": case.axis, "using": row.policy}
    found = run(params, both, x, cotangent, bank=bank, mask=mask, **settings)
    for number, held in enumerate((stats, others)):
        own = bank == number
        part = mask if mask is None or len(mask) == 1 else mask[own]
        alone = run(params, held, x[own], cotangent[own], mask=part, **settings)
        assert_close((found.y[own], found.dx[own]), (alone.y, alone.dx), rtol=2e-5)
