"""Renormalization and running statistics, equal to those of other packages where these are right.

`python -m tests.test_policies_peers` prints how far each is off, as a table.
"""

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bnjax
from bnjax.policies import Renorm, Running
from tests.support import peers
from tests.support.oracle import assert_close, measure
from tests.support.policies import normalized, renorm

pytestmark = pytest.mark.quick_compile

KEY = jax.random.key(0)
EPS = 1e-3


def arrays(width: float = 2.0) -> tuple[Any, Any, Any, Any]:
    """Parameters, statistics, x and a cotangent; the batch is off by about a deviation."""
    rng = np.random.default_rng(0)
    x = (width * (1.3 * rng.standard_normal((64, 5)) + rng.standard_normal(5))).astype("f")
    params = {"scale": rng.normal(1, 0.5, 5), "bias": rng.normal(0, 0.5, 5)}
    stats = {"mean": np.zeros(5), "var": width**2 * np.array([0.2, 0.5, 1.0, 2.0, 20.0])}
    cotangent = rng.standard_normal(x.shape)
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), (params, stats, x, cotangent))


def off(found: Any, wanted: Any) -> float:
    """The largest difference, relative to the largest entry."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True)
    exact = [(np.asarray(a, np.float64), np.asarray(b, np.float64)) for a, b in pairs]
    return max(float(np.max(np.abs(a - b)) / np.max(np.abs(b))) for a, b in exact)


def ours(width: float = 2.0, **settings: Any) -> tuple[Any, Any]:
    """Output, with the gradient to x, and statistics of bnjax."""
    params, stats, x, cotangent = arrays(width)
    told = {"eps": EPS, "momentum": 0.01, "correction": 0, "mutable": True}
    told |= {"using": Renorm(3.0, 5.0), **settings}
    y, pull, after = jax.vjp(lambda x: bnjax.batch_norm(params, stats, x, **told), x, has_aux=True)
    return (y, pull(cotangent)[0]), after


def exact(width: float = 2.0, limits: tuple[float, float] = (3.0, 5.0)) -> Any:
    held = arrays(width)
    found = normalized(*held, renorm(*limits, eps=EPS), eps=EPS)
    return found.y, found.dx


def of_sbx(width: float = 2.0, steps: int = 100_000) -> tuple[Any, Any]:
    """The same with sbx, after this many steps."""
    layer = peers.sbx()(use_running_average=False)
    params, stats, x, cotangent = arrays(width)
    state = {**stats, "r_max": 3, "d_max": 5, "steps": steps}

    def f(x: Any) -> Any:
        return layer.apply({"params": params, "batch_stats": state}, x, mutable=["batch_stats"])

    y, pull, after = jax.vjp(f, x, has_aux=True)
    return (y, pull(cotangent)[0]), after["batch_stats"]


def sbx_where_the_variance_is_far_above_eps() -> float:
    found, after = of_sbx(width=100.0)
    wanted, moved = ours(width=100.0)
    assert_close({name: after[name] for name in moved}, moved, rtol=1e-6)
    return off(found, wanted)


def sbx_in_the_warm_up() -> float:
    using = Renorm.crossq()
    params, stats, x, _ = arrays()
    counted = {**stats, "count": jnp.int32(99_999)}
    told = {"eps": EPS, "momentum": 0.01, "correction": 0, "mutable": True, "using": using}
    y, after = bnjax.batch_norm(params, counted, x, **told)
    (theirs, _), moved = of_sbx(steps=99_999)
    assert int(after["count"]) == int(moved["steps"]) == 100_000
    return off(y, theirs)


def sbx_in_evaluation() -> float:
    params, stats, x, _ = arrays()
    state = {**stats, "r_max": 3, "d_max": 5, "steps": 7}
    layer = peers.sbx()(use_running_average=True)
    y = layer.apply({"params": params, "batch_stats": state}, x)
    told = {"eps": EPS, "mutable": False, "using": Renorm.crossq()}
    return off(bnjax.batch_norm(params, stats | {"count": jnp.int32(7)}, x, **told)[0], y)


def keras_layer(clipping: dict[str, float], masked: bool = False) -> tuple[Any, Any, Any]:
    """Output and gradient of Keras' layer, with the deviation from the running variance."""
    keras = peers.keras()
    params, stats, x, cotangent = arrays()
    layer = keras.layers.BatchNormalization(epsilon=EPS, renorm=True, renorm_clipping=clipping)
    layer.build(x.shape)
    values = {
        "gamma": params["scale"],
        "beta": params["bias"],
        "renorm_mean": stats["mean"],
        "renorm_stddev": jnp.sqrt(stats["var"] + EPS),
        "moving_mean": stats["mean"],
        "moving_variance": stats["var"],
        "moving_stddev": jnp.sqrt(stats["var"] + EPS),
    }
    for name, value in values.items():
        getattr(layer, name).assign(value)
    trained, held = (
        [v.value for v in vs] for vs in (layer.trainable_variables, layer.non_trainable_variables)
    )
    mask = jnp.arange(64) < 40 if masked else None

    def f(x: Any) -> Any:
        y, _ = layer.stateless_call(trained, held, x, training=True, mask=mask)
        return y

    y, pull = jax.vjp(f, x)
    return y, pull(cotangent)[0], mask


def keras_without_limits() -> float:
    y, dx, _ = keras_layer({})
    return off((y, dx), ours(using=Renorm(1e9, 1e9))[0])


def keras_with_fixed_limits() -> float:
    y, dx, _ = keras_layer({"rmax": 1.5, "rmin": 1 / 1.5, "dmax": 0.25})
    return off((y, dx), ours(using=Renorm(1.5, 0.25))[0])


def keras_under_a_mask() -> float:
    y, _, mask = keras_layer({"rmax": 1.5, "rmin": 1 / 1.5, "dmax": 0.25}, masked=True)
    assert mask is not None
    wanted, _ = ours(using=Renorm(1.5, 0.25), mask=mask[:, None])
    return off(y[:40], wanted[0][:40])


def of_brax(xs: Any, weights: Any = None, state: Any = None) -> Any:
    statistics = peers.brax()
    state = statistics.init_state(jnp.zeros(xs[0].shape[-1:])) if state is None else state
    weights = [None] * len(xs) if weights is None else weights
    for x, weight in zip(xs, weights, strict=True):
        state = statistics.update(state, x, weights=weight)
    return state


def pooled(xs: Any, masks: Any = None) -> tuple[Any, Any]:
    """The statistics of bnjax after these batches, and the last output."""
    params, stats = bnjax.init(xs[0].shape[-1], affine=False, momentum="pooled")
    masks = [None] * len(xs) if masks is None else masks
    told: Any = {"mutable": True, "momentum": "pooled", "using": Running(updated=True)}
    y = None
    for x, mask in zip(xs, masks, strict=True):
        y, stats = bnjax.batch_norm(params, stats, x, mask=mask, eps=1e-12, **told)
    return stats, y


def observations(mean: float = 3.0) -> list[Any]:
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(mean, 2, (32, 5)), jnp.float32) for _ in range(50)]


def brax_statistics() -> float:
    xs = observations()
    state, (stats, y) = of_brax(xs), pooled(xs)
    theirs = peers.brax().normalize(xs[-1], state)
    return off((stats["mean"], jnp.sqrt(stats["var"]), y), (state.mean, state.std, theirs))


def brax_with_weights_of_0_and_1() -> float:
    xs = observations()
    rng = np.random.default_rng(1)
    masks = [rng.random(32) < 0.6 for _ in xs]
    state = of_brax(xs, [jnp.asarray(mask, jnp.float32) for mask in masks])
    stats, _ = pooled(xs, [mask[:, None] for mask in masks])
    return off((stats["mean"], jnp.sqrt(stats["var"])), (state.mean, state.std))


def brax_over_devices() -> float:
    statistics, xs = peers.brax(), jnp.stack(observations()[:8])
    _, stats = bnjax.init(5, momentum="pooled")
    update = functools.partial(statistics.update, pmap_axis_name="i")
    state = statistics.init_state(jnp.zeros(5))
    told: Any = {"mutable": True, "momentum": "pooled", "axis_name": "i"}
    theirs = jax.vmap(update, (None, 0), None, axis_name="i")(state, xs)
    found = jax.vmap(lambda x: bnjax.batch_norm({}, stats, x, **told)[1], axis_name="i")(xs)
    return off((found["mean"][0], jnp.sqrt(found["var"][0])), (theirs.mean, theirs.std))


class Agrees:
    """A comparison whose result must be below a bound."""

    def __init__(self, peer: str, what: str, check: Callable[[], float], bound: float) -> None:
        self.peer, self.what, self.check, self.bound = peer, what, check, bound


ROWS = (
    Agrees("sbx", "v / eps of 2e6 and more", sbx_where_the_variance_is_far_above_eps, 1e-5),
    Agrees("sbx", "warm-up, count", sbx_in_the_warm_up, 1e-6),
    Agrees("sbx", "evaluation of its state", sbx_in_evaluation, 1e-6),
    Agrees("keras", "one step, no limits, with dx", keras_without_limits, 1e-5),
    Agrees("keras", "one step, fixed limits, with dx", keras_with_fixed_limits, 1e-5),
    Agrees("keras", "one step under a mask", keras_under_a_mask, 1e-5),
    Agrees("brax", "mean, deviation, output", brax_statistics, 1e-5),
    Agrees("brax", "weights of 0 and 1", brax_with_weights_of_0_and_1, 1e-5),
    Agrees("brax", "over mapped devices", brax_over_devices, 1e-5),
)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.peer}: {row.what}")
def test_a_peer_agrees_where_it_is_right(row):
    assert row.check() < row.bound


def test_sbx_loses_eps_where_the_variance_is_near_it():
    # It normalizes with `v / r^2 + eps` instead of `(v + eps) / r^2`.
    width = 0.03  # a variance of 1.7 eps
    (y, dx), _ = of_sbx(width)
    (wanted, exact_dx), (found, _) = exact(width), ours(width)
    assert off(found, (wanted, exact_dx)) < 3e-6
    assert off(y, wanted) > 0.05
    assert off(dx, exact_dx) > 0.05


@pytest.mark.parametrize("steps", [0, 100_000])
def test_sbx_has_no_gradient_in_a_constant_channel(steps):
    # 0 * inf through sqrt(v), even in the warm-up.
    layer = peers.sbx()(use_running_average=False)
    params, stats, x, _ = arrays()
    x = x.at[:, 2].set(1.0)
    state = {**stats, "r_max": 3, "d_max": 5, "steps": steps}

    def f(x: Any) -> Any:
        y, _ = layer.apply({"params": params, "batch_stats": state}, x, mutable=["batch_stats"])
        return jnp.sum(jnp.sin(y))

    assert np.isnan(jax.grad(f)(x)[:, 2]).all()
    told = {"eps": EPS, "mutable": True, "using": Renorm(3.0, 5.0)}
    found = jax.grad(lambda x: jnp.sum(jnp.sin(bnjax.batch_norm(params, stats, x, **told)[0])))(x)
    assert np.isfinite(found).all()


def test_a_state_of_sbx_loads_after_renaming_its_count():
    theirs = peers.sbx()(use_running_average=False, warmup_steps=3)
    params, _, x, _ = arrays(100.0)
    variables: Any = theirs.init(KEY, x) | {"params": params}
    for _ in range(2):
        _, updates = theirs.apply(variables, x, mutable=["batch_stats"])
        variables = {**variables, **updates}
    stats = variables["batch_stats"]
    held = {"mean": stats["mean"], "var": stats["var"], "count": jnp.int32(stats["steps"])}
    layer = bnjax.linen.BatchNorm(False, momentum=0.99, epsilon=EPS, using=Renorm.crossq(3))
    mine: Any = {"params": params, "batch_stats": held}
    for number in range(3, 6):  # the warm-up ends, and limits of 3 and 5 begin
        y, updates = theirs.apply(variables, x, mutable=["batch_stats"])
        variables = {**variables, **updates}
        found, moved = layer.apply(mine, x, mutable=["batch_stats"])
        mine = {**mine, **moved}
        assert_close(found, y, rtol=1e-5)
        assert int(mine["batch_stats"]["count"]) == number
        for name in ("mean", "var"):
            assert_close(mine["batch_stats"][name], variables["batch_stats"][name], rtol=1e-6)


def test_keras_tracks_a_deviation_whose_square_is_not_the_variance():
    keras = peers.keras()
    rng = np.random.default_rng(0)
    layer = keras.layers.BatchNormalization(epsilon=EPS, momentum=0.9, renorm=True)
    _, stats = bnjax.init(5)
    for _ in range(200):
        x = jnp.asarray(rng.normal(0, 2, (8, 5)), jnp.float32)
        layer(x, training=True)
        _, stats = bnjax.batch_norm({}, stats, x, mutable=True, using=Renorm())
    assert float(np.mean(layer.moving_variance)) < 3.6  # where it is 4
    assert abs(float(np.mean(stats["var"])) - 4) < 0.4


def test_brax_truncates_weights_that_are_fractions():
    xs = observations()
    halves = [jnp.full(32, 0.5)] * len(xs)
    some = [jnp.where(jnp.arange(32) < 31, 0.999, 0.0)] * len(xs)
    assert float(np.abs(of_brax(xs, some).mean - 3).max()) > 0.02  # 30 counted for 30.97
    assert int(of_brax(xs, halves).count.lo) == 16 * 50


def test_brax_stalls_after_many_values():
    statistics = peers.brax()
    many, level = 2**24, 1e4
    xs = jnp.asarray(np.random.default_rng(0).normal(level + 3, 1, (4096, 64, 1)), jnp.float32)
    mean, _ = measure(xs, (0, 1))
    share = xs.size / (many + xs.size)
    state = statistics.init_state(jnp.zeros(1))
    count = state.count + many
    state = state.replace(
        count=count, mean=jnp.full(1, level), summed_variance=jnp.full(1, float(many))
    )
    state, _ = jax.lax.scan(lambda state, x: (statistics.update(state, x), None), state, xs)
    _, stats = bnjax.init(1, momentum="pooled")
    stats |= {"values": jnp.full(1, float(many)), "mean": jnp.full(1, level)}
    told: Any = {"mutable": True, "momentum": "pooled"}
    stats, _ = jax.lax.scan(
        lambda stats, x: (bnjax.batch_norm({}, stats, x, **told)[1], None), stats, xs
    )
    wanted = share * (mean - level)
    assert float(state.mean[0]) == level
    moved = np.asarray(stats["mean"], np.float64) - level + np.asarray(stats["mean_low"])
    np.testing.assert_allclose(moved, wanted, rtol=1e-5)


def main() -> None:
    """Print how far each peer is off."""
    print("peer | what is compared | largest difference, relative")
    for row in ROWS:
        here = importlib.util.find_spec(row.peer) is not None
        print(row.peer, row.what, f"{row.check():.1e}" if here else "-", sep=" | ", flush=True)


if __name__ == "__main__":
    main()
