"""What moves: momenta as numbers, functions of the count, and all values ever seen as one set."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import bnjax
from bnjax.policies import Debiased, Renorm, Running
from tests.support.cases import NC, NHWC, Case
from tests.support.oracle import assert_close, measure
from tests.support.ways import WAYS, core, each_of, forward, make, spread

pytestmark = pytest.mark.quick_compile

KEY = jax.random.key(0)


def batches(count: int, case: Case = NC) -> list[np.ndarray]:
    return [case.values(np.random.default_rng(seed), mean=seed) for seed in range(count)]


def start(momentum: Any, case: Case = NC, **options: Any) -> tuple[Any, Any]:
    return bnjax.init(case.channels, momentum=momentum, **options)


def after(momentum: Any, xs: Any, **settings: Any) -> dict[str, Any]:
    """The statistics after these batches."""
    params, stats = start(momentum)

    @jax.jit
    def step(stats: Any, x: Any, mask: Any) -> Any:
        told = {"mutable": True, "momentum": momentum, "mask": mask, **settings}
        return bnjax.batch_norm(params, stats, x, **told)[1]

    for x in xs:
        x, mask = x if isinstance(x, tuple) else (x, None)
        stats = step(stats, x, mask)
    return jax.device_get(stats)


def averaged(weights: Any, xs: Any) -> tuple[np.ndarray, np.ndarray]:
    """Mean and unbiased variance, moved by these weights of each new batch, in float64."""
    mean, var = np.zeros(5), np.ones(5)
    for weight, x in zip(weights, xs, strict=True):
        m, v = measure(x, (0,))
        mean = (1 - weight) * mean + weight * m
        var = (1 - weight) * var + weight * v * len(x) / (len(x) - 1)
    return mean, var


def test_a_function_gets_the_number_of_training_steps_before():
    schedule = optax.linear_schedule(0.5, 0.1, 4)
    xs = batches(6)
    found = after(schedule, xs)
    mean, var = averaged([0.5, 0.4, 0.3, 0.2, 0.1, 0.1], xs)
    assert_close(found, {"mean": mean, "var": var, "count": 6}, rtol=1e-6)


def test_a_start_without_bias_is_the_average_and_then_the_decaying_one():
    xs = batches(8)
    found = after(Debiased(0.2), xs)
    mean, var = averaged([1, 1 / 2, 1 / 3, 1 / 4, 0.2, 0.2, 0.2, 0.2], xs)
    assert_close(found, {"mean": mean, "var": var, "count": 8}, rtol=1e-6)
    early, cumulative = after(Debiased(0.2), xs[:5]), after(None, xs[:5])
    assert_close(early, cumulative, rtol=1e-6)
    assert_close(after(Debiased(0.2), xs[:1])["mean"], xs[0].mean(0), rtol=1e-6)


@pytest.mark.parametrize("momentum", [0.3, jnp.float32(0.3), np.float32(0.3), lambda count: 0.3])
def test_a_momentum_of_any_kind_is_a_number(momentum):
    xs = batches(3)
    found = after(momentum, xs)
    found.pop("count", None)
    mean, var = averaged([0.3] * 3, xs)
    assert_close(found, {"mean": mean, "var": var}, rtol=1e-6)


def test_a_traced_momentum_compiles_once():
    params, stats = start(0.1)
    traces = []

    @jax.jit
    def step(stats, x, momentum):
        traces.append(None)
        return bnjax.batch_norm(params, stats, x, mutable=True, momentum=momentum)[1]

    weights, xs = [0.5, 0.25, 0.125], batches(3)
    for weight, x in zip(weights, xs, strict=True):
        stats = step(stats, x, weight)
    assert len(traces) == 1
    mean, var = averaged(weights, xs)
    assert_close(stats, {"mean": mean, "var": var}, rtol=1e-6)


LAYERS = {
    "linen": lambda momentum: bnjax.BatchNorm1d(5, momentum=momentum),
    "linen drop-in": lambda momentum: bnjax.linen.BatchNorm(
        use_running_average=False, momentum=momentum
    ),
    "nnx": lambda momentum: bnjax.nnx.BatchNorm1d(5, momentum=momentum, rngs=nnx.Rngs(0)),
    "nnx drop-in": lambda momentum: bnjax.nnx.BatchNorm(5, momentum=momentum, rngs=nnx.Rngs(0)),
}


def stats_of_layer(layer: Any, xs: Any) -> dict[str, Any]:
    if isinstance(layer, nnx.Module):
        for x in xs:
            layer(jnp.asarray(x))
        return {n: v[...] for n, v in vars(layer).items() if isinstance(v, nnx.BatchStat)}
    variables: Any = layer.init(KEY, xs[0])
    for x in xs:
        variables = {**variables, **layer.apply(variables, x, mutable=["batch_stats"])[1]}
    return variables["batch_stats"]


@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, kind) for name in LAYERS for kind in ("schedule", "debiased", "pooled")]
    + [("linen", "none"), ("nnx", "none")],
)
def test_each_layer_takes_each_momentum_in_its_own_convention(name, kind):
    flax, xs = "drop-in" in name, batches(4)
    of_new = {
        "schedule": optax.linear_schedule(0.4, 0.1, 3),
        "debiased": Debiased(0.4),
        "none": None,
        "pooled": "pooled",
    }[kind]
    told: Any = of_new
    if flax and kind == "schedule":
        told = optax.linear_schedule(0.6, 0.9, 3)
    if flax and kind == "debiased":
        told = Debiased(0.6)
    found = stats_of_layer(LAYERS[name](told), xs)
    wanted = after(of_new, xs, correction=0 if flax else 1)
    assert_close(dict(found), wanted, rtol=1e-6)


def error(stats: Any, mean: Any, var: Any) -> float:
    """How far statistics are from others, in deviations and in parts of the variance."""
    exact = {name: np.asarray(value, np.float64) for name, value in stats.items()}
    far = np.abs(exact["mean"] + exact["mean_low"] - mean) / np.sqrt(var)
    return float(max(far.max(), np.abs((exact["var"] + exact["var_low"]) / var - 1).max()))


def run_of(key: jax.Array, count: int, shape: tuple[int, ...], mean: float) -> Any:
    """The statistics of random batches pooled, and the sums that give those in float64."""
    params, stats = bnjax.init(shape[-1], momentum="pooled")

    def step(carry: Any, key: jax.Array) -> tuple[Any, None]:
        stats, total, squares, number = carry
        level, width, noise = jax.random.split(key, 3)
        x = jax.random.normal(noise, shape) * jnp.exp(jax.random.normal(width, shape[-1:]))
        x = (x + 3 * jax.random.normal(level, shape[-1:]) + mean).astype(jnp.float32)
        stats = bnjax.batch_norm(params, stats, x, mutable=True, momentum="pooled")[1]
        apart = x.astype(jnp.float64) - mean
        axes = tuple(range(len(shape) - 1))
        sums = total + apart.sum(axes), squares + (apart**2).sum(axes)
        return (stats, *sums, number + apart[..., 0].size), None

    zeros = jnp.zeros(shape[-1], jnp.float64)
    start = jax.tree.map(jnp.asarray, stats), zeros, zeros, jnp.zeros((), jnp.int64)
    return jax.lax.scan(step, start, jax.random.split(key, count))[0]


@pytest.mark.usefixtures("x64")
@pytest.mark.quick_compile(False)
@pytest.mark.parametrize("mean", [0.0, 1e4])
@pytest.mark.parametrize(
    ("count", "shape"),
    [pytest.param(10_000, (8, 4), id="10,000 batches"), pytest.param(40, (2**19, 1), id="2^24")],
)
def test_all_values_pooled_are_those_of_float64(mean, count, shape):
    run = jax.jit(run_of, static_argnums=(1, 2, 3))
    stats, total, squares, number = jax.device_get(run(KEY, count, shape, mean))
    assert all(stats[name].dtype == np.float32 for name in stats)
    apart = total / number
    var = squares / number - apart**2
    assert error(stats, mean + apart, var) < 1e-6
    assert int(stats["values"][0]) + int(stats["values_low"][0]) == number
    # Rounded to float32 once, as an evaluation uses them.
    np.testing.assert_array_less(
        abs(stats["mean"] - (mean + apart)), abs(mean + apart) * 1e-7 + 1e-6
    )


def test_past_2_to_the_24_a_single_value_still_counts():
    params, stats = start("pooled")
    stats |= {"values": jnp.full(5, 2.0**24), "mean": jnp.full(5, 3.0), "var": jnp.full(5, 2.0)}

    def step(stats: Any, x: Any) -> tuple[Any, None]:
        settings = {"mutable": True, "momentum": "pooled", "correction": 0}
        return bnjax.batch_norm(params, stats, x, **settings)[1], None

    xs = np.random.default_rng(0).normal(50, 9, (3000, 1, 5)).astype(np.float32)
    found = jax.device_get(jax.jit(lambda stats: jax.lax.scan(step, stats, xs)[0])(stats))
    n, m = 2.0**24, len(xs)
    mean, var = measure(xs, (0, 1))
    share = m / (n + m)
    pooled = (1 - share) * 2 + share * var + share * (1 - share) * (mean - 3) ** 2
    assert error(found, 3 + share * (mean - 3), pooled) < 1e-8
    np.testing.assert_array_equal(found["values"].astype(np.float64) + found["values_low"], n + m)


def test_pooling_counts_the_values_of_each_channel_that_a_mask_shows():
    rng = np.random.default_rng(0)
    masks = [rng.random(NC.shape) < p for p in (0.5, 0.0, 0.9, 0.2)]
    xs = batches(4)
    found = after("pooled", list(zip(xs, masks, strict=True)))
    everything, seen = np.concatenate(xs), np.concatenate(masks)
    mean, var = measure(everything, (0,), seen)
    assert error(found, mean, var) < 1e-6
    np.testing.assert_array_equal(found["values"], seen.sum(0))


def test_pooling_leaves_a_channel_alone_whose_batch_is_no_number():
    xs = batches(3)
    broken = xs[1].copy()
    broken[2, 3], broken[4, 1] = np.nan, np.inf
    found, wanted, without = (
        after("pooled", each) for each in ([xs[0], broken, xs[2]], xs, [xs[0], xs[2]])
    )
    kept = np.isin(np.arange(5), (1, 3))
    expected = {name: np.where(kept, without[name], wanted[name]) for name in wanted}
    assert_close(found, expected, rtol=1e-7)


def test_the_first_batch_is_all_there_is():
    (x,) = batches(1)
    found = after("pooled", [x + 1e4])
    assert error(found, *measure(x + np.float32(1e4), (0,))) < 1e-6
    again = after("pooled", [x + 1e4] * 50)
    assert error(again, *measure(x + np.float32(1e4), (0,))) < 1e-6


@pytest.mark.parametrize("size", [1, 3, 8])
def test_pooling_of_virtual_batches_is_that_of_the_whole_batch(size):
    xs = batches(3)
    found = after("pooled", xs, virtual_batch_size=size, correction=0)
    assert error(found, *measure(np.concatenate(xs), (0,))) < 1e-6
    np.testing.assert_array_equal(found["values"], [24] * 5)


@each_of(WAYS)
@pytest.mark.parametrize("size", [None, 2])
def test_pooling_counts_the_values_of_all_devices(way, size):
    data = make()
    _, held = bnjax.init(5, momentum="pooled")
    data = data._replace(batch_stats=jax.tree.map(np.asarray, held))
    settings = {"momentum": "pooled", "virtual_batch_size": size}
    found = spread(way, way.compile(forward(core(way.axis_name, **settings))), data).batch_stats
    mask = np.broadcast_to(data.mask, data.x.shape)
    assert error(found, *measure(data.x, (0, 1), mask)) < 1e-6
    np.testing.assert_array_equal(found["values"], mask.sum((0, 1)))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_pooled_in_float32(dtype):
    xs = [jnp.asarray(x, dtype) for x in batches(4)]
    found = after("pooled", xs)
    assert {value.dtype for value in found.values()} == {np.dtype("float32")}
    assert error(found, *measure(np.concatenate(xs).astype(np.float64), (0,))) < 1e-6


@pytest.mark.usefixtures("x64")
def test_float64_and_complex_values_are_pooled_in_their_own_precision():
    params, stats = bnjax.init(5, momentum="pooled", dtype=jnp.complex128)
    parts = np.concatenate(batches(6)).astype(np.float64).reshape(6, 8, 5)
    xs = parts[::2] * 1.25 + 1j * parts[1::2]
    for x in xs:
        stats = bnjax.batch_norm(params, stats, x, mutable=True, momentum="pooled")[1]
    mean, var = measure(xs, (0, 1))
    np.testing.assert_allclose(stats["mean"] + stats["mean_low"], mean, rtol=1e-14)
    np.testing.assert_allclose(stats["var"] + stats["var_low"], var, rtol=1e-14)


def test_observations_are_normalized_by_all_that_were_seen_so_far():
    layer = bnjax.BatchNorm1d(5, affine=False, momentum="pooled", using=Running(updated=True))
    xs = batches(4)
    variables: Any = layer.init(KEY, xs[0])
    y = None
    for number, x in enumerate(xs, 1):
        y, updates = layer.apply(variables, x, mutable=["batch_stats"])
        variables = {**variables, **updates}
        mean, var = measure(np.concatenate(xs[:number]), (0,))
        assert_close(y, (x - mean) / np.sqrt(var + 1e-5), rtol=1e-6)
    assert_close(layer.apply(variables, xs[-1]), y, rtol=1e-6)


class Net(nn.Module):
    momentum: Any

    @nn.compact
    def __call__(self, x):
        norm = bnjax.BatchNorm1d(momentum=self.momentum, using=Renorm.crossq(2), name="norm")
        return nn.Dense(1)(norm(x))[:, 0]


@pytest.mark.parametrize("momentum", [None, "pooled", Debiased(0.1)], ids=str)
def test_a_rejected_step_advances_nothing(momentum):
    step = bnjax.training.train_step(lambda y, batch: (y - batch["y"]) ** 2, donate=False)
    good = {"x": batches(1)[0], "y": np.ones(8, np.float32)}
    bad = {**good, "y": np.full(8, np.nan, np.float32)}
    state = bnjax.training.init_state(Net(momentum), optax.sgd(0.1), KEY, good["x"])
    state, _ = step(state, good)
    kept, metrics = step(state, bad)
    assert not metrics["accepted"]
    assert_close(kept.batch_stats, state.batch_stats)
    assert int(kept.batch_stats["norm"]["count"]) == 1
    assert int(step(kept, good)[0].batch_stats["norm"]["count"]) == 2


def test_recalibrate_gives_all_values_of_the_data():
    layer = bnjax.BatchNorm1d(5, momentum="pooled")
    xs = batches(3)
    variables = bnjax.recalibrate(layer, layer.init(KEY, xs[0]), xs)
    assert_close(variables["batch_stats"], after("pooled", xs), rtol=1e-6, atol=1e-5)
    going_on = layer.apply(variables, xs[0], mutable=["batch_stats"])[1]["batch_stats"]
    assert error(going_on, *measure(np.concatenate([*xs, xs[0]]), (0,))) < 1e-6


@pytest.mark.parametrize("momentum", [optax.linear_schedule(0.5, 0.1, 4), "pooled", Debiased(0.1)])
@pytest.mark.parametrize("transform", ["vmap", "scan", "remat"])
def test_momenta_go_through_transformations(momentum, transform):
    params, held = start(momentum, NHWC)
    xs = np.stack(batches(3, NHWC))
    apply = functools.partial(bnjax.batch_norm, params, mutable=True, momentum=momentum)
    one_by_one = [held]
    for x in xs:
        one_by_one.append(apply(one_by_one[-1], x)[1])
    if transform == "vmap":
        many = jax.tree.map(lambda *leaves: jnp.stack(leaves), *one_by_one[:3])
        found = jax.jit(jax.vmap(apply))(many, xs)[1]
        wanted = jax.tree.map(lambda *leaves: jnp.stack(leaves), *one_by_one[1:])
    elif transform == "scan":
        found, _ = jax.lax.scan(lambda stats, x: (apply(stats, x)[1], None), held, xs)
        wanted = one_by_one[-1]
    else:
        found, wanted = jax.checkpoint(apply)(held, xs[0])[1], one_by_one[1]
    assert_close(found, wanted, rtol=1e-6, atol=1e-6)  # the low-order digits, too
