"""`init` and `batch_norm` against the float64 oracle, and what they promise beyond it."""

import copy
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bnjax
from tests.support import oracle
from tests.support.cases import NC, NCHW, NHWC, each_case, each_variant, outcome, run
from tests.support.oracle import assert_close

SETTINGS = (
    pytest.param({}, id="defaults"),
    pytest.param({"correction": 0}, id="biased"),
    pytest.param({"momentum": 0.0}, id="momentum 0"),
    pytest.param({"momentum": 1.0, "eps": 1e-3}, id="momentum 1"),
    pytest.param({"momentum": None}, id="cumulative"),
)
HALF = ("bfloat16", "float16")


def data(case, rng):
    """Parameters, running statistics, input and cotangent."""
    return case.params(rng), case.batch_stats(rng), case.values(rng), case.values(rng)


@each_case
@pytest.mark.parametrize("mutable", [True, False], ids=["train", "eval"])
def test_every_layout_agrees_with_the_oracle(rng, case, mutable):
    arrays = data(case, rng)
    settings = {"mutable": mutable, "axis": case.axis}
    expected = oracle.batch_norm(*arrays, **settings)
    assert_close(run(*arrays, **settings), expected, rtol=5e-6, atol=2e-6)


@pytest.mark.parametrize("case", [NC, NCHW], ids=lambda case: case.name)
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
def test_every_setting_agrees_with_the_oracle(rng, case, settings, masked):
    params, stats, x, dy = data(case, rng)
    if settings.get("momentum", 0) is None:
        stats["count"] = np.int32(3)
    settings = {**settings, "mutable": True, "axis": case.axis}
    settings["mask"] = case.row_mask(case.shape[0] // 2) if masked else None
    expected = oracle.batch_norm(params, stats, x, dy, **settings)
    assert_close(run(params, stats, x, dy, **settings), expected, rtol=5e-6, atol=2e-6)


@pytest.mark.parametrize("correction", [0, 1])
@pytest.mark.parametrize("shape", [(4, 1, 1, 1), (1, 3, 1, 1), (4, 3, 5, 1), (4, 3, 5, 6), (5, 6)])
def test_every_mask_agrees_with_the_oracle(rng, shape, correction):
    case = NHWC
    mask = rng.random(shape) < 0.6
    mask[:2] = True
    arrays, settings = data(case, rng), {"mutable": True, "correction": correction, "mask": mask}
    expected = oracle.batch_norm(*arrays, **settings)
    assert_close(run(*arrays, **settings), expected, rtol=5e-6, atol=2e-6)


@pytest.mark.quick_compile
@each_variant
@pytest.mark.parametrize("case", [NC, NCHW], ids=lambda case: case.name)
@pytest.mark.parametrize("kind", ["train", "masked", "eval"])
def test_every_variant_of_a_call_agrees_with_the_oracle(rng, variant, case, kind):
    settings = {"mutable": kind != "eval", "axis": case.axis}
    mask = case.row_mask(case.shape[0] // 2) if kind == "masked" else np.True_

    def everything(params, stats, x, dy, mask):
        def apply(params, x):
            return bnjax.batch_norm(params, stats, x, mask=mask, **settings)

        return outcome(apply, params, x, dy)

    arrays = data(case, rng)
    expected = oracle.batch_norm(*arrays, **settings, mask=mask)
    assert_close(variant(everything)(*arrays, mask), expected, rtol=5e-6, atol=2e-6)


@pytest.mark.parametrize("keys", [(), ("scale",), ("bias",)], ids=str)
@pytest.mark.parametrize("mutable", [True, False])
def test_a_parameter_that_is_left_out_is_one_or_zero(rng, keys, mutable):
    params, stats, x, dy = data(NC, rng)
    params = {key: params[key] for key in keys}
    expected = oracle.batch_norm(params, stats, x, dy, mutable=mutable)
    assert_close(run(params, stats, x, dy, mutable=mutable), expected, rtol=5e-6, atol=2e-6)


@pytest.mark.parametrize("mutable", [True, False])
def test_without_running_statistics_each_batch_is_normalized_by_its_own(rng, mutable):
    params, _, x, dy = data(NC, rng)
    expected = oracle.batch_norm(params, {}, x, dy, mutable=True)
    assert_close(run(params, {}, x, dy, mutable=mutable), expected, rtol=5e-6, atol=2e-6)


def test_the_cumulative_average_is_the_mean_over_all_batches(rng):
    params, stats = bnjax.init(3, momentum=None)
    batches = rng.standard_normal((7, 10, 3)).astype(np.float32)
    for batch in batches:
        _, stats = bnjax.batch_norm(params, stats, batch, mutable=True, momentum=None)
    mean, var = batches.mean(1).mean(0), batches.var(1, ddof=1).mean(0)
    assert_close(stats, {"count": np.int32(7), "mean": mean, "var": var}, rtol=1e-6)


@pytest.mark.usefixtures("x64")
def test_the_cumulative_average_of_float64_is_as_exact_as_float64(rng):
    params, stats = bnjax.init(3, momentum=None, dtype=jnp.float64)
    batches = rng.standard_normal((3, 10, 3))
    for batch in batches:
        _, stats = bnjax.batch_norm(params, stats, batch, mutable=True, momentum=None)
    mean, var = batches.mean(1).mean(0), batches.var(1, ddof=1).mean(0)
    assert_close(stats, {"count": np.int32(3), "mean": mean, "var": var}, rtol=1e-15)


def test_init_gives_flax_names_and_the_identity():
    ones, zeros = np.ones(3), np.zeros(3)
    params, stats = {"scale": ones, "bias": zeros}, {"mean": zeros, "var": ones}
    count = {"count": np.zeros((), np.int32)}
    assert_close(bnjax.init(3), (params, stats))
    assert_close(bnjax.init(3, affine=False), ({}, stats))
    assert_close(bnjax.init(3, track_running_stats=False), (params, {}))
    assert_close(bnjax.init(3, momentum=None), (params, {**stats, **count}))


@each_variant
@pytest.mark.parametrize(
    "settings", [{}, {"momentum": None}, {"affine": False, "dtype": jnp.bfloat16}], ids=str
)
def test_init_is_the_same_in_every_variant(variant, settings):
    found = variant(lambda _: bnjax.init(3, **settings))(np.zeros(()))
    expected = bnjax.init(3, **settings)
    chex.assert_trees_all_equal(found, expected)
    chex.assert_trees_all_equal_shapes_and_dtypes(found, expected)


@pytest.mark.parametrize("dtype", HALF)
def test_init_never_keeps_statistics_in_half_precision(dtype):
    params, stats = bnjax.init(3, dtype=dtype)
    assert {leaf.dtype for leaf in params.values()} == {jnp.dtype(dtype)}
    assert {leaf.dtype for leaf in stats.values()} == {jnp.dtype("float32")}


@pytest.mark.parametrize("kept", ["float32", *HALF])
@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_input_moves_the_statistics_as_float32_does(rng, dtype, kept):
    params, stats = bnjax.init(3)
    stats = jax.tree.map(lambda leaf: leaf.astype(kept), stats)
    x = jnp.asarray(100 + rng.standard_normal((64, 3))).astype(dtype)
    y, moved = bnjax.batch_norm(params, stats, x, mutable=True)
    wide, expected = bnjax.batch_norm(params, stats, x.astype(jnp.float32), mutable=True)
    assert_close(moved, expected)
    assert {leaf.dtype for leaf in moved.values()} == {jnp.dtype("float32")}
    assert y.dtype == jnp.dtype(dtype)
    assert_close(y, wide.astype(dtype))


def test_small_steps_are_not_lost_in_half_precision():
    x = jnp.array([[4.0], [4.5]], jnp.bfloat16)
    params, stats = bnjax.init(1, dtype=jnp.bfloat16)
    for _ in range(2000):
        _, stats = step(params, stats, x)
    assert_close(stats["mean"], np.array([4.25]), rtol=1e-5)


@jax.jit
def step(params, stats, x):
    return bnjax.batch_norm(params, stats, x, mutable=True, momentum=0.01)


@pytest.mark.parametrize("mutable", [True, False])
@pytest.mark.parametrize(
    ("given", "asked", "expected"),
    [
        ("float32", None, "float32"),
        ("bfloat16", None, "bfloat16"),
        ("float16", None, "float16"),
        ("int32", None, "float32"),
        ("bool", None, "float32"),
        ("complex64", None, "complex64"),
        ("float32", "bfloat16", "bfloat16"),
        ("bfloat16", "float32", "float32"),
    ],
)
def test_the_output_has_the_dtype_of_the_input_or_the_one_asked_for(
    given, asked, expected, mutable
):
    x = jnp.array([[1, 2], [3, 5], [0, 0]]).astype(given)
    y, moved = bnjax.batch_norm(*bnjax.init(2), x, mutable=mutable, dtype=asked)
    assert y.dtype == jnp.dtype(expected)
    assert not mutable or moved["var"].dtype == jnp.float32


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("mutable", [True, False])
@pytest.mark.parametrize("kept", ["float32", "float64"])
def test_float64_input_is_normalized_in_float64_whatever_the_statistics_are(rng, kept, mutable):
    params, stats, x, dy = data(NCHW, rng)
    settings = {"mutable": mutable, "axis": 1}
    stats = {key: value.astype(kept) for key, value in stats.items()}
    found = run(params, stats, x.astype(np.float64), dy, **settings)
    expected = oracle.batch_norm(params, stats, x, dy, **settings)
    assert_close(found.y, expected.y, rtol=1e-14)
    assert_close(found.dx, expected.dx, rtol=1e-13)
    assert found.y.dtype == jnp.float64
    assert {leaf.dtype for leaf in found.batch_stats.values()} == {jnp.dtype(kept)}
    assert_close(found.batch_stats, expected.batch_stats, rtol=1e-15 if kept == "float64" else 1e-7)


@pytest.mark.parametrize("mutable", [True, False])
def test_the_callers_trees_are_left_alone(rng, mutable):
    params, stats, x, _ = data(NC, rng)
    before = copy.deepcopy((params, stats, x))
    _, moved = bnjax.batch_norm(params, stats, x, mutable=mutable)
    moved["mean"] = moved["mean"] + 1
    assert_close((params, stats, x), before)


def test_evaluation_returns_the_statistics_as_they_were(rng):
    params, stats, x, _ = data(NC, rng)
    _, same = bnjax.batch_norm(params, stats, x, mutable=False)
    assert_close(same, stats)


def test_channels_over_two_axes_are_normalized_one_by_one(rng):
    x = rng.standard_normal((6, 3, 4, 2)).astype(np.float32)
    stats = {"mean": jnp.zeros((3, 2)), "var": jnp.ones((3, 2))}
    y, moved = bnjax.batch_norm({}, stats, x, mutable=True, axis=(3, 1))
    flat = x.transpose(0, 2, 1, 3).reshape(24, 6)
    expected = oracle.batch_norm(
        {}, {"mean": np.zeros(6), "var": np.ones(6)}, flat, flat, mutable=True
    )
    assert_close(y.transpose(0, 2, 1, 3).reshape(24, 6), expected.y, atol=2e-6)
    assert_close(jax.tree.map(jnp.ravel, moved), expected.batch_stats, rtol=1e-6)


def test_an_input_of_channels_alone_is_normalized_to_the_bias():
    bias, x = jnp.array([3.0, -4.0]), jnp.array([1.0, 2.0])
    y, _ = bnjax.batch_norm({"bias": bias}, {}, x, mutable=True, correction=0)
    assert_close(y, bias)


def test_a_channel_without_a_finite_batch_averages_its_first_one_with_nothing():
    params, stats = bnjax.init(2, momentum=None)
    for batch in ([[1.0, np.nan], [3.0, 5.0]], [[1.0, 10.0], [3.0, 14.0]]):
        _, stats = bnjax.batch_norm(params, stats, np.array(batch), mutable=True, momentum=None)
    expected = {"mean": np.array([2.0, 12.0]), "var": np.array([2.0, 8.0]), "count": np.int32(2)}
    assert_close(stats, expected, rtol=1e-6)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "kind", [float, np.float64, np.array, jnp.asarray, jnp.float32], ids=lambda kind: kind.__name__
)
def test_a_momentum_of_any_kind_leaves_the_statistics_their_dtype(rng, kind):
    x = rng.standard_normal((4, 3)).astype(np.float32)
    y, stats = bnjax.batch_norm(*bnjax.init(3), x, mutable=True, momentum=kind(0.1))
    assert {leaf.dtype for leaf in (y, *stats.values())} == {jnp.dtype("float32")}


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "int4", "uint4"])
@pytest.mark.parametrize("mutable", [True, False])
def test_values_of_few_bits_are_normalized_as_the_same_in_float32(dtype, mutable):
    x = jnp.asarray(np.arange(12).reshape(4, 3) % 7, "float32").astype(dtype)
    y, stats = bnjax.batch_norm(*bnjax.init(3), x, mutable=mutable)
    wide, expected = bnjax.batch_norm(*bnjax.init(3), x.astype("float32"), mutable=mutable)
    assert_close((y, stats), (wide.astype(y.dtype), expected), rtol=1e-6)
    assert y.dtype == (dtype if dtype.startswith("float") else "float32")


def test_complex_statistics_keep_their_dtypes_in_a_scan(rng):
    params, stats = bnjax.init(3, dtype=jnp.complex64)
    batches = jnp.asarray(rng.standard_normal((2, 8, 3)) + 1j, "complex64")

    def step(stats, x):
        return bnjax.batch_norm(params, stats, x, mutable=True)[1], None

    moved, _ = jax.lax.scan(step, stats, batches)
    assert [moved[key].dtype for key in ("mean", "var")] == ["complex64", "float32"]


@pytest.mark.parametrize("size", [2.5, "3", True])
def test_a_virtual_batch_size_that_is_no_integer_is_an_error(size):
    message = f"`virtual_batch_size` must be an integer and at least 1, got {size!r}. None takes"
    with pytest.raises(ValueError, match=message):
        bnjax.batch_norm(*bnjax.init(3), jnp.ones((4, 3)), mutable=True, virtual_batch_size=size)


@pytest.mark.parametrize("number", [True, "3", 3.0])
def test_a_number_of_features_that_is_no_integer_is_an_error(number):
    message = f"`num_features` must be an integer and not negative, got {number!r}"
    with pytest.raises(ValueError, match=message):
        bnjax.init(number)


def test_an_output_of_integers_is_an_error():
    message = "`dtype`, that of the output, must be floating point or complex, got int32. None"
    with pytest.raises(TypeError, match=message):
        bnjax.batch_norm(*bnjax.init(3), jnp.ones((4, 3)), mutable=True, dtype="int32")


@pytest.mark.parametrize("name", ["momentum", "eps"])
def test_a_setting_for_each_channel_is_an_error(name):
    message = f"`{name}` must be one number, got an array of shape"
    setting: dict[str, Any] = {name: jnp.ones(2)}
    with pytest.raises(ValueError, match=message):
        bnjax.batch_norm(*bnjax.init(3), jnp.ones((4, 3)), mutable=True, **setting)
