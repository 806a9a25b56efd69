"""`bnjax.linen.BatchNorm` beside `flax.linen.BatchNorm`: the same but for the accuracy."""

import dataclasses
import inspect
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import bnjax
from tests.support import oracle
from tests.support.cases import NCHW, outcome
from tests.support.hlo import compiled
from tests.support.oracle import assert_close

pytestmark = pytest.mark.quick_compile

KEY = jax.random.key(0)
X = np.random.default_rng(1).standard_normal((8, 4, 2, 3)).astype(np.float32) * 3 + 1
ROWS = np.arange(8).reshape(8, 1, 1, 1) < 5

DTYPES = ("float32", "bfloat16", "float16", "int32", "uint8")
SETTINGS = (
    {},
    {"axis": 1},
    {"axis": (1, -1)},
    {"axis": (2, 1)},
    {"use_bias": False},
    {"use_scale": False},
    {"use_bias": False, "use_scale": False},
    {"momentum": 0.9, "epsilon": 1e-3},
    {"momentum": 1.0},
    {"dtype": jnp.bfloat16},
    {"dtype": jnp.float16, "use_bias": False},
    {"dtype": jnp.float32},
    {"param_dtype": jnp.bfloat16},
    {"param_dtype": jnp.float16, "use_scale": False},
    {"use_fast_variance": False},
    {"scale_init": nn.initializers.constant(2.0), "bias_init": nn.initializers.constant(-1.0)},
)
each_setting = pytest.mark.parametrize(
    "settings",
    SETTINGS,
    ids=lambda s: ", ".join(f"{k}={getattr(v, '__name__', v)}" for k, v in s.items()) or "defaults",
)


class Calls(NamedTuple):
    """All that a layer does with one input."""

    at_init: Any
    variables: Any
    trained: Any
    updates: Any
    evaluated: Any


def call(layer: Any, x: jax.Array, mask: Any = None) -> Calls:
    at_init, variables = layer.init_with_output(KEY, x, use_running_average=False)
    trained, updates = layer.apply(
        variables, x, use_running_average=False, mask=mask, mutable=["batch_stats"]
    )
    evaluated = layer.apply({**variables, **updates}, x, use_running_average=True)
    return Calls(at_init, variables, trained, updates, evaluated)


def assert_same(found: Calls, expected: Calls, *, within: float) -> None:
    assert_close(found, expected, rtol=within, atol=1e-6)
    chex.assert_trees_all_equal_dtypes(found, expected)


@each_setting
@pytest.mark.parametrize("mask", [None, ROWS.astype(np.float32)], ids=["plain", "float mask"])
def test_every_setting_gives_flaxs_values_and_dtypes(settings, mask):
    x = jnp.asarray(X)
    within = 2e-2 if any("float16" in str(v) for v in settings.values()) else 1e-5
    found, expected = (call(B(**settings), x, mask) for B in (bnjax.linen.BatchNorm, nn.BatchNorm))
    assert_same(found, expected, within=within)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("settings", [{}, {"axis": (1, -1), "param_dtype": jnp.bfloat16}], ids=str)
def test_every_input_dtype_gives_flaxs_values_and_dtypes(settings, dtype):
    x = jnp.abs(X).astype(dtype)
    found, expected = (call(B(**settings), x) for B in (bnjax.linen.BatchNorm, nn.BatchNorm))
    assert_same(found, expected, within=1e-5)


def test_complex_input_gives_flaxs_values_and_a_mean_that_is_complex_from_the_start():
    x = jnp.asarray(X * (1 + 2j))
    found, expected = (call(B(), x) for B in (bnjax.linen.BatchNorm, nn.BatchNorm))
    assert_close(found, expected, rtol=1e-5, atol=1e-6)
    for calls, first in ((found, "complex64"), (expected, "float32")):
        before, after = calls.variables["batch_stats"], calls.updates["batch_stats"]
        assert (before["mean"].dtype, after["mean"].dtype) == (first, "complex64")
        assert (before["var"].dtype, after["var"].dtype) == ("float32", "float32")


@pytest.mark.parametrize("shape", [(5,), (1, 5), (4, 5), (2, 3, 2, 2, 2, 5)], ids=str)
def test_every_rank_gives_flaxs_values(rng, shape):
    x = jnp.asarray(rng.standard_normal(shape), jnp.float32)
    found, expected = (call(B(), x) for B in (bnjax.linen.BatchNorm, nn.BatchNorm))
    assert_same(found, expected, within=1e-5)


@pytest.mark.parametrize("use_running_average", [True, False])
def test_the_gradients_are_flaxs(rng, use_running_average):
    case = NCHW
    x, dy, params, stats = (
        f(rng) for f in (case.values, case.values, case.params, case.batch_stats)
    )

    def run(layer):
        def apply(params, x):
            variables = {"params": params, "batch_stats": stats}
            y, updates = layer.apply(variables, x, mutable=["batch_stats"])
            return y, updates["batch_stats"]

        return outcome(apply, params, x, dy)

    settings = {"use_running_average": use_running_average, "axis": 1}
    assert_close(
        run(bnjax.linen.BatchNorm(**settings)), run(nn.BatchNorm(**settings)), rtol=1e-5, atol=1e-5
    )


def test_the_fields_and_their_defaults_are_flaxs():
    # Those of devices belong to an issue of their own.
    apart = {"axis_name", "axis_index_groups"}
    flaxs, ours = (
        {f.name: f.default for f in dataclasses.fields(B) if f.name not in apart}
        for B in (nn.BatchNorm, bnjax.linen.BatchNorm)
    )
    assert {name: ours.get(name, "missing") for name in flaxs} == flaxs
    assert [name for name in ours if name in flaxs] == list(flaxs)


def test_the_call_has_flaxs_arguments():
    flaxs, ours = (
        [(p.name, p.kind, p.default) for p in inspect.signature(B.__call__).parameters.values()]
        for B in (nn.BatchNorm, bnjax.linen.BatchNorm)
    )
    assert ours[: len(flaxs)] == flaxs
    assert all(each[1:] == (inspect.Parameter.KEYWORD_ONLY, None) for each in ours[len(flaxs) :])


def test_the_layer_takes_the_name_and_the_place_of_flaxs_in_a_model():
    def model(batch_norm: Any) -> nn.Module:
        class Net(nn.Module):
            @nn.compact
            def __call__(self, x, train):
                norm = nn.Dense(4)(x)
                norm = batch_norm(use_running_average=not train)(norm)
                return batch_norm(use_running_average=not train)(nn.relu(norm))

        return Net()

    x = jnp.asarray(X)
    theirs, ours = model(nn.BatchNorm), model(bnjax.linen.BatchNorm)
    variables = theirs.init(KEY, x, True)
    assert_close(ours.init(KEY, x, True), variables)
    for train in (True, False):
        found = ours.apply(variables, x, train, mutable=["batch_stats"])
        assert_close(found, theirs.apply(variables, x, train, mutable=["batch_stats"]), rtol=1e-5)


@pytest.mark.quick_compile(False)
@pytest.mark.parametrize("settings", [{"use_fast_variance": True}, {"use_fast_variance": False}])
def test_the_accuracy_is_not_flaxs(rng, settings):
    x = (1e4 + rng.standard_normal((4096, 2))).astype(np.float32)
    expected = oracle.batch_norm({}, {}, x, x, mutable=True).y
    found, flaxs = (
        call(B(**settings), jnp.asarray(x)).trained for B in (bnjax.linen.BatchNorm, nn.BatchNorm)
    )
    assert_close(found, expected, atol=3e-6)
    assert np.max(np.abs(flaxs - expected)) > 1e-4


def test_float32_reductions_that_are_not_forced_keep_the_parameters_dtype():
    x = jnp.asarray(X, jnp.bfloat16)
    layer = bnjax.linen.BatchNorm(param_dtype=jnp.bfloat16, force_float32_reductions=False)
    calls = call(layer, x)
    stats = [*jax.tree.leaves(calls.variables), *jax.tree.leaves(calls.updates)]
    assert {leaf.dtype for leaf in stats} == {jnp.dtype("bfloat16")}
    assert calls.trained.dtype == jnp.bfloat16


@pytest.mark.quick_compile(False)
@pytest.mark.parametrize("axis", [-1, 1])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_evaluation_is_compiled_to_the_same_instructions(axis, dtype):
    def types(layer: Any) -> Any:
        module = layer(use_running_average=True, axis=axis, dtype=dtype)
        variables = module.init(KEY, X)
        return compiled(jax.jit(module.apply), variables, X.astype(dtype)).types()

    assert types(bnjax.linen.BatchNorm) == types(nn.BatchNorm)
