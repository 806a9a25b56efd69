"""Each private or moving part of JAX that bnjax uses is there, and does what bnjax expects."""

import functools
import inspect
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax import export
from jax.experimental import checkify, jet
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import bnjax
from bnjax.core import compat
from bnjax.core.sums import spread, sums
from bnjax.models import compat as flax_parts
from tests.support.cases import NC, NCHW, NHWC, as_on_accelerators
from tests.support.hlo import operations, primitives
from tests.support.oracle import assert_close

pytestmark = pytest.mark.quick_compile

MESH = jax.make_mesh((4, 2), ("rows", "columns"), axis_types=(AxisType.Auto,) * 2)
CALLS = {
    "train": (NHWC, {"mutable": True}),
    "channels first": (NCHW, {"mutable": True}),
    "cumulative": (NC, {"mutable": True, "momentum": None}),
    "masked": (NHWC, {"mutable": True, "mask": NHWC.row_mask(2)}),
    "virtual": (NC, {"mutable": True, "virtual_batch_size": 3}),
    "eval": (NHWC, {"mutable": False}),
}
each_call = pytest.mark.parametrize(("case", "settings"), CALLS.values(), ids=CALLS)


def doubling():
    """A linear function of two arrays as a primitive of its own."""

    def twice(x, y, devices=1):
        return [x + y, x - y]

    made = compat.primitive("twice", twice, cpu=twice)
    compat.transposed(
        made, lambda cotangents, shape: made.bind(*cotangents), lambda arrays: made.bind(*arrays)
    )
    return made.bind


@pytest.mark.parametrize("wrap", [jax.jit, lambda f: f], ids=["jit", "eager"])
def test_a_primitive_is_run_differentiated_and_batched(wrap):
    x, y = jnp.arange(6.0).reshape(2, 3), jnp.ones((2, 3))
    function = wrap(doubling())
    assert_close(function(x, y), [x + y, x - y])
    assert_close(jax.jvp(function, (x, y), (y, x))[1], [y + x, y - x])
    assert_close(jax.vjp(function, x, y)[1]([x, y]), (x + y, x - y))
    assert_close(jax.vmap(function, (0, None))(x, y[0]), [x + y, x - y])
    assert_close(jax.vmap(jax.grad(lambda x, y: jnp.sum(jnp.stack(function(x, y)))))(x, y), 2 * y)


def test_the_platform_decides_how_a_primitive_is_lowered():
    made = compat.primitive(
        "here",
        lambda x, devices=1: [x * 1],
        cpu=lambda x, devices: [-x],
        cuda=lambda x, devices: [jnp.sin(x)],
        rocm=lambda x, devices: [jnp.sin(x)],
    )
    x, function = jnp.ones(2), jax.jit(made.bind)
    assert_close(function(x), [-x])
    found = [operations(function, x, platform=name) for name in ("cpu", "cuda", "rocm", "tpu")]
    assert [each["negate"] for each in found] == [1, 0, 0, 0]
    assert [each["sine"] for each in found] == [0, 1, 1, 0]


def test_a_program_knows_over_how_many_devices_its_arrays_may_be_split():
    def number(x, devices):
        return [jnp.full_like(x, devices)]

    count = compat.by_platform("count", number, lambda x: [x])
    rows, split = jnp.zeros((8, 2)), jax.sharding.NamedSharding(MESH, P("rows"))
    assert_close(jax.jit(count)(rows), [rows + 1])
    assert_close(jax.jit(count)(jax.device_put(rows, split)), [rows + MESH.size])
    for axes, expected in (({"rows", "columns"}, 1), ({"rows"}, MESH.shape["columns"])):
        settings = {"mesh": MESH, "in_specs": P("rows"), "out_specs": P("rows"), "axis_names": axes}
        local = jax.jit(jax.shard_map(count, check_vma=False, **settings))
        assert_close(local(rows), [rows + expected])


@pytest.mark.parametrize("wrap", [jax.jit, lambda f: f], ids=["jit", "eager"])
@pytest.mark.parametrize("inner", [(0, None), (-1, 0), (None, 1)], ids=str)
@pytest.mark.parametrize("outer", [(0, None), (2, 1), (None, 0)], ids=str)
def test_vmap_maps_what_a_platform_implements(rng, wrap, inner, outer):
    def plain(x, y):
        return [x + jnp.sum(y)]

    added = compat.by_platform("added", lambda x, y, devices: plain(x, y), plain)
    x, y = (jnp.asarray(rng.standard_normal((3, 3, 3)), "float32") for _ in range(2))
    found, expected = (jax.vmap(jax.vmap(f, inner), outer)(x, y) for f in (wrap(added), plain))
    assert_close(found, expected, rtol=1e-6)


@pytest.mark.parametrize("check_vma", [True, False])
def test_what_differs_between_devices_is_known_from_its_type(check_vma):
    seen = []

    def local(x):
        seen.append((compat.varying_axes(x), compat.varying_axes(jax.lax.psum(x, "rows"))))
        return x

    jax.shard_map(local, mesh=MESH, in_specs=P("rows"), out_specs=P("rows"), check_vma=check_vma)(
        jnp.ones(4)
    )
    expected = (frozenset({"rows"}), frozenset()) if check_vma else (frozenset(), frozenset())
    assert seen[-1] == expected


def test_one_gather_goes_over_several_names_but_not_over_those_of_vmap():
    def local(x):
        assert compat.gathers_at_once(("rows", "columns"))
        return x

    jax.shard_map(local, mesh=MESH, in_specs=P(MESH.axis_names), out_specs=P(MESH.axis_names))(
        jnp.ones(8)
    )
    answers = []

    def inner(x):
        answers.append([compat.gathers_at_once(names) for names in (("a",), ("a", "b"))])
        return x

    jax.vmap(jax.vmap(inner, axis_name="a"), axis_name="b")(jnp.ones((2, 2)))
    assert answers == [[True, False]]


def test_a_traced_function_is_cut_to_what_some_of_its_results_need():
    traced = jax.make_jaxpr(lambda x, y, z: (x + 1, y * 2, z))(1.0, 2.0, 3.0)
    function, inputs = compat.needed(traced, [False, True, False])
    assert inputs == [False, True, False]
    assert_close(function(5.0), [10.0])


def test_jax_keys_its_caches_by_the_value_of_a_context():
    setting, traces = compat.context(0), []

    @jax.jit
    def function(x):
        traces.append(setting.value)
        return x

    for value in (1, 2, 1):
        with setting(value):
            function(1.0)
    assert traces == [1, 2]
    assert setting.value == 0


def arrays(case, settings, rng):
    params, stats = case.params(rng), case.batch_stats(rng)
    if settings.get("momentum", 0) is None:
        stats["count"] = np.int32(2)
    return jax.tree.map(jnp.asarray, (params, stats, case.values(rng), case.values(rng)))


def everything(case, settings, params, stats, x, dy):
    """Output, statistics and all gradients."""

    def apply(params, x):
        return bnjax.batch_norm(params, stats, x, axis=case.axis, **settings)

    y, pull, moved = jax.vjp(apply, params, x, has_aux=True)
    return y, moved, pull(dy)


@each_call
def test_without_compilation_everything_is_the_same(rng, case, settings):
    given = arrays(case, settings, rng)
    compiled = everything(case, settings, *given)
    with jax.disable_jit():
        found = everything(case, settings, *given)
    assert_close(found, compiled, rtol=1e-5, atol=1e-6)


@each_call
def test_without_rules_of_its_own_everything_is_the_same(rng, case, settings):
    given = arrays(case, settings, rng)
    expected = everything(case, settings, *given)
    function = jax.jit(functools.partial(everything, case, settings))
    with compat.plain(True):
        parts = primitives(function, *given)
        found = function(*given)
    assert parts.keys().isdisjoint(("spread", "sums", "custom_jvp_call", "cond"))
    assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_plain_sums_and_spreads_have_the_same_derivatives(rng):
    x = jnp.asarray(rng.standard_normal((40, 7, 3)), "float32")

    def function(x):
        first, second = sums((x * x, jnp.sin(x)), (0, 1))
        a, b = spread((first * second, second), x.shape, (0, 1))
        return jnp.sum(a * x + b * x * x)

    def step(x):
        return function(x), jax.grad(function)(x), jax.jvp(jax.grad(function), (x,), (x,))

    expected = step(x)
    with compat.plain(True):
        assert_close(step(x), expected, rtol=1e-5)


@each_call
def test_checkify_and_debug_nans_find_nothing_and_change_nothing(rng, case, settings):
    *given, _ = arrays(case, settings, rng)
    call = functools.partial(bnjax.batch_norm, axis=case.axis, **settings)
    checked = checkify.checkify(call, errors=checkify.float_checks | checkify.index_checks)
    with jax.debug_nans(True):
        error, found = jax.jit(checked)(*given)
        assert_close(call(*given), found, rtol=1e-5, atol=1e-6)
    error.throw()


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("settings", [{"mutable": True}, {"mutable": False}], ids=str)
def test_taylor_mode_gives_the_derivatives_of_any_order(rng, settings):
    params, stats, x, dx = arrays(NC, settings, rng)
    x, dx = jnp.float64(x), jnp.float64(dx)

    def apply(x):
        return bnjax.batch_norm(params, stats, x, **settings)[0]

    def along(t):
        return apply(x + t * dx)

    first = jax.jacfwd(along)
    expected = [apply(x), [first(0.0), jax.jacfwd(first)(0.0)]]
    y, series = jet.jet(apply, (x,), ([dx, jnp.zeros_like(dx)],))
    assert_close([y, list(series)], expected, rtol=1e-9)


@pytest.mark.parametrize("kind", [bnjax.BatchNorm1d, bnjax.linen.BatchNorm])
def test_taylor_mode_goes_through_layers(kind):
    layer = kind(use_running_average=False)
    x, dx = jnp.arange(12.0).reshape(4, 3) ** 1.5, jnp.ones((4, 3)).at[0].set(2.0)
    variables = layer.init(jax.random.key(0), x)

    def apply(x):
        return layer.apply(variables, x, mutable=["batch_stats"])[0]

    y, (slope,) = jet.jet(apply, (x,), ([dx],))
    assert_close([y, slope], list(jax.jvp(apply, (x,), (dx,))), rtol=1e-5)


@pytest.mark.parametrize("names", ["inner", "outer", ("inner", "outer")], ids=str)
def test_nested_vmaps_pool_over_the_named_ones(rng, names):
    x = jnp.asarray(5e4 + rng.standard_normal((2, 3, 6, 4)), "float32")
    x = x + 100 * jnp.arange(6.0).reshape(2, 3, 1, 1)
    params, stats = bnjax.init(4)

    def local(x):
        return bnjax.batch_norm(params, stats, x, mutable=True, axis_name=names)[0]

    found = jax.vmap(jax.vmap(local, axis_name="inner"), axis_name="outer")(x)
    axes = {"inner": (1, 2), "outer": (0, 2)}.get(names, (0, 1, 2))  # pyright: ignore[reportArgumentType, reportCallIssue] - a tuple is none of these keys
    exact = np.asarray(x, np.float64)
    std = np.sqrt(exact.var(axes, keepdims=True) + 1e-5)
    assert_close(found, (exact - exact.mean(axes, keepdims=True)) / std, atol=3e-6)


def test_an_ensemble_on_several_devices_is_its_members_one_by_one(rng):
    x = jnp.asarray(rng.standard_normal((8, 3, 6, 4)), "float32")
    params, stats = bnjax.init(4)
    local = functools.partial(bnjax.batch_norm, params, stats, mutable=True, axis_name="devices")
    found = jax.pmap(jax.vmap(lambda x: local(x)[0]), axis_name="devices")(x)
    alone = [bnjax.batch_norm(params, stats, x[:, i], mutable=True)[0] for i in range(3)]
    assert_close(found, jnp.stack(alone, 1), atol=2e-6)


def test_the_program_of_accelerators_runs_without_compilation(rng):
    given = arrays(NHWC, {}, rng)
    expected = everything(NHWC, {"mutable": True}, *given)
    with as_on_accelerators(), jax.disable_jit():
        found = everything(NHWC, {"mutable": True}, *given)
    assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_one_export_serves_all_platforms(rng):
    """Each has its own implementation in it, inside `vmap` too."""
    *given, dy = arrays(NHWC, {}, rng)
    step = functools.partial(everything, NHWC, {"mutable": True})
    mapped = jax.jit(jax.vmap(step, (None, None, 0, 0)))
    arguments = (*given[:2], jnp.stack([given[2], 3 - given[2]]), jnp.stack([dy, dy]))
    program = export.export(mapped, platforms=("cpu", "cuda", "tpu"))(*arguments)
    again = export.deserialize(program.serialize())
    assert_close(again.call(*arguments), mapped(*arguments), rtol=1e-6)


def test_what_moves_in_jax_is_used_in_one_module_of_the_core_alone():
    parts = ("jax.interpreters", "jax.extend", "jax._src", ".mat.varying", "make_user_context")
    core = [name for name in sys.modules if name.startswith("bnjax.core.")]
    files = {name: sys.modules[name].__file__ or "" for name in core}
    users = {
        name for name, file in files.items() if any(p in Path(file).read_text() for p in parts)
    }
    assert users == {"bnjax.core.compat"}


def test_flax_tells_an_interceptor_which_function_runs_below_a_subclass():
    class Sub(nn.BatchNorm):
        @nn.compact
        def __call__(self, x):  # pyright: ignore[reportIncompatibleMethodOverride]
            return super().__call__(x, use_running_average=True)

    heard: list[tuple[Any, type]] = []

    def listen(call, args, kwargs, context):
        heard.append((context.orig_method.func, type(context.module)))
        return call(*args, **kwargs)

    with nn.intercept_methods(listen):
        Sub().init(jax.random.key(0), jnp.ones((2, 3)))
    library = inspect.unwrap(nn.BatchNorm.__call__)
    assert [function is library for function, _ in heard] == [False, True]
    assert {kind for _, kind in heard} == {Sub}


def test_flax_has_the_parts_of_nnx_that_the_tools_stand_on():
    class Plain(nnx.Module, pytree=False):
        pass

    class Model(nnx.Module):
        def __init__(self):
            self.first = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
            self.again = self.first

    model = Model()
    assert [flax_parts.is_pytree(kind) for kind in (Model, Plain)] == [True, False]
    paths = [path for path, node in flax_parts.modules_of(model) if node is model.first]
    assert paths == [("again",)]
    plain: Any = flax_parts.plain_arrays(nnx.clone(model))
    assert isinstance(plain.first.kernel.get_raw_value(), jax.Array)


def test_flax_reads_filters_of_collections():
    assert flax_parts.in_filter(["batch_stats"], "batch_stats")
    assert not flax_parts.in_filter(False, "batch_stats")
    assert flax_parts.in_filter(flax_parts.union_filters("cache", "batch_stats"), "batch_stats")


def test_a_program_that_is_traced_is_told_from_one_that_runs():
    found: list[bool] = [flax_parts.is_tracing()]
    jax.jit(lambda: found.append(flax_parts.is_tracing()))()
    assert found == [False, True]


def test_a_value_set_for_jax_decides_what_its_caches_believe():
    context, traced = compat.context(()), []
    step = jax.jit(lambda x: traced.append(None) or x)
    for value in ((), (1,), (1,), ()):
        context(value).__enter__()
        step(1.0)
    assert len(traced) == 2
