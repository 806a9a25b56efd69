"""A scale and bias for each example: torch's layer without affine map, then those of a class."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import bnjax
from bnjax import policies
from tests.support import banks, oracle
from tests.support.cases import NCHW, NHWC, Case
from tests.support.oracle import assert_close

pytestmark = pytest.mark.quick_compile

CLASSES = np.array([2, 0, 2, 1, 0, 2])
CASES = (
    Case("NC", (6, 5), -1, bnjax.BatchNorm1d),
    Case("NLC", (6, 4, 5), -1, bnjax.BatchNorm1d),
    NHWC._replace(shape=(6, 3, 2, 5)),
    NCHW._replace(shape=(6, 5, 3, 2)),
    Case("NDHWC", (6, 2, 3, 2, 5), -1, bnjax.BatchNorm3d),
)
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
CHANNELS_LAST, CHANNELS_FIRST = CASES[2], CASES[3]


def make(case: Case, dtype: Any = np.float32) -> tuple[Any, ...]:
    """Tables of scale and bias by class, parameters, statistics, input and cotangent."""
    rng = np.random.default_rng(0)
    tables = 1 + rng.normal(size=(2, 3, 5))
    given = *tables, case.params(rng), case.batch_stats(rng), case.values(rng), case.values(rng)
    return jax.tree.map(lambda a: np.asarray(a, dtype), given)


def by_torch(case: Case, mutable: bool, given: tuple[Any, ...]) -> Any:
    """Output, moved statistics, and the gradients of tables, learned scale and bias, and x."""
    torch = pytest.importorskip("torch")

    kinds = torch.nn.BatchNorm1d, torch.nn.BatchNorm1d, torch.nn.BatchNorm2d, torch.nn.BatchNorm3d
    scales, biases, params, stats, x, cotangent = jax.tree.map(
        lambda a: torch.from_numpy(np.array(a)), given
    )
    layer = kinds[len(case.shape) - 2](5, affine=bool(params)).to(x.dtype)
    named = {"running_mean": stats["mean"], "running_var": stats["var"]}
    learned = {"weight": params["scale"], "bias": params["bias"]} if params else {}
    layer.load_state_dict(named | learned, strict=False)
    layer.train(mutable)
    leaves = [each.requires_grad_() for each in (scales, biases, x)]
    wide = (6, 5, *[1] * (len(case.shape) - 2))
    y = layer(x.movedim(case.axis, 1))
    y = y * scales[CLASSES].reshape(wide) + biases[CLASSES].reshape(wide)
    y = y.movedim(1, case.axis)
    (y * cotangent).sum().backward()
    grads = [leaf.grad.numpy() for leaf in leaves]
    of_params = {"scale": layer.weight.grad, "bias": layer.bias.grad} if params else {}
    moved = {name: getattr(layer, f"running_{name}").numpy() for name in ("mean", "var")}
    return y.detach().numpy(), moved, (*grads[:2], jax.tree.map(np.asarray, of_params), grads[2])


def by_bnjax(case: Case, mutable: bool, given: tuple[Any, ...], **told: Any) -> Any:
    *leaves, stats, x, cotangent = given
    scales, biases, params = leaves
    told = {"axis": case.axis, "mutable": mutable} | told

    @jax.jit
    def run(scales, biases, params, x):
        def loss(scales, biases, params, x):
            scale, bias = scales[CLASSES], biases[CLASSES]
            y, moved = bnjax.batch_norm(params, stats, x, scale=scale, bias=bias, **told)
            return jnp.sum(y * cotangent), (y, moved)

        return jax.grad(loss, (0, 1, 2, 3), has_aux=True)(scales, biases, params, x)

    grads, (y, moved) = jax.device_get(run(*map(banks.tree, (scales, biases, params, x))))
    return y, moved, grads


@each_case
@pytest.mark.parametrize("affine", [True, False], ids=["learned too", "alone"])
@pytest.mark.parametrize("mutable", [True, False], ids=["train", "evaluate"])
def test_it_equals_torch_and_a_table_by_class(case, affine, mutable):
    given = make(case)
    given = given if affine else (*given[:2], {}, *given[3:])
    found = by_bnjax(case, mutable, given)
    assert_close(found, by_torch(case, mutable, given), rtol=1e-5)


@each_case
def test_in_float64_all_digits_are_equal(x64, case):
    given = make(case, np.float64)
    assert_close(by_bnjax(case, True, given), by_torch(case, True, given), rtol=1e-12)


SHAPES = {
    "(N, C)": (6, 5),
    "(N, 1)": (6, 1),
    "(1, C)": (1, 5),
    "(C,)": (5,),
    "()": (),
    "like x": (6, 1, 1, 5),
    "like x, one channel": (6, 1, 1, 1),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("case", [CHANNELS_LAST, CHANNELS_FIRST], ids=lambda case: case.name)
@pytest.mark.parametrize("name", ["scale", "bias"])
def test_it_broadcasts_to_examples_and_channels(shape, case, name):
    _, _, params, stats, x, _ = make(case)
    if len(shape) == 4:  # in x's layout
        shape = tuple(np.moveaxis(np.empty(shape), -1, case.axis).shape)
    value = np.random.default_rng(1).normal(size=shape).astype("f")
    told: Any = {"mutable": True, "axis": case.axis}
    y, moved = bnjax.batch_norm(params, stats, x, **{**told, name: value})
    plain, new = bnjax.batch_norm(params, stats, x, **told)
    wide = value
    if len(shape) < 4:
        wide = np.broadcast_to(value, (6, 5))
        wide = wide.reshape(6, 1, 1, 5) if case.axis == -1 else wide.reshape(6, 5, 1, 1)
    assert_close(y, plain * wide if name == "scale" else plain + wide, rtol=1e-5)
    assert_close(moved, new, rtol=1e-6)


@pytest.mark.parametrize("kind", ["rows", "positions", "channels"])
def test_masked_positions_are_seen_by_nothing(kind):
    scales, biases, params, stats, x, cotangent = make(CHANNELS_LAST)
    rng = np.random.default_rng(2)
    shapes = {"rows": (6, 1, 1, 1), "positions": (6, 3, 2, 1), "channels": x.shape}
    mask = rng.random(shapes[kind]) < 0.7
    given = scales, biases, params, stats, x, cotangent * mask
    y, moved, (*_, dx) = by_bnjax(CHANNELS_LAST, True, given, mask=mask)
    wide = (6, 1, 1, 5)
    pull = cotangent * mask * scales[CLASSES].reshape(wide)
    wanted = oracle.batch_norm(params, stats, x, pull, mutable=True, mask=mask)
    seen = np.broadcast_to(mask, x.shape)
    y_wanted = wanted.y * scales[CLASSES].reshape(wide) + biases[CLASSES].reshape(wide)
    assert_close(y[seen], y_wanted[seen], rtol=1e-5)
    assert_close((moved, dx), (wanted.batch_stats, wanted.dx), rtol=1e-5)
    wild = by_bnjax(
        CHANNELS_LAST, True, (*given[:4], np.where(mask, x, np.nan), given[5]), mask=mask
    )
    assert_close(jax.tree.map(np.nan_to_num, wild[1:]), (moved, (*_, dx)), rtol=1e-6)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_virtual_batches_keep_their_examples(size):
    scales, biases, params, stats, x, _ = make(CHANNELS_LAST)
    told: Any = {"mutable": True, "virtual_batch_size": size}
    scale, bias = scales[CLASSES], biases[CLASSES]
    y, moved = bnjax.batch_norm(params, stats, x, scale=scale, bias=bias, **told)
    plain, new = bnjax.batch_norm(params, stats, x, **told)
    wide = (6, 1, 1, 5)
    assert_close(y, plain * scale.reshape(wide) + bias.reshape(wide), rtol=1e-5)
    assert_close(moved, new, rtol=1e-6)


POLICIES = policies.Renorm(1.5, 0.5), policies.Running(), policies.Blend(3), policies.Example(0.4)


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_it_comes_after_what_a_policy_makes(policy):
    scales, biases, params, stats, x, _ = make(CHANNELS_LAST)
    told: Any = {"mutable": True, "using": policy}
    scale, bias = scales[CLASSES], biases[CLASSES]
    y, _ = bnjax.batch_norm(params, stats, x, scale=scale, bias=bias, **told)
    plain, _ = bnjax.batch_norm(params, stats, x, **told)
    wide = (6, 1, 1, 5)
    assert_close(y, plain * scale.reshape(wide) + bias.reshape(wide), rtol=1e-5)


def test_it_comes_after_the_bank_of_an_example():
    data = banks.make(CHANNELS_LAST, "both", np.array([1, 0, 0, 1, 1, 0]), 2)
    scales, biases, *_ = make(CHANNELS_LAST)
    told: Any = {"mutable": True, "bank": data.bank}
    scale, bias = scales[CLASSES], biases[CLASSES]
    arrays = data.params, data.batch_stats, data.x
    y, _ = bnjax.batch_norm(*arrays, scale=scale, bias=bias, **told)
    plain, _ = bnjax.batch_norm(*arrays, **told)
    wide = (6, 1, 1, 5)
    assert_close(y, plain * scale.reshape(wide) + bias.reshape(wide), rtol=1e-5)


def test_half_precision_is_rounded_once():
    scales, biases, params, stats, x, _ = make(CHANNELS_LAST)
    half = jnp.asarray(x, jnp.bfloat16)
    told: Any = {"mutable": True, "scale": scales[CLASSES], "bias": biases[CLASSES]}
    y, _ = bnjax.batch_norm(params, stats, half, **told)
    wanted, _ = bnjax.batch_norm(params, stats, half.astype(jnp.float32), **told)
    assert y.dtype == jnp.bfloat16
    assert_close(y, wanted, rtol=0.005)


@pytest.mark.parametrize("size", [None, 3])
def test_gradients_of_half_precision_are_rounded_once(size):
    """Those through the statistics and through the output are added in float32."""
    rng = np.random.default_rng(0)
    x, cotangent = (jnp.asarray(rng.normal(size=(6, 4, 4, 8)), jnp.bfloat16) for _ in range(2))
    params, stats = bnjax.init(8)

    def gradient(x: jax.Array) -> jax.Array:
        def loss(x: jax.Array) -> jax.Array:
            told: Any = {"mutable": True, "virtual_batch_size": size, "dtype": jnp.float32}
            each = jnp.ones((6, 8)), jnp.zeros((6, 8))
            y, _ = bnjax.batch_norm(params, stats, x, scale=each[0], bias=each[1], **told)
            return jnp.sum(y * cotangent.astype(y.dtype))

        return jax.grad(loss)(x)

    wanted = gradient(x.astype(jnp.float32)).astype(jnp.bfloat16)
    assert jnp.mean(gradient(x) != wanted) < 0.01


@pytest.mark.parametrize("kind", ["linen", "nnx", "drop-in"])
def test_layers_pass_it_on(kind):
    scales, biases, _, stats, x, _ = make(CHANNELS_LAST)
    given: Any = {"scale": scales[CLASSES], "bias": biases[CLASSES]}
    wanted = bnjax.batch_norm({}, stats, x, mutable=True, **given)
    if kind == "nnx":
        layer = bnjax.nnx.BatchNorm2d(5, affine=False, rngs=nnx.Rngs(0))
        layer.mean[...], layer.var[...] = stats["mean"], stats["var"]
        y = layer(jnp.asarray(x), **given)
        moved: Any = {"mean": layer.mean[...], "var": layer.var[...]}
    else:
        linen: Any = bnjax.BatchNorm2d(5, affine=False)
        if kind == "drop-in":
            linen = bnjax.linen.BatchNorm(False, momentum=0.9, use_scale=False, use_bias=False)
            wanted = bnjax.batch_norm({}, stats, x, mutable=True, correction=0, **given)
        y, updates = linen.apply({"batch_stats": stats}, x, mutable=["batch_stats"], **given)
        moved = updates["batch_stats"]
    assert_close((y, moved), wanted, rtol=1e-6)
