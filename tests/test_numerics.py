"""How exact float32 is, against float64: at any mean, in any layout, at any time, anywhere."""

import contextlib
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bnjax
from bnjax.core import sums
from tests.support import oracle
from tests.support.cases import Case, Outcome, as_on_accelerators, run
from tests.support.oracle import assert_close

LAYOUTS = (
    Case("NC", (4096, 64), -1, bnjax.BatchNorm1d),
    Case("NLC", (64, 64, 64), -1, bnjax.BatchNorm1d),
    Case("NHWC", (16, 16, 16, 64), -1, bnjax.BatchNorm2d),
    Case("NCHW", (16, 64, 16, 16), 1, bnjax.BatchNorm2d),
)
MEANS = (0.0, 1e2, 1e3, 1e4, 1e5)
# Fewer than 4,096 values, one channel, channels first, sizes that no number divides.
SMALL = (
    (32, 10, 10, 1),
    (8, 3, 12, 12),
    (8, 16, 16, 1),
    (32, 10, 10, 4),
    (64, 2, 7, 7),
    (3, 1, 31, 37),
    (31, 37, 1),
    (1000, 7),
    (4093, 7),
    (20011, 1),
)
NEW = bnjax.init(64)[1]
each_layout = pytest.mark.parametrize("case", LAYOUTS, ids=lambda case: case.name)
each_mean = pytest.mark.parametrize("mean", MEANS)


@pytest.fixture(autouse=True, scope="module", params=["cpu", "cuda", "default"])
def platform(request):
    """All tests run the program for CPUs, and here, too, those for GPUs and for other platforms."""
    with pytest.MonkeyPatch.context() as patch:
        if (
            request.param == "cuda"
        ):  # whose sums are trees: XLA's for a CPU, one value after the other
            patch.setattr("bnjax.core.sums._CHUNKS", 16)
            tree = sums._in_one_reading
            patch.setattr(
                "bnjax.core.origins.at_once",
                lambda v, axes: tree(*v, reduced=axes, sources=1, devices=1),
            )
        jax.clear_caches()
        on_cpu = request.param == "cpu"
        with contextlib.nullcontext() if on_cpu else as_on_accelerators(request.param):
            yield
    jax.clear_caches()


def assert_exact(found: Outcome, expected: Outcome) -> None:
    """The bounds: 3e-6 on the output, 1e-5 of its largest entry on each gradient."""
    assert_close(found.y, expected.y, atol=3e-6)
    assert_close((found.dx, found.dparams), (expected.dx, expected.dparams), rtol=1e-5)


@each_layout
@each_mean
def test_the_first_step_is_exact_at_any_mean(rng, case, mean):
    x, dy = case.values(rng, mean, std=1.0), case.values(rng)
    settings = {"mutable": True, "axis": case.axis}
    found = run(*bnjax.init(64), x, dy, **settings)
    expected = oracle.batch_norm(*bnjax.init(64), x, dy, **settings)
    assert_exact(found, expected)
    assert_close(found.batch_stats, expected.batch_stats, rtol=2e-7, atol=2e-8)


@each_layout
@each_mean
@pytest.mark.parametrize("by_channel", [False, True], ids=["rows", "by channel"])
def test_a_masked_step_is_exact_at_any_mean(rng, case, mean, by_channel):
    params, x, dy = case.params(rng), case.values(rng, mean, std=1.0), case.values(rng)
    mask = rng.random(case.shape) < 0.5 if by_channel else case.row_mask(case.shape[0] // 2)
    found = run(params, NEW, x, dy, mutable=True, axis=case.axis, mask=mask)
    expected = oracle.batch_norm(params, NEW, x, dy, mutable=True, axis=case.axis, mask=mask)
    largest = np.max(np.abs(params["scale"])), np.max(np.abs(expected.y))
    assert_close(found.y, expected.y, atol=3e-6 * max(largest))
    assert_close((found.dx, found.dparams), (expected.dx, expected.dparams), rtol=1e-5)


@pytest.mark.parametrize("shape", SMALL, ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
def test_small_arrays_are_exact_at_any_mean(rng, shape, masked):
    case = Case("small", shape, 1 if shape[1] < 6 else -1, bnjax.BatchNorm2d)
    params, stats = bnjax.init(case.channels)
    mask = rng.random(shape) < 0.7 if masked else None
    noise, dy = case.values(rng, 0, 1.0), case.values(rng)
    for mean in (0.0, 1e3, 5.34e4, 1.23e6, 3.51e6, 1e7):
        for std in (1, 10):
            x = (mean + std * noise.astype(np.float64)).astype(np.float32)
            settings = {"mutable": True, "axis": case.axis, "mask": mask}
            found = run(params, stats, x, dy, **settings)
            expected = oracle.batch_norm(params, stats, x, dy, **settings)
            largest = max(1.0, np.max(np.abs(expected.y)) / 5)
            assert_close(found.y, expected.y, atol=3e-6 * largest)
            assert_close(found.dx, expected.dx, rtol=1e-5)


def lying(how: str, rng: np.random.Generator) -> np.ndarray:
    """Values of images that lie as no sample of them would have it."""
    x, example = rng.standard_normal((32, 14, 14, 8)), np.arange(32)[:, None, None, None]
    inside = np.pad(np.ones((10, 10), bool), 2)[None, :, :, None]
    return {
        "a border of zeros": lambda: np.where(inside, x + 1000, 0),
        "half of the examples far": lambda: x + 1e5 * (example < 16),
        "one example far": lambda: x + 1e6 * (example == 17),
        "sorted": lambda: 100 + np.sort(x.reshape(-1, 8), 0).reshape(x.shape),
        "sparse": lambda: np.where(rng.random(x.shape) < 0.01, x + 50, 0),
        "heavy tails": lambda: np.exp(3 * x),
    }[how]().astype(np.float32)


LYING = "a border of zeros", "half of the examples far", "one example far", "sorted", "sparse"


@pytest.mark.parametrize("channels_last", [True, False], ids=["NHWC", "NCHW"])
@pytest.mark.parametrize("how", [*LYING, "heavy tails"])
def test_it_is_exact_however_the_values_lie(rng, how, channels_last):
    axis = -1 if channels_last else 1
    x = np.moveaxis(lying(how, rng), -1, axis)
    params, stats = bnjax.init(8)
    y, _ = jax.jit(lambda x: bnjax.batch_norm(params, stats, x, mutable=True, axis=axis))(x)
    expected = oracle.batch_norm(params, stats, x, x, mutable=True, axis=axis).y
    assert_close(
        y / np.maximum(1, np.abs(expected) / 5),
        expected / np.maximum(1, np.abs(expected) / 5),
        atol=3e-6,
    )


@pytest.mark.parametrize("mean", [0.0, 1e5])
@each_layout
def test_a_batch_that_is_split_over_devices_is_as_exact(rng, case, mean):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    x, dy = (jax.device_put(case.values(rng, m, std=1.0), split) for m in (mean, 0))
    settings = {"mutable": True, "axis": case.axis}
    found = run(*bnjax.init(64), x, dy, **settings)
    assert_exact(found, oracle.batch_norm(*bnjax.init(64), x, dy, **settings))


@jax.jit
def after_all(stats, batches):
    def step(stats, batch):
        return bnjax.batch_norm({}, stats, batch, mutable=True)[1], None

    return jax.lax.scan(step, stats, batches)[0]


@each_mean
def test_the_thousandth_step_is_as_exact_as_the_first(rng, mean):
    case = LAYOUTS[0]
    batches = jax.random.normal(jax.random.key(0), (1000, 32, 64)) + mean
    stats = after_all(NEW, batches)
    np.testing.assert_allclose(stats["mean"], mean, atol=0.3)
    x, dy = case.values(rng, mean, std=1.0), case.values(rng)
    params, _ = bnjax.init(64)
    found = run(params, stats, x, dy, mutable=True)
    assert_exact(found, oracle.batch_norm(params, stats, x, dy, mutable=True))


@each_layout
@pytest.mark.parametrize("mean", [-1e5, 1e30, np.inf, np.nan])
def test_the_running_statistics_have_no_say_in_training(rng, case, mean):
    params, x, dy = case.params(rng), case.values(rng, 1e3), case.values(rng)
    anywhere = {"mean": np.full(64, mean), "var": np.full(64, 1e-20)}
    first = run(params, NEW, x, dy, mutable=True, axis=case.axis)
    later = run(params, anywhere, x, dy, mutable=True, axis=case.axis)
    assert_close(later._replace(batch_stats={}), first._replace(batch_stats={}))


@each_mean
def test_evaluation_is_exact_at_any_mean(rng, mean):
    case = LAYOUTS[2]
    params, x, dy = case.params(rng), case.values(rng, mean), case.values(rng)
    stats = {"mean": np.full(64, mean), "var": np.ones(64)}
    found = run(params, stats, x, dy, mutable=False)
    assert_close(found, oracle.batch_norm(params, stats, x, dy, mutable=False), rtol=1e-6)


CONSTANTS = (0.0, 1.0, 1 / 3, 12345.678, 16777217.0, 1e8, -3e-5, 1e-30, 1e-42, -1e30, 3e38)
SIZES = (2, 3, 7, 100, 4096)


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("size", SIZES)
def test_constant_channels_give_exactly_the_bias_and_a_finite_gradient(rng, size, masked):
    bias = np.linspace(-7.1, 3.3, len(CONSTANTS)).astype(np.float32)
    params = {"scale": 1 + np.abs(bias), "bias": bias}
    x = np.broadcast_to(np.array(CONSTANTS, np.float32), (size, len(CONSTANTS)))
    mask = np.arange(size)[:, None] < max(2, size - 1) if masked else None
    dy = rng.standard_normal(x.shape).astype(np.float32)
    found = run(params, {}, x, dy, mutable=True, mask=mask)
    assert_close(found.y, np.broadcast_to(bias, x.shape))
    expected = oracle.batch_norm(params, {}, x * 0, dy, mutable=True, mask=mask)
    assert_close((found.dx, found.dparams), (expected.dx, expected.dparams), rtol=1e-5)


@each_layout
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
def test_constant_channels_give_exactly_the_bias_in_every_layout(case, masked):
    bias, x = jnp.arange(64.0), jnp.full(case.shape, 12345.678)
    mask = case.row_mask(case.shape[0] - 1) if masked else None
    y, stats = bnjax.batch_norm(
        {"bias": bias}, NEW, x, mutable=True, axis=case.axis, mask=mask, momentum=1.0
    )
    assert_close(y, np.broadcast_to(np.expand_dims(bias, case.reduced), case.shape))
    assert_close(stats, {"mean": np.full(64, np.float32(12345.678)), "var": np.zeros(64)})


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("constant", [0.1, 300.0, 6e4, 6e-8])
def test_constant_channels_give_exactly_the_bias_in_half_precision(dtype, constant):
    x = jnp.full((1000, 2), constant, dtype)
    bias = jnp.array([0.3, -7.1], dtype)
    y, _ = bnjax.batch_norm({"bias": bias}, {}, x, mutable=True)
    assert_close(y, np.broadcast_to(bias, x.shape))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("mean", [0.0, 10.0, 300.0])
def test_half_precision_loses_no_more_than_its_own_rounding(rng, dtype, mean):
    x = jnp.asarray(LAYOUTS[2].values(rng, mean, std=1.0)).astype(dtype)
    y, stats = bnjax.batch_norm({}, NEW, x, mutable=True, momentum=1.0)
    expected = oracle.batch_norm({}, NEW, x, x, mutable=True, momentum=1.0)
    assert_close(y, expected.y, atol=float(2 * jnp.finfo(dtype).eps))
    assert_close(stats, expected.batch_stats, rtol=3e-7, atol=2e-7)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("mean", [0.0, 100.0])
def test_half_precision_input_gives_parameters_the_gradients_of_float32(rng, dtype, mean):
    case = LAYOUTS[0]
    params, x, dy = case.params(rng), case.values(rng, mean, std=1.0), case.values(rng)
    x = jnp.asarray(x).astype(dtype)
    found = run(params, {}, x, dy, mutable=True)
    # Summing y * dy gives y a cotangent of its own dtype.
    rounded = jnp.asarray(dy).astype(dtype)
    expected = oracle.batch_norm(params, {}, x, rounded, mutable=True)
    assert_close(found.dparams, expected.dparams, rtol=1e-5)
    assert_close(found.dx, expected.dx, rtol=float(jnp.finfo(dtype).eps))


@pytest.mark.parametrize("mean", [0.0, 1e5])
@pytest.mark.parametrize("apart", [0, 1, 114, 341])
def test_an_outlier_costs_no_digits_wherever_it_stands(rng, mean, apart):
    # Channel i has its outlier in row i, and a second one some rows further on.
    at = np.eye(1024, dtype=bool)
    x = (rng.standard_normal((1024, 1024)) + mean).astype(np.float32)
    x[at | np.roll(at, apart, 0)] += np.float32(1e6)
    y, _ = bnjax.batch_norm({}, {}, x, mutable=True)
    assert_close(y, oracle.batch_norm({}, {}, x, x, mutable=True).y, rtol=4e-7)


def test_three_outliers_among_nine_equidistant_rows_cost_no_digits(rng):
    # Where a sample of nine rows would look first.
    rows = np.arange(1, 18, 2) * 4096 // 18
    places = np.array(list(itertools.combinations(rows, 3)))
    x = rng.standard_normal((4096, len(places))).astype(np.float32)
    x[places.T, np.arange(len(places))] = 1e7
    y, _ = bnjax.batch_norm({}, {}, x, mutable=True)
    # To an outlier, up to fifteen rows are added one by one.
    assert_close(y, oracle.batch_norm({}, {}, x, x, mutable=True).y, rtol=5e-7)


@pytest.mark.parametrize("std", [1e-30, 1e-15, 1e-3, 1e3, 1e15])
def test_values_of_any_size_are_normalized_as_float64_does(rng, std):
    case = LAYOUTS[1]
    x, dy = case.values(rng, mean=std, std=std), case.values(rng)
    found = run({}, {}, x, dy, mutable=True)
    expected = oracle.batch_norm({}, {}, x, dy, mutable=True)
    assert_close((found.y, found.dx), (expected.y, expected.dx), rtol=2e-6)


@pytest.mark.parametrize("period", [2, 3, 9, 18])
def test_values_that_alternate_between_two_levels_cost_no_digits(period):
    x = jnp.where(jnp.arange(4096)[:, None] % period, 1e5, -1e5)
    y, _ = bnjax.batch_norm({}, {}, x, mutable=True)
    assert_close(y, oracle.batch_norm({}, {}, x, x, mutable=True).y, rtol=1e-6)
