"""Policies through every transformation of JAX and in every dtype; their numbers may be traced."""

import dataclasses
import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bnjax
from bnjax.policies import Batch, Blend, Example, Renorm, Running
from tests.support.cases import NC, NHWC
from tests.support.oracle import assert_close
from tests.support.policies import ROWS, normalized

pytestmark = pytest.mark.quick_compile

each_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
POLICIES = (
    Batch(),
    Running(),
    Running(updated=True),
    Renorm(1.5, 0.25),
    Blend(prior=5),
    Example(0.4),
)
each_policy = pytest.mark.parametrize("using", POLICIES, ids=repr)


def arrays(case: Any = NC, seed: int = 0, dtype: Any = np.float32) -> tuple[Any, Any, Any]:
    rng = np.random.default_rng(seed)
    held = case.params(rng), case.batch_stats(rng), case.values(rng)
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), held)


def call(using: Any, params: Any, stats: Any, x: Any, **settings: Any) -> Any:
    told = {"mutable": True, "correction": 0, "using": using, **settings}
    return bnjax.batch_norm(params, stats, x, **told)


def reference(policy: Any, params: Any, stats: Any, x: Any) -> tuple[Any, Any]:
    """The formulas in their simplest form, for JAX to differentiate."""
    reduced, kind = tuple(range(x.ndim - 1)), policy
    stop = jax.lax.stop_gradient
    mean, r, d, m, v = jnp.mean(x, reduced), 1.0, 0.0, stats["mean"], stats["var"]
    var = jnp.mean(jnp.abs(x - mean) ** 2, reduced)
    moved = {"mean": 0.9 * m + 0.1 * mean, "var": 0.9 * v + 0.1 * var}
    if isinstance(kind, Running):
        mean, var = stop((moved["mean"], moved["var"])) if policy.updated else (m, v)
    elif isinstance(kind, Renorm):
        q = jnp.sqrt(v + 1e-5)
        r = stop(jnp.clip(jnp.sqrt(var + 1e-5) / q, 1 / policy.r_max, policy.r_max))
        d = (mean - m) / q
        d = stop(d * jnp.minimum(1, policy.d_max / jnp.abs(d)))
    elif isinstance(kind, Blend | Example):
        if isinstance(kind, Blend):
            a = len(x) / (policy.prior + len(x))
        else:
            a, axes = policy.weight, reduced[1:]
            mean = jnp.mean(x, axes, keepdims=True)
            var = jnp.mean(jnp.abs(x - mean) ** 2, axes, keepdims=True)
        between = a * (1 - a) * jnp.abs(mean - m) ** 2
        mean, var = (1 - a) * m + a * mean, (1 - a) * v + a * var + between
    y = ((x - mean) / jnp.sqrt(var + 1e-5) * r + d) * params["scale"] + params["bias"]
    return y, moved


def loss(apply: Any, using: Any, stats: Any, params: Any, x: Any) -> jax.Array:
    """A nonlinear function of the output."""
    y, _ = apply(using, params, stats, x)
    return jnp.sum(jnp.sin(jnp.real(y)) * jnp.cos(jnp.arange(y.size)).reshape(y.shape))


def derivatives(f: Any, at: Any, along: Any) -> Any:
    """Derivatives of first and second order, forward and reverse."""

    def dot(*at: Any) -> Any:
        return sum(jax.tree.leaves(jax.tree.map(jnp.vdot, jax.grad(f, (0, 1))(*at), along)))

    return (
        jax.grad(f, (0, 1))(*at),
        jax.jvp(f, at, along),
        jax.jvp(jax.grad(f, (0, 1)), at, along)[1],
        jax.grad(dot, (0, 1))(*at),
    )


@each_policy
@pytest.mark.parametrize("case", [NC, NHWC], ids=lambda case: case.name)
@pytest.mark.usefixtures("x64")
def test_derivatives_of_first_and_second_order_match_the_formula(case, using):
    (params, stats, x), (dparams, _, dx) = (arrays(case, seed, np.float64) for seed in (0, 1))
    found, wanted = (
        jax.jit(functools.partial(derivatives, functools.partial(loss, apply, using, stats)))(
            (params, x), (dparams, dx)
        )
        for apply in (call, reference)
    )
    assert_close(found, wanted, rtol=1e-10)
    assert_close(call(using, params, stats, x), reference(using, params, stats, x), rtol=1e-12)


@each_policy
def test_vmap_scan_and_remat_match_plain_calls(using):
    many = [arrays(NC, seed) for seed in range(3)]
    params, stats, _ = many[0]
    xs = jnp.stack([x for _, _, x in many])
    plain = [call(using, params, stats, x) for x in xs]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *plain)
    found = jax.jit(jax.vmap(lambda x: call(using, params, stats, x)))(xs)
    assert_close(found, stacked, rtol=2e-6)

    def step(stats: Any, x: Any) -> tuple[Any, Any]:
        y, stats = call(using, params, stats, x)
        return stats, y

    last, ys = jax.lax.scan(step, stats, xs)
    held, expected = stats, []
    for x in xs:
        held, y = step(held, x)
        expected.append(y)
    assert_close((last, ys), (held, jnp.stack(expected)), rtol=2e-6)
    f = functools.partial(loss, call, using, stats)
    for policy in (None, bnjax.remat_policy()):
        again = jax.checkpoint(f, policy=policy)
        found, wanted = (jax.jit(jax.grad(g, (0, 1)))(params, xs[0]) for g in (again, f))
        assert_close(found, wanted, rtol=2e-6)


@each_row
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_rounded_once(row, dtype):
    params, stats, x = arrays(NHWC)
    x = jnp.asarray(x, dtype)
    y, moved = call(row.policy, params, stats, x)
    assert (y.dtype, {leaf.dtype for leaf in moved.values()}) == (dtype, {jnp.dtype("float32")})
    exact = np.asarray(x, np.float64)
    size = 1 if row.per_example else None
    wanted = normalized(params, stats, exact, np.ones_like(exact), row.train, size=size)
    assert_close(y, wanted.y, rtol=float(jnp.finfo(dtype).eps) / 2 + 3e-6)
    cotangent = jnp.asarray(arrays(NHWC, 3)[2], dtype)
    dx = jax.vjp(lambda x: call(row.policy, params, stats, x)[0], x)[1](cotangent)[0]
    assert dx.dtype == dtype
    wanted = normalized(params, stats, exact, cotangent, row.train, size=size)
    assert_close(dx, wanted.dx, rtol=float(jnp.finfo(dtype).eps))


@each_row
@pytest.mark.usefixtures("x64")
def test_float64_stays_float64(row):
    params, stats, x = arrays(NHWC, 0, np.float64)
    y, moved = call(row.policy, params, stats, x + 1e6)
    stats = {**stats, "mean": stats["mean"]}
    assert {leaf.dtype for leaf in (y, *moved.values())} == {jnp.dtype("float64")}
    size = 1 if row.per_example else None
    wanted = normalized(params, stats, x + 1e6, np.ones(x.shape), row.train, size=size)
    assert_close(y, wanted.y, rtol=1e-10)


@each_policy
@pytest.mark.usefixtures("x64")
def test_complex_values_have_a_complex_mean_and_one_variance(using):
    params, stats, x = arrays(NHWC, 0, np.float64)
    x = x + 1j * arrays(NHWC, 1, np.float64)[2]
    stats = {"mean": stats["mean"] + 0.3j, "var": stats["var"]}
    found, wanted = (apply(using, params, stats, x) for apply in (call, reference))
    assert_close(found, wanted, rtol=1e-12)
    f, g = (functools.partial(loss, apply, using, stats, params) for apply in (call, reference))
    assert_close(jax.grad(f)(x), jax.grad(g)(x), rtol=1e-10)


NUMBERS = (
    (lambda a, b: Renorm(a, b), [(1.0, 0.0), (1.5, 0.25), (3.0, 5.0)]),
    (lambda a, b: Blend(prior=a), [(0.0, 0), (5.0, 0), (100.0, 0)]),
    (lambda a, b: Blend(weight=a), [(0.0, 0), (0.3, 0), (1.0, 0)]),
    (lambda a, b: Example(a), [(0.0, 0), (0.3, 0), (1.0, 0)]),
)


@pytest.mark.parametrize(("make", "values"), NUMBERS, ids=["Renorm", "prior", "weight", "Example"])
def test_numbers_may_be_traced_and_nothing_compiles_again(make, values):
    held = arrays(NHWC)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def inside(a: Any, b: Any) -> Any:
        return call(make(a, b), *held)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def passed(using: Any) -> Any:  # a policy is a pytree of its numbers
        return call(using, *held)

    for pair in values:
        plain = call(make(*pair), *held)
        assert_close(inside(*pair), plain, rtol=2e-6)
        assert_close(passed(make(*pair)), plain, rtol=2e-6)


def test_numbers_may_be_learned():
    held = arrays(NHWC)
    f = lambda a: loss(call, Blend(weight=a), held[1], held[0], held[2])  # noqa: E731
    slope = (f(0.51) - f(0.49)) / 0.02
    np.testing.assert_allclose(jax.jit(jax.grad(f))(0.5), slope, rtol=1e-2)


def test_equal_policies_are_equal_and_hash():
    for make in (Batch, Running, Renorm, Renorm.paper, Renorm.crossq, lambda: Blend(prior=3)):
        assert make() == make()
        assert len({make(), make()}) == 1
    assert Renorm(3.0, 5.0) != Renorm(3.0, 4.0)
    assert Renorm.crossq(5) != Renorm.crossq(6)
    assert Blend(weight=0.1) != Blend(weight=0.1, between=False)
    with pytest.raises(dataclasses.FrozenInstanceError, match="cannot assign to field 'r_max'"):
        Renorm().r_max = 2.0  # pyright: ignore[reportAttributeAccessIssue]
    shown = {
        "Renorm.paper()": Renorm.paper(),
        "Renorm.crossq(warmup=7)": Renorm.crossq(7),
        "Renorm()": Renorm(),
        "Renorm(r_max=2.0)": Renorm(2.0),
        "Blend(prior=16)": Blend(prior=16),
        "Example(weight=0.5, between=False)": Example(0.5, between=False),
    }
    assert {repr(policy): policy for policy in shown.values()} == shown


PAPER = {0: (1, 0), 5_000: (1, 0), 15_000: (1.571, 2.5), 25_000: (2.143, 5), 40_000: (3, 5)}
PAPER |= {10**8: (3, 5)}
CROSSQ = {0: (1, 0), 99_999: (1, 0), 100_000: (3, 5), 10**8: (3, 5)}


@pytest.mark.parametrize(
    ("using", "table"), [(Renorm.paper(), PAPER), (Renorm.crossq(), CROSSQ)], ids=str
)
def test_presets_have_the_limits_of_their_papers(using, table):
    for count, limits in table.items():
        at = using.at(jnp.int32(count))
        np.testing.assert_allclose((at.r_max, at.d_max), limits, atol=1e-3)


def test_limits_follow_the_saved_count_of_training_steps():
    using = Renorm(optax.linear_schedule(1.0, 3.0, 2), lambda count: 2.5 * count)
    assert using.counts
    params, stats = bnjax.init(5, using=using)
    assert stats["count"].dtype == jnp.int32
    limits = [(1.0, 0.0), (2.0, 2.5), (3.0, 5.0), (3.0, 7.5)]

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(stats: Any, x: Any) -> Any:
        return call(using, params, stats, x)

    for number, pair in enumerate(limits):
        x = arrays(NC, number)[2] * 4 + 3
        without = {name: stats[name] for name in ("mean", "var")}
        y, after = step(stats, x)
        wanted, moved = call(Renorm(*pair), params, without, x)
        assert_close((y, after), (wanted, {**moved, "count": number + 1}), rtol=2e-6)
        evaluated = call(using, params, after, x, mutable=False)
        assert_close(evaluated[0], bnjax.batch_norm(params, moved, x, mutable=False)[0], rtol=2e-6)
        assert_close(evaluated[1], after)
        stats = after


def test_the_warm_up_of_a_preset_is_batch_norm_bit_for_bit():
    params, stats, x = arrays(NHWC)
    for using in (Renorm.paper(), Renorm.crossq(3)):
        counted = {**stats, "count": jnp.int32(2)}
        y, after = jax.jit(functools.partial(call, using))(params, counted, x)
        plain, moved = jax.jit(functools.partial(call, None))(params, stats, x)
        jax.tree.map(np.testing.assert_array_equal, (y, after), (plain, {**moved, "count": 3}))
