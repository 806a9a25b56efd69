"""Banks with masks, momenta, policies and half precision, and under JAX's transformations."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import export

import bnjax
from bnjax import policies
from tests.support.banks import (
    BANK,
    BANKS,
    CASES,
    NC,
    NLC,
    Data,
    by_numpy,
    by_plain,
    by_torch,
    found,
    make,
    tree,
)
from tests.support.cases import outcome
from tests.support.oracle import assert_close

pytestmark = pytest.mark.quick_compile

NHWC = next(case for case in CASES if case.name == "NHWC")
each_case = pytest.mark.parametrize("case", [NC, NLC], ids=lambda case: case.name)
ROWS = np.arange(12) % 7 != 4  # masks out two examples


def eagerly(data: Data, stats: Any = None, **told: Any) -> Any:
    """The results for all banks at once, with settings that `found` does not accept."""
    params, held, x, bank, cotangent = map(tree, data.arrays[:5])
    told = {"mutable": True, "mask": data.mask, "bank": bank} | told

    @jax.jit
    def run(params, x):
        return outcome(
            lambda params, x: bnjax.batch_norm(params, stats or held, x, **told),
            params,
            x,
            cotangent,
        )

    return jax.device_get(run(params, x))


@each_case
@pytest.mark.parametrize("affine", [True, "own", "both"], ids=str)
@pytest.mark.parametrize("kind", ["rows", "positions", "channels"])
def test_masked_positions_update_no_bank(case, affine, kind):
    rng = np.random.default_rng(3)
    data = make(case._replace(shape=(48, *case.shape[1:])), affine, np.tile(BANK, 4))
    rows = np.arange(48).reshape(-1, *[1] * (data.x.ndim - 1)) % 5 > 0
    masks = {
        "rows": rows,
        "positions": rows & (rng.random((*data.x.shape[:-1], 1)) < 0.8),
        "channels": rng.random(data.x.shape) < 0.8,
    }
    data = data._replace(mask=masks[kind])
    assert_close(found(data), by_numpy(data), rtol=1e-5)
    # NaN under the mask affects nothing that counts.
    wild = data._replace(
        x=np.where(data.mask, data.x, np.float32(np.nan)),
        cotangent=np.where(data.mask, data.cotangent, np.float32(0)),
    )
    calm = data._replace(cotangent=wild.cotangent)
    a, b = (each._replace(y=np.where(data.mask, each.y, 0)) for each in (found(wild), found(calm)))
    assert_close(a, b, rtol=1e-6)


@each_case
def test_a_mask_of_far_values_loses_no_digits(case):
    data = make(case._replace(shape=(48, *case.shape[1:])), True, np.tile(BANK, 4), far=1e5)
    data = data._replace(mask=np.random.default_rng(0).random(data.x.shape) < 0.7)
    assert_close(found(data), by_numpy(data), rtol=3e-6)


def test_a_bank_with_only_masked_examples_keeps_its_statistics():
    data = make(NLC, "own")
    data = data._replace(mask=(data.bank != 2).reshape(-1, 1, 1))
    result, wanted = found(data), by_plain(data)
    assert_close(result, wanted, rtol=1e-5)
    for name, value in result.batch_stats.items():
        np.testing.assert_array_equal(value[[1, 2]], data.batch_stats[name][[1, 2]])


@pytest.mark.parametrize("mutable", [True, False], ids=["train", "evaluate"])
@pytest.mark.parametrize("compiled", [True, False], ids=["jit", "eager"])
def test_a_masked_example_needs_no_bank(mutable, compiled):
    data = make(NLC, "own")
    masked = data.bank == 3
    mask = ~masked.reshape(-1, 1, 1)
    data = data._replace(mask=mask, cotangent=data.cotangent * mask)
    padded = data._replace(bank=np.where(masked, -1, data.bank))
    run = functools.partial(found if compiled else eagerly, mutable=mutable)
    a, b = run(padded), run(data)
    assert np.isfinite(a.y).all()
    assert np.isfinite(a.dx).all()
    assert_close((a.y[~masked], a.dx[~masked]), (b.y[~masked], b.dx[~masked]), rtol=1e-6)
    assert_close(a.batch_stats, b.batch_stats, rtol=1e-6)


@each_case
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=lambda dtype: dtype.__name__)
def test_half_precision_only_rounds_inputs_and_outputs(case, dtype):
    data = make(case._replace(shape=(48, *case.shape[1:])), "own", np.tile(BANK, 4))
    half = np.asarray(jnp.asarray(data.x, dtype))
    data = data._replace(x=np.asarray(half, np.float32))
    result = found(data._replace(x=half, cotangent=jnp.asarray(data.cotangent, dtype)))
    assert (result.y.dtype, result.dx.dtype) == (dtype, dtype)
    wanted = by_numpy(data)
    assert_close(result.batch_stats, wanted.batch_stats, rtol=1e-5)
    assert_close((result.y, result.dx), (wanted.y, wanted.dx), rtol=2 * float(jnp.finfo(dtype).eps))


@each_case
def test_cumulative_averages_are_counted_by_bank(case):
    banks = (BANK, np.where(BANK == 3, 1, BANK), BANK)
    datas = [make(case, bank=bank.astype(np.int32), seed=n) for n, bank in enumerate(banks)]
    new = {"mean": np.zeros((BANKS, 5), "f"), "var": np.ones((BANKS, 5), "f")}
    stats = new | {"count": np.zeros(BANKS, np.int32)}
    for data in datas:
        stats = found(data._replace(batch_stats=stats), momentum=None).batch_stats
    assert stats["count"].tolist() == [3, 1, 3, 2]
    per_batch = [by_torch(d._replace(batch_stats=new), momentum=1.0).batch_stats for d in datas]
    for bank, count in enumerate(stats["count"]):
        seen = [s for s, d in zip(per_batch, datas, strict=True) if (d.bank == bank).any()]
        assert len(seen) == count
        for name in ("mean", "var"):
            assert_close(stats[name][bank], np.mean([s[name][bank] for s in seen], 0), rtol=1e-5)


@pytest.mark.parametrize(
    "momentum",
    [None, policies.Debiased(0.3), optax.linear_schedule(1.0, 0.1, 3)],
    ids=["cumulative", "debiased", "schedule"],
)
@pytest.mark.parametrize("index", ["mixed", "static", "traced"])
def test_each_bank_has_its_own_count_of_steps(momentum, index):
    data = make()
    stats = {**data.batch_stats, "count": np.array([0, 5, 1, 2], np.int32)}
    bank: Any = {"mixed": tree(data.bank), "static": 2, "traced": jnp.int32(2)}[index]
    result = eagerly(data, tree(stats), momentum=momentum, bank=bank)
    if index != "mixed":
        data = data._replace(bank=np.full(12, 2))
    wanted = by_plain(data._replace(batch_stats=stats), momentum=momentum)
    assert_close(result, wanted, rtol=1e-5)
    here = [n in data.bank for n in range(BANKS)]
    assert (result.batch_stats["count"] - stats["count"]).tolist() == here


@each_case
def test_pooled_banks_hold_all_values_they_have_seen(case):
    _, stats = bnjax.init(5, banks=BANKS, momentum="pooled")
    datas = [make(case, seed=seed, far=100.0) for seed in range(3)]
    for data in datas:
        stats = eagerly(data, stats, momentum="pooled").batch_stats
    axes = tuple(range(datas[0].x.ndim - 1))
    for bank in range(BANKS):
        seen = np.concatenate([np.float64(d.x[d.bank == bank]) for d in datas])
        if bank == 1:
            assert stats["mean"][1].tolist() == [0] * 5
            assert stats["values"][1].tolist() == [0] * 5
            continue
        assert_close(stats["mean"][bank], seen.mean(axes), rtol=3e-6)
        assert_close(stats["var"][bank], seen.var(axes), rtol=3e-6)
        assert stats["values"][bank].tolist() == [seen[..., 0].size] * 5


POLICIES = (
    policies.Batch(),
    policies.Running(),
    policies.Running(updated=True),
    policies.Renorm(1.5, 0.5),
    policies.Renorm(1, 0),
    policies.Blend(prior=4),
    policies.Blend(weight=0.3, between=False),
    policies.Example(0.4),
)


@each_case
@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize("mutable", [True, False], ids=["train", "evaluate"])
def test_a_policy_sees_the_statistics_of_each_bank(case, policy, mutable):
    data = make(case, "own")
    told = {"using": policy, "mutable": mutable}
    assert_close(eagerly(data, **told), by_plain(data, **told), rtol=1e-5)


def test_limits_of_renormalization_follow_the_count_of_each_bank():
    data = make(NLC)
    stats = {**data.batch_stats, "count": np.array([0, 5, 1, 2], np.int32)}
    policy = policies.Renorm.crossq(warmup=2)
    result = eagerly(data, tree(stats), using=policy)
    assert_close(result, by_plain(data._replace(batch_stats=stats), using=policy), rtol=1e-5)


def test_vectorized_calls_equal_sequential_ones():
    datas = [make(NLC, "both", np.roll(BANK, seed), seed=seed) for seed in range(3)]
    arrays = [data.arrays[:5] for data in datas]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *arrays)

    def run(params, stats, x, bank, cotangent):
        return outcome(
            lambda params, x: bnjax.batch_norm(params, stats, x, bank=bank, mutable=True),
            params,
            x,
            cotangent,
        )

    together = jax.jit(jax.vmap(run))(*stacked)
    for number, data in enumerate(datas):
        assert_close(jax.tree.map(lambda a, n=number: a[n], together), by_numpy(data), rtol=1e-5)
    params, stats, x, _, cotangent = arrays[0]
    one = jax.vmap(run, (None, None, None, 0, None))(params, stats, x, stacked[3], cotangent)
    for number, data in enumerate(datas):
        wanted = by_numpy(datas[0]._replace(bank=data.bank))
        assert_close(jax.tree.map(lambda a, n=number: a[n], one), wanted, rtol=1e-5)


def test_a_scan_carries_the_statistics_of_all_banks():
    datas = [make(NLC, bank=np.roll(BANK, seed), seed=seed) for seed in range(3)]
    xs, banks = (jnp.stack([getattr(d, name) for d in datas]) for name in ("x", "bank"))

    def step(stats, now):
        y, stats = bnjax.batch_norm({}, stats, now[0], bank=now[1], mutable=True)
        return stats, y

    stats, ys = jax.jit(lambda s: jax.lax.scan(step, s, (xs, banks)))(tree(datas[0].batch_stats))
    held = datas[0].batch_stats
    for data, y in zip(datas, ys, strict=True):
        wanted = by_torch(data._replace(params={}, batch_stats=held))
        assert_close(y, wanted.y, rtol=1e-5)
        held = wanted.batch_stats
    assert_close(stats, held, rtol=1e-5)


@pytest.mark.parametrize("policy", [None, bnjax.remat_policy()], ids=["all", "policy"])
def test_rematerialization_changes_nothing(policy):
    data = make(NLC, "both")
    params, stats, x, bank, cotangent = map(tree, data.arrays[:5])

    def apply(params, x):
        return bnjax.batch_norm(params, stats, x, bank=bank, mutable=True)

    result = jax.jit(
        lambda params, x: outcome(jax.checkpoint(apply, policy=policy), params, x, cotangent)
    )(params, x)
    assert_close(result, by_torch(data), rtol=1e-5)


def test_an_exported_program_takes_any_banks():
    data = make(NLC, "own")
    params, stats, x, bank = map(tree, data.arrays[:4])
    step = jax.jit(functools.partial(bnjax.batch_norm, mutable=True))
    (n,) = export.symbolic_shape("n")
    shape = jax.ShapeDtypeStruct((n, *x.shape[1:]), x.dtype), jax.ShapeDtypeStruct((n,), jnp.int32)
    exported = export.export(jax.jit(lambda p, s, x, bank: step(p, s, x, bank=bank)))
    again = export.deserialize(exported(params, stats, *shape).serialize())
    for these in (slice(None), slice(0, 7)):
        some = data._replace(
            x=data.x[these], bank=data.bank[these], cotangent=data.cotangent[these]
        )
        wanted = by_torch(some)
        assert_close(again.call(params, stats, x[these], bank[these]), wanted[:2], rtol=1e-5)


@each_case
def test_all_kinds_of_derivatives_equal_those_of_independent_layers(x64, case):
    data = make(case, "both", dtype=np.float64)
    params, stats, x, bank, cotangent = map(tree, data.arrays[:5])

    def together(params, x):
        y, _ = bnjax.batch_norm(params, stats, x, bank=bank, mutable=True)
        return jnp.sum(jnp.sin(y) * cotangent)

    def apart(params, x):
        total = 0.0
        for number in (0, 2, 3):
            these = np.flatnonzero(data.bank == number)
            own = {k: params[k] + params[f"bank_{k}"][number] for k in ("scale", "bias")}
            old = {name: value[number] for name, value in stats.items()}
            y, _ = bnjax.batch_norm(own, old, x[these], mutable=True)
            total += jnp.sum(jnp.sin(y) * cotangent[these])
        return total

    along = jax.tree.map(jnp.cos, params), jnp.cos(3 * x)

    def forward(loss):
        return jax.jvp(loss, (params, x), along)[1]

    def gradient_along(loss, params, x):
        grads = jax.grad(loss, (0, 1))(params, x)
        return sum(map(jnp.vdot, jax.tree.leaves(grads), jax.tree.leaves(along)))

    def twice(loss):
        return jax.grad(functools.partial(gradient_along, loss), (0, 1))(params, x)

    def forward_over_reverse(loss):
        return jax.jvp(jax.grad(loss, (0, 1)), (params, x), along)[1]

    def forward_twice(loss):
        return jax.jvp(lambda *at: jax.jvp(loss, at, along)[1], (params, x), along)[1]

    for derivative in (forward, twice, forward_over_reverse, forward_twice):
        both = (jax.jit(functools.partial(derivative, loss))() for loss in (together, apart))
        assert_close(*both, rtol=1e-10)


def test_complex_values_have_banks_too():
    data = make(NLC, False)
    x = data.x + 1j * data.cotangent
    stats = {**data.batch_stats, "mean": data.batch_stats["mean"] + 0j}
    y, moved = bnjax.batch_norm({}, tree(stats), jnp.asarray(x), bank=data.bank, mutable=True)
    for number in (0, 2, 3):
        old = {name: value[number] for name, value in stats.items()}
        these = data.bank == number
        wanted, new = bnjax.batch_norm({}, tree(old), jnp.asarray(x[these]), mutable=True)
        assert_close(y[these], wanted, rtol=1e-5)
        assert_close({name: value[number] for name, value in moved.items()}, new, rtol=1e-5)


@pytest.mark.parametrize("index", ["mixed", "static", "traced"])
def test_an_empty_batch_updates_nothing(index):
    bank: Any = {"mixed": jnp.zeros(0, jnp.int32), "static": 1, "traced": jnp.int32(1)}[index]
    data = make(NLC)
    args = tree(data.params), tree(data.batch_stats), jnp.zeros((0, 3, 5))
    y, moved = bnjax.batch_norm(*args, bank=bank, mutable=True)
    assert y.shape == (0, 3, 5)
    assert_close(moved, data.batch_stats)


@pytest.mark.parametrize("index", [-1, 4, 100])
@pytest.mark.parametrize("affine", [True, "own"], ids=str)
@each_case
def test_an_example_without_a_valid_bank_gives_nan_and_updates_nothing(case, affine, index):
    data = make(case, affine)
    lost = data.bank == 3
    result = found(data._replace(bank=np.where(lost, index, data.bank).astype(np.int32)))
    wanted = by_torch(data)
    assert np.isnan(result.y[lost]).all()
    assert_close(result.y[~lost], wanted.y[~lost], rtol=1e-5)
    for name, value in result.batch_stats.items():
        np.testing.assert_array_equal(value[3], data.batch_stats[name][3])
        assert_close(value[:3], wanted.batch_stats[name][:3], rtol=1e-5)


@pytest.mark.parametrize("index", [-1, 4])
@pytest.mark.parametrize("affine", [True, False, "own", "both"], ids=str)
@pytest.mark.parametrize("mutable", [True, False], ids=["train", "evaluate"])
def test_an_invalid_traced_bank_gives_nan_and_updates_nothing(affine, index, mutable):
    data = make(NLC, affine)
    result = found(data._replace(bank=np.int32(index)), mutable=mutable)
    assert np.isnan(result.y).all()
    for name, value in result.batch_stats.items():
        np.testing.assert_array_equal(value, data.batch_stats[name])


@pytest.mark.parametrize("size", [2, 5])
def test_one_bank_for_all_examples_works_with_virtual_batches(size):
    data = make(NLC)
    alone = data._replace(bank=np.full(12, 2))
    for bank in (2, jnp.int32(2)):
        result = eagerly(data, bank=bank, virtual_batch_size=size)
        assert_close(result, by_plain(alone, virtual_batch_size=size), rtol=1e-5)
