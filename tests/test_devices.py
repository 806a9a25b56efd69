"""On 8 devices, in every way that JAX has, batch norm gives what one device gives."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import bnjax
from bnjax.core.devices import AxisName
from tests.support import oracle
from tests.support.oracle import assert_close
from tests.support.ways import (
    AXIS,
    DEVICES,
    JIT_WAYS,
    ONE_AXIS_WAYS,
    SHARES,
    WAYS,
    Apply,
    Way,
    core,
    differentiated,
    each_layer,
    each_of,
    expected,
    forward,
    make,
    of_layer,
    spread,
)

pytestmark = pytest.mark.quick_compile


@functools.cache
def core_step(way: Way) -> Any:
    return way.compile(differentiated(core(way.axis_name)))


@functools.cache
def on_one_device(make_apply: Callable[..., Apply]) -> Any:
    return jax.jit(differentiated(make_apply(None)))


def test_there_are_eight_devices():
    assert jax.device_count() == DEVICES


@each_of(ONE_AXIS_WAYS + JIT_WAYS)
@each_layer
def test_a_layer_gives_what_one_device_gives_on_the_whole_batch(way, case):
    data = make(case)
    assert not data.mask[:4].any()
    layer = case.layer(axis=case.axis, axis_name=way.axis_name)
    found = spread(way, way.compile(differentiated(of_layer(layer))), data)
    correction = 0 if isinstance(layer, bnjax.linen.BatchNorm) else 1
    assert_close(found, expected(data, case, correction=correction), rtol=1e-5)


@each_of(WAYS)
@given(
    rates=st.lists(st.sampled_from([0.0, 0.02, 0.5, 1.0]), min_size=8, max_size=8),
    seed=st.integers(0, 1000),
)
def test_any_mask_gives_the_statistics_of_all_that_count(way, rates, seed):
    data = make(rates=rates, seed=seed)
    data.mask[seed % 32, :3] = True
    assert_close(spread(way, core_step(way), data), expected(data), rtol=1e-5)


@each_of(WAYS)
def test_a_mask_may_differ_by_channel(way):
    data = make()
    data = data._replace(mask=np.random.default_rng(1).random(data.x.shape) < data.mask.mean())
    assert_close(spread(way, core_step(way), data), expected(data), rtol=1e-5)


@each_of(WAYS)
def test_without_a_mask_all_counts(way):
    data = make(rates=None)
    assert_close(spread(way, core_step(way), data), expected(data), rtol=1e-5)


@each_of(WAYS)
def test_a_batch_in_which_nothing_counts_gives_what_one_device_gives(way):
    data = make(rates=[0] * DEVICES)
    assert_close(spread(way, core_step(way), data), on_one_device(core)(*data), rtol=1e-5)


@each_of(WAYS)
def test_nan_under_the_mask_reaches_nothing(way):
    data = make()
    data = data._replace(cotangent=np.where(data.mask, data.cotangent, np.float32(0)))
    wild = data._replace(x=np.where(data.mask, data.x, np.float32(np.nan)))
    found, wanted = spread(way, core_step(way), wild), expected(data)
    y, wanted_y = (np.where(data.mask, o.y, 0) for o in (found, wanted))
    assert_close(found._replace(y=y), wanted._replace(y=wanted_y), rtol=1e-5)


@each_of(WAYS)
def test_nan_on_one_device_leaves_the_statistics_of_its_channel_alone_everywhere(way):
    data = make(rates=None)
    data.x[17, 2, 3] = np.nan
    moved = expected(data).batch_stats
    kept = {k: np.where(np.arange(5) == 3, data.batch_stats[k], moved[k]) for k in moved}
    assert_close(spread(way, core_step(way), data).batch_stats, kept, rtol=1e-5)


@each_of(WAYS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("running", [1e5, 9e4, 0.0, np.inf])
def test_a_mean_of_1e5_costs_no_digits_wherever_the_running_mean_is(way, masked, running):
    data = make(rates=SHARES if masked else None, mean=1e5)
    stats = {"mean": np.full(5, running, np.float32), "var": np.ones(5, np.float32)}
    seen = True if data.mask is None else data.mask
    data = data._replace(batch_stats=stats, cotangent=np.where(seen, data.cotangent, 0))
    found, wanted = spread(way, core_step(way), data), expected(data)
    y, wanted_y = (np.where(seen, o.y, 0) for o in (found, wanted))
    assert_close(found._replace(y=y), wanted._replace(y=wanted_y), rtol=1e-5)


def tangents(axis_name: AxisName | None) -> Apply:
    """The derivative of outputs and statistics along a direction."""
    apply = core(axis_name)

    def along(params, batch_stats, x, mask):
        def of_both(params, x):
            return apply(params, batch_stats, x, mask)

        direction = (jax.tree.map(jnp.cos, params), jnp.cos(3 * x))
        return jax.jvp(of_both, (params, x), direction)[1]

    return along


def gradients(axis_name: AxisName | None) -> Apply:
    """The gradient of a function of the outputs."""
    step = differentiated(core(axis_name))

    def of_x(params, batch_stats, x, mask):
        found = step(params, batch_stats, x, mask, jnp.cos(3 * x))
        return found.dx, found.batch_stats

    return of_x


@each_of(ONE_AXIS_WAYS[1:])
@pytest.mark.parametrize("derivative", [tangents, gradients])
def test_derivatives_and_their_gradients_equal_those_of_one_device(way, derivative):
    compiled, data = way.compile(differentiated(derivative(way.axis_name))), make()
    assert_close(spread(way, compiled, data), on_one_device(derivative)(*data), rtol=1e-5)


@each_of(ONE_AXIS_WAYS[1:3])
def test_complex_values_have_complex_means_and_real_variances(way):
    data = make(rates=None)
    old = data.batch_stats | {"mean": data.batch_stats["mean"] + 1j}
    data = data._replace(x=data.x + 1j * data.cotangent, batch_stats=old)
    found = spread(way, way.compile(forward(core(way.axis_name))), data)
    mean, var = oracle.measure(data.x, (0, 1))
    x_hat = (data.x - mean) / np.sqrt(var + 1e-5)
    assert_close(found.y, x_hat * data.params["scale"] + data.params["bias"], rtol=1e-5)
    new = {"mean": mean, "var": var * 192 / 191}
    moved = {key: 0.9 * old[key] + 0.1 * new[key] for key in old}
    assert_close(found.batch_stats, moved, rtol=1e-5)


@each_layer
def test_a_layer_initializes_and_evaluates_without_its_axis(case):
    groups = [[0, 1, 2, 3], [4, 5, 6, 7]]
    layer = case.layer(axis=case.axis, axis_name=AXIS, axis_index_groups=groups)
    x = make(case).x
    variables = layer.init(jax.random.key(0), x)
    plain = case.layer(axis=case.axis)
    assert_close(variables, plain.init(jax.random.key(0), x))
    evaluated = [on.clone(use_running_average=True).apply(variables, x) for on in (layer, plain)]
    assert_close(*evaluated)
