"""Devices that kept statistics of their own before, and now pool what they see."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import bnjax
from tests.support.oracle import assert_close

pytestmark = pytest.mark.quick_compile

DEVICES = 8
AXIS = "devices"
MESH = jax.make_mesh((DEVICES,), (AXIS,), axis_types=(jax.sharding.AxisType.Auto,))


def by_shard_map(step, check_vma):
    def local(*arguments):
        found = step(*jax.tree.map(lambda a: a[0], arguments))
        return jax.tree.map(lambda a: a[None], found)

    return jax.jit(
        jax.shard_map(local, mesh=MESH, in_specs=P(AXIS), out_specs=P(AXIS), check_vma=check_vma)
    )


WAYS = {
    "vmap": lambda step: jax.jit(jax.vmap(step, axis_name=AXIS)),
    "pmap": lambda step: jax.pmap(step, axis_name=AXIS),
    "shard_map": functools.partial(by_shard_map, check_vma=True),
    "shard_map_unchecked": functools.partial(by_shard_map, check_vma=False),
}
each_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


def own_statistics(rng, channels, spread):
    mean = spread * rng.standard_normal((DEVICES, channels))
    return {"mean": jnp.asarray(mean, "float32"), "var": jnp.ones((DEVICES, channels))}


@each_way
@pytest.mark.parametrize("spread", [1.0, 1e4, np.inf])
def test_running_means_that_differ_have_no_say_in_what_is_pooled(rng, way, spread):
    x = jnp.asarray(rng.standard_normal((DEVICES, 16, 3)) + 0.5, "float32")
    params, new = bnjax.init(3)
    stats = own_statistics(rng, 3, spread)

    def step(stats, x):
        return bnjax.batch_norm(params, stats, x, mutable=True, axis_name=AXIS, momentum=1.0)

    y, moved = way(step)(stats, x)
    expected, whole = bnjax.batch_norm(params, new, x.reshape(-1, 3), mutable=True, momentum=1.0)
    assert_close(y.reshape(-1, 3), expected, atol=3e-6)
    if np.isfinite(spread):
        for key in ("mean", "var"):
            assert_close(moved[key], np.tile(whole[key], (DEVICES, 1)), rtol=1e-5, atol=1e-6)


@pytest.fixture(params=["few", "many"])
def number(request, monkeypatch):
    """Few devices gather all moments, many add them up: eight are many here, too."""
    if request.param == "many":
        monkeypatch.setattr("bnjax.core.devices._GATHERED", 2)
        jax.clear_caches()
        yield
        jax.clear_caches()
    else:
        yield


@each_way
@pytest.mark.usefixtures("number")
@pytest.mark.parametrize("mean", [0.0, 1e3, 1e5, 1e7])
@pytest.mark.parametrize("dtype", ["float32", "complex64"])
@pytest.mark.parametrize("apart", [0.0, 3.0, 1e4])
def test_pooling_is_exact_at_any_mean(rng, way, mean, dtype, apart):
    shape = (DEVICES, 16, 3)
    x = rng.standard_normal(shape) + (1j * rng.standard_normal(shape) if "c" in dtype else 0)
    x = (x + mean + apart * rng.standard_normal((DEVICES, 1, 3))).astype(dtype)

    def step(x):
        return bnjax.batch_norm({}, {}, x, mutable=True, axis_name=AXIS)[0]

    found = np.asarray(way(step)(jnp.asarray(x)))
    exact = x.astype("complex128" if "c" in dtype else "float64")
    deviations = exact - exact.mean((0, 1))
    expected = deviations / np.sqrt(np.mean(np.abs(deviations) ** 2, (0, 1)) + 1e-5)
    np.testing.assert_allclose(found, expected, rtol=0, atol=3e-6)


@each_way
@pytest.mark.parametrize("constant", [0.0, 1 / 3, 12345.678, 1e30])
def test_a_channel_that_is_constant_on_all_devices_gives_exactly_the_bias(way, constant):
    x = jnp.full((DEVICES, 16, 3), constant, "float32")

    def step(x):
        bias = {"bias": jnp.arange(3.0)}
        return bnjax.batch_norm(bias, {}, x, mutable=True, axis_name=AXIS)[0]

    assert_close(way(step)(x), np.broadcast_to(np.arange(3.0), x.shape))
