"""Every case through every transformation of JAX: equal to the plain call."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import export

import bnjax
from tests.support.cases import NC, NCHW, NHWC, Case
from tests.support.oracle import assert_close

pytestmark = pytest.mark.quick_compile

KEY = jax.random.key(0)


@dataclasses.dataclass(frozen=True, eq=False)
class Call:
    """A way to call batch norm, as a function of parameters, statistics and input."""

    name: str
    case: Case
    settings: dict[str, Any]

    def __call__(self, params, batch_stats, x):
        return bnjax.batch_norm(params, batch_stats, x, axis=self.case.axis, **self.settings)

    def arrays(self, seed: int = 0) -> tuple[Any, Any, Any]:
        rng = np.random.default_rng(seed)
        batch_stats = self.case.batch_stats(rng)
        if self.settings.get("momentum", 0) is None:
            batch_stats["count"] = np.int32(2)
        arrays = self.case.params(rng), batch_stats, self.case.values(rng)
        return jax.tree.map(jnp.asarray, arrays)


CALLS = (
    Call("train", NHWC, {"mutable": True}),
    Call("train NCHW", NCHW, {"mutable": True, "correction": 0}),
    Call("cumulative", NC, {"mutable": True, "momentum": None}),
    Call("masked rows", NCHW, {"mutable": True, "mask": NCHW.row_mask(2)}),
    Call("masked channels", NC, {"mutable": True, "mask": np.arange(40).reshape(8, 5) % 3 < 2}),
    Call("eval", NHWC, {"mutable": False}),
    Call("eval, masked", NC, {"mutable": False, "mask": NC.row_mask(3)}),
)
each_call = pytest.mark.parametrize("call", CALLS, ids=lambda call: call.name)


def loss(call: Callable, batch_stats: Any, params: Any, x: jax.Array) -> jax.Array:
    """A scalar that is not linear in the output."""
    y, _ = call(params, batch_stats, x)
    return jnp.sum(jnp.sin(y) * jnp.cos(jnp.arange(y.size)).reshape(y.shape))


def reference(call: Call) -> Callable:
    """The formulas as one would write them first, for JAX to differentiate."""

    def apply(params, batch_stats, x):
        reduced, mask = call.case.reduced, call.settings.get("mask")
        held = [batch_stats[key].astype(x.dtype) for key in ("mean", "var")]
        mean, var = (jnp.expand_dims(value, reduced) for value in held)
        if call.settings["mutable"]:
            mean = jnp.mean(x, reduced, keepdims=True, where=mask)
            var = jnp.mean((x - mean) ** 2, reduced, keepdims=True, where=mask)
        scale, bias = (jnp.expand_dims(params[key], reduced) for key in ("scale", "bias"))
        return (x - mean) / jnp.sqrt(var + 1e-5) * scale + bias, batch_stats

    return apply


def stacked(trees: list[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


@each_call
def test_jit_gives_the_same_and_does_not_trace_again(call):
    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(params, batch_stats, x):
        return call(params, batch_stats, x)

    params, batch_stats, x = call.arrays()
    plain = batch_stats
    for _ in range(3):
        y, batch_stats = step(params, batch_stats, x)
        expected, plain = call(params, plain, x)
        assert_close((y, batch_stats), (expected, plain), rtol=1e-6)


def test_new_layers_and_statistics_start_without_a_second_trace(rng):
    layer = bnjax.BatchNorm2d(6, axis=1)
    x = jnp.asarray(NCHW.values(rng))

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(variables, x):
        return layer.apply(variables, x, mutable=["batch_stats"])

    variables = layer.init(KEY, x)
    for _ in range(3):
        variables = {**variables, **step(variables, x)[1]}


def double(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), tree)


def first_derivatives(f: Callable, at: Any, along: Any) -> list[Any]:
    return [
        jax.grad(f, (0, 1))(*at),
        jax.jvp(f, at, along),
        jax.linearize(f, *at)[1](*along),
        jax.vjp(f, *at)[1](jnp.ones(())),
    ]


def hessian_vector_products(f: Callable, at: Any, along: Any) -> list[Any]:
    """Forward over reverse, and reverse over reverse."""

    def dot(*at):
        gradients = jax.grad(f, (0, 1))(*at)
        return sum(jax.tree.leaves(jax.tree.map(jnp.vdot, gradients, along)))

    return [
        jax.jvp(jax.grad(f, (0, 1)), at, along)[1],
        jax.grad(dot, (0, 1))(*at),
    ]


@each_call
@pytest.mark.parametrize("derivatives", [first_derivatives, hessian_vector_products])
@pytest.mark.usefixtures("x64")
def test_derivatives_are_those_of_the_formula(call, derivatives):
    (params, stats, x), (dparams, _, dx) = call.arrays(0), call.arrays(1)
    at, along = double((params, x)), double((dparams, dx))
    found, expected = (
        jax.jit(functools.partial(derivatives, functools.partial(loss, apply, stats)))(at, along)
        for apply in (call, reference(call))
    )
    assert_close(found, expected, rtol=1e-10)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("call", CALLS[-2:], ids=lambda call: call.name)
def test_an_evaluation_is_differentiated_in_its_statistics_too(call):
    params, stats, x = double(call.arrays())
    found, expected = (
        jax.jit(jax.grad(functools.partial(loss, apply), 0))(stats, params, x)
        for apply in (call, reference(call))
    )
    assert_close(found, expected, rtol=1e-10)


@each_call
def test_second_derivatives_in_float32_are_the_finite_differences_of_float64(call):
    (params, stats, x), (dparams, _, dx) = call.arrays(0), call.arrays(1)
    at, along = (params, x), (dparams, dx)
    products = functools.partial(hessian_vector_products, functools.partial(loss, call, stats))
    found = jax.jit(products)(at, along)
    with jax.enable_x64(True):
        gradient = jax.jit(jax.grad(functools.partial(loss, reference(call), stats), (0, 1)))
        ahead, behind = (
            gradient(*jax.tree.map(lambda a, d, step=step: a + step * d, *double((at, along))))
            for step in (1e-5, -1e-5)
        )
        expected = jax.tree.map(lambda a, b: (a - b) / 2e-5, ahead, behind)
    for product in found:
        assert_close(product, expected, rtol=1e-5)


@each_call
def test_an_ensemble_is_its_members_one_by_one(call):
    gradient = jax.grad(functools.partial(loss, call), (1, 2))

    @jax.jit
    def both(params, batch_stats, x):
        return call(params, batch_stats, x), gradient(batch_stats, params, x)

    members = [call.arrays(seed) for seed in range(3)]
    one_by_one = stacked([both(*member) for member in members])
    assert_close(jax.jit(jax.vmap(both))(*stacked(members)), one_by_one, rtol=1e-5)


@each_call
def test_an_ensemble_may_share_its_input_and_its_statistics(call):
    members = [call.arrays(seed)[0] for seed in range(3)]
    _, stats, x = call.arrays()
    one_by_one = stacked([jax.jit(call)(member, stats, x) for member in members])
    shared = jax.jit(jax.vmap(call, (0, None, None)))(stacked(members), stats, x)
    assert_close(shared, one_by_one, rtol=1e-6)


def test_an_ensemble_may_have_masks_of_its_own():
    masks = jnp.stack([jnp.asarray(NHWC.row_mask(rows)) for rows in (0, 1, 2, 4)])
    params, stats, x = CALLS[0].arrays()

    @jax.jit
    def masked(mask):
        return bnjax.batch_norm(params, stats, x, mutable=True, mask=mask)

    one_by_one = stacked([masked(mask) for mask in masks])
    assert_close(jax.vmap(masked)(masks), one_by_one, rtol=1e-6)


@each_call
def test_strict_configurations_of_jax_find_nothing(call):
    params, stats, x = call.arrays()
    gradient = jax.jit(jax.grad(functools.partial(loss, call, stats), (0, 1)))
    with jax.debug_nans(True), jax.numpy_rank_promotion("raise"):
        slopes = [gradient(params, values) for values in (x, jnp.full_like(x, 12345.678))]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(slopes))


@each_call
def test_rematerializing_changes_no_gradient(call):
    params, stats, x = call.arrays()
    plain, again = (
        jax.jit(jax.grad(functools.partial(loss, f, stats), (0, 1)))
        for f in (call, jax.checkpoint(call))
    )
    assert_close(again(params, x), plain(params, x), rtol=1e-6)


@each_call
def test_an_exported_call_and_its_gradient_come_back_from_bytes(call):
    arrays = call.arrays()
    exported = export.export(jax.jit(call))(*arrays)
    again = export.deserialize(exported.serialize(vjp_order=1))
    assert_close(again.call(*arrays), jax.jit(call)(*arrays), rtol=1e-6)
    params, stats, x = arrays
    slopes = [
        jax.grad(functools.partial(loss, f, stats), (0, 1))(params, x) for f in (again.call, call)
    ]
    assert_close(*slopes, rtol=1e-5)


@pytest.mark.parametrize("call", [CALLS[0], CALLS[1], CALLS[5]], ids=lambda call: call.name)
def test_a_call_is_exported_for_any_batch_size(call):
    params, stats, x = call.arrays()
    shape = export.symbolic_shape(f"b, {', '.join(map(str, x.shape[1:]))}")
    exported = export.export(jax.jit(call))(params, stats, jax.ShapeDtypeStruct(shape, x.dtype))
    for batch in (x, x[:2], jnp.concatenate([x, x])):
        assert_close(exported.call(params, stats, batch), call(params, stats, batch), rtol=1e-6)


@pytest.mark.parametrize("spec", ["b", "4*b"])
def test_virtual_batches_are_exported_for_any_batch_size(spec):
    params, stats, x = CALLS[2].arrays()

    @jax.jit
    def call(x):
        return bnjax.batch_norm(params, stats, x, mutable=True, momentum=None, virtual_batch_size=4)

    shape = export.symbolic_shape(f"{spec}, {x.shape[1]}")
    exported = export.export(call)(jax.ShapeDtypeStruct(shape, x.dtype))
    sizes = (4, 8) if spec == "4*b" else (3, 6, 8)
    for batch in (x[:size] for size in sizes):
        assert_close(exported.call(batch), call(batch), rtol=1e-5)


class Block(nn.Module):
    """One layer of the models below."""

    @nn.compact
    def __call__(self, x):
        return nn.tanh(bnjax.BatchNorm1d(5, momentum=0.25)(nn.Dense(5)(x)))


class Model(nn.Module):
    """Four blocks, one after the other, each as `wrap` makes it."""

    wrap: Callable[[type[Block]], Any] = lambda block: block

    @nn.compact
    def __call__(self, x):
        for i in range(4):
            x = self.wrap(Block)(name=f"block_{i}")(x)
        return x


class Scanned(nn.Module):
    """The same blocks, as one that is scanned over."""

    @nn.compact
    def __call__(self, x):
        scan = nn.scan(
            lambda block, x, _: (block(x), None),
            variable_axes={"params": 0, "batch_stats": 0},
            split_rngs={"params": True},
            length=4,
        )
        return scan(Block(name="blocks"), x, None)[0]


def gradients(model: nn.Module, variables: Any, x: jax.Array) -> tuple[Any, Any]:
    """Loss and moved statistics, and the gradients of the parameters."""

    def loss(params):
        y, updates = model.apply({**variables, "params": params}, x, mutable=["batch_stats"])
        return jnp.sum(y**3), updates

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(variables["params"])


def test_statistics_move_once_in_a_rematerialized_model(rng):
    x = jnp.asarray(NC.values(rng))
    variables = Model().init(KEY, x)
    plain, again = (gradients(model, variables, x) for model in (Model(), Model(nn.remat)))
    assert_close(again, plain, rtol=1e-5, atol=1e-5)  # a bias before a batch norm has no slope


def test_layers_in_a_scan_are_those_in_a_row(rng):
    x = jnp.asarray(NC.values(rng))
    variables = Model().init(KEY, x)
    pile = {
        kind: {"blocks": stacked([tree[f"block_{i}"] for i in range(4)])}
        for kind, tree in variables.items()
    }
    assert jax.tree.map(jnp.shape, Scanned().init(KEY, x)) == jax.tree.map(jnp.shape, pile)
    (value, updates), slopes = gradients(Model(), variables, x)
    expected = [
        {"blocks": stacked([tree[f"block_{i}"] for i in range(4)])}
        for tree in (updates["batch_stats"], slopes)
    ]
    (found, moved), scanned = gradients(Scanned(), pile, x)
    assert_close((found, moved["batch_stats"], scanned), (value, *expected), rtol=1e-5)


def test_an_ensemble_of_layers_has_parameters_and_statistics_of_its_own(rng):
    x = jnp.asarray(NC.values(rng))
    ensemble = nn.vmap(
        Block,
        variable_axes={"params": 0, "batch_stats": 0},
        split_rngs={"params": True},
        in_axes=None,  # pyright: ignore[reportArgumentType] - documented, but typed as int
        axis_size=3,
    )()
    variables = ensemble.init(KEY, x)
    members = [jax.tree.map(lambda leaf, i=i: leaf[i], variables) for i in range(3)]
    expected = stacked([Block().apply(member, x, mutable=["batch_stats"]) for member in members])
    assert_close(ensemble.apply(variables, x, mutable=["batch_stats"]), expected, rtol=1e-5)


def test_training_in_a_scan_over_batches_is_training_one_by_one(rng):
    batches = jnp.asarray(rng.standard_normal((5, 8, 3)), jnp.float32)
    params, stats = bnjax.init(3, momentum=None)

    def step(batch_stats, x):
        y, moved = bnjax.batch_norm(params, batch_stats, x, mutable=True, momentum=None)
        return moved, y

    scanned, _ = jax.lax.scan(step, stats, batches)
    for batch in batches:
        stats, _ = step(stats, batch)
    assert_close(scanned, stats, rtol=1e-6)
