"""`sums` and `spread`: right, linear in every transformation, and one reading on a CPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax
from jax.test_util import check_grads

from bnjax.core.sums import _in_chunks, spread, sums
from tests.support.hlo import compiled, operations
from tests.support.oracle import assert_close

CASES = {
    "images": ((4, 28, 28, 8), (0, 1, 2)),
    "channels first": ((4, 8, 28, 28), (0, 2, 3)),
    "few positions": ((64, 7, 7, 16), (0, 1, 2)),
    "primes": ((7, 23, 29, 3), (0, 1, 2)),
    "rows": ((4096, 6), (0,)),
    "rows that no number divides": ((4099, 6), (0,)),
    "a channel": ((32, 40, 40, 1), (0, 1, 2)),
    "two feature axes": ((16, 5, 40, 6), (0, 2)),
    "channels in front": ((6, 50, 50), (1, 2)),
    "small": ((3, 2, 4), (0, 1)),
    "a single value": ((1, 1), (0,)),
    "nothing": ((0, 5, 4), (0, 1)),
    "no axis": ((5, 4), ()),
}


@pytest.fixture(autouse=True, params=[1, 8], ids="{} devices".format)
def devices(request, monkeypatch):
    """That a user has: of those that are here, 8, depends how sums are divided."""
    monkeypatch.setattr("bnjax.core.compat.split_over", lambda context: request.param)
    jax.clear_caches()
    yield request.param
    jax.clear_caches()


each_case = pytest.mark.parametrize(("shape", "reduced"), CASES.values(), ids=CASES)


def draw(rng: np.random.Generator, shape: tuple[int, ...], dtype: str = "float32") -> jax.Array:
    values = rng.standard_normal(shape)
    return jnp.asarray(values + 1j * rng.standard_normal(shape) if "c" in dtype else values, dtype)


@each_case
@pytest.mark.parametrize(("number", "sources"), [(1, 1), (2, 1), (2, 2), (3, 1)])
@pytest.mark.parametrize("dtype", ["float32", "complex64"])
@pytest.mark.parametrize("wrap", [jax.jit, lambda function: function], ids=["jit", "eager"])
def test_each_sum_is_that_of_float64(rng, shape, reduced, number, sources, dtype, wrap):
    values = [draw(rng, shape, dtype) for _ in range(number)]
    found = wrap(lambda *values: sums(values, reduced, sources))(*values)
    exact = tuple(np.asarray(value, "complex128").sum(reduced) for value in values)
    tolerance = (5e-6 if dtype == "complex64" else 2e-6) * np.prod(
        [shape[a] for a in reduced]
    ) ** 0.5
    assert [value.dtype for value in found] == [dtype] * number
    assert_close(tuple(np.asarray(f, "complex128") for f in found), exact, atol=tolerance)


@each_case
def test_a_spread_repeats_each_vector(rng, shape, reduced):
    features = tuple(size for axis, size in enumerate(shape) if axis not in reduced)
    vectors = [draw(rng, features) for _ in range(2)]
    found = spread(vectors, shape, reduced)
    for one, vector in zip(found, vectors, strict=True):
        np.testing.assert_array_equal(one, np.broadcast_to(np.expand_dims(vector, reduced), shape))


@each_case
def test_they_are_each_others_transposes(rng, shape, reduced):
    values = tuple(draw(rng, shape) for _ in range(2))
    vectors = tuple(draw(rng, np.sum(values[0], reduced).shape) for _ in range(2))
    forth = jax.linear_transpose(lambda *v: sums(v, reduced), *values)(vectors)
    np.testing.assert_array_equal(forth, spread(vectors, shape, reduced))
    back = jax.linear_transpose(lambda *v: spread(v, shape, reduced), *vectors)(values)
    assert_close(back, sums(values, reduced, sources=2), rtol=1e-6)


@pytest.mark.parametrize("modes", [("fwd",), ("rev",)], ids=str)
def test_derivatives_of_any_order_and_mode(rng, modes):
    shape, reduced = (6, 3, 2), (0, 1)

    def function(x, y):
        first, second = sums((jnp.sin(x), x * x * y), reduced)
        a, b = spread((first * second, second), shape, reduced)
        return jnp.tanh(a * 1e-2) * x + b * y

    check_grads(function, (draw(rng, shape), draw(rng, shape)), 3, modes, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("in_axes", [(0, 0), (2, None), (None, 1), (-1, -1)], ids=str)
def test_vmap_is_a_loop(rng, in_axes):
    shape, times = (40, 30, 6), 4

    def function(x, y):
        totals = sums((x, y), (0, 1))
        return totals, spread((totals[0], y[0, 0]), shape, (0, 1)), spread([y[0, 0]], (2, 6), (0,))

    def argument(axis):
        """Rows to loop over, and the array that has them along the axis."""
        rows = draw(rng, (times, *shape))
        return ([rows[0]] * times, rows[0]) if axis is None else (rows, jnp.moveaxis(rows, 0, axis))

    (xs, x), (ys, y) = map(argument, in_axes)
    expected = [function(xs[i], ys[i]) for i in range(times)]
    expected = jax.tree.map(lambda *leaves: np.stack(leaves), *expected)
    assert_close(jax.vmap(function, in_axes)(x, y), expected, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(32, 28, 28, 64), (32, 64, 28, 28), (32, 7, 7, 256), (4096, 64)])
def test_a_cpu_reads_what_is_summed_once(shape, dtype):
    reduced = tuple(axis for axis in range(len(shape)) if shape[axis] not in (64, 256))

    def pair(x, dy):
        x, dy = x.astype(jnp.float32), dy.astype(jnp.float32)
        return sums((dy, x * dy), reduced)

    x = jax.ShapeDtypeStruct(shape, dtype)
    program = compiled(jax.jit(pair), x, x)
    inputs = program.inputs()
    assert len(program.readers(inputs)) == 1
    # Nor is anything of their size written.
    assert {each.name for each in program.steps() if shape in each.shapes} == inputs


def test_each_platform_is_given_what_its_compiler_makes_fast(devices):
    def pair(x):
        return sums((x, x * x), (0, 1, 2))

    x = jax.ShapeDtypeStruct((32, 28, 28, 64), "float32")
    platforms = ("tpu", "cuda", "cpu")
    tpu, cuda, cpu = (operations(jax.jit(pair), x, platform=name) for name in platforms)
    of_chunks = 1 if devices == 1 else 2  # devices add up, but gather what is added at once
    assert [found["reduce"] for found in (tpu, cuda, cpu)] == [2, 1 + of_chunks, 3]
    assert [found["reshape"] > 0 for found in (tpu, cuda, cpu)] == [False, True, True]


@pytest.mark.parametrize(
    "shape", [(31, 6), (4096, 5), (8, 7, 7, 3), (600, 2), (2, 3, 5, 4)], ids=str
)
@pytest.mark.parametrize("channels_last", [True, False])
def test_the_sums_by_chunks_of_gpus_are_those_of_float64(rng, shape, channels_last, devices):
    last = len(shape) - 1
    reduced = tuple(range(last)) if channels_last else tuple(a for a in range(last + 1) if a != 1)
    x = rng.standard_normal(shape).astype(np.float32)
    found = jax.jit(functools.partial(_in_chunks, reduced=reduced, sources=1, devices=devices))(
        x, x * x
    )
    wide = x.astype(np.float64)
    for one, expected in zip(found, (wide, wide * wide), strict=True):
        assert_close(one, expected.sum(reduced), rtol=3e-6)


def test_a_size_that_is_not_known_yet(rng):
    def pair(x):
        return sums((x, x * x), (0, 1))

    (rows,) = export.symbolic_shape("b")
    exported = export.export(jax.jit(pair))(jax.ShapeDtypeStruct((rows, 50, 30), "float32"))
    x = draw(rng, (20, 50, 30))
    assert_close(exported.call(x), pair(x), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("shape", ["b, 50", "b, 50, 30"])
def test_gradients_of_a_size_that_is_not_known_yet(rng, shape):
    def loss(x):
        axes = tuple(range(x.ndim - 1))
        first, second = sums((x, x * x), axes)
        return jnp.sum(spread((first, second), x.shape, axes)[1] * x)

    struct = jax.ShapeDtypeStruct(export.symbolic_shape(shape), "float32")
    exported = export.export(jax.jit(jax.grad(loss)))(struct)
    x = draw(rng, (5, 50, 30)[: struct.ndim])
    assert_close(exported.call(x), jax.grad(loss)(x), rtol=1e-5)


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan, 3e38, 2e-38, -0.0, 0.0, 1.5])
def test_a_spread_keeps_every_bit(value):
    vectors = [jnp.full(3, value, jnp.float32), jnp.arange(3, dtype=jnp.float32)]
    for one, vector in zip(spread(vectors, (64, 3), (0,)), vectors, strict=True):
        found, wanted = (np.asarray(each).view("int32") for each in (one, vector))
        np.testing.assert_array_equal(found, np.broadcast_to(wanted, (64, 3)))


def test_a_part_that_has_no_derivative(rng):
    x, y = draw(rng, (64, 8, 4)), draw(rng, (64, 8, 4))
    gradient = jax.grad(lambda x: lax.dot(*sums((x * x, y), (0, 1))))(x)
    assert_close(gradient, 2 * x * jnp.sum(y, (0, 1)), rtol=1e-5)
