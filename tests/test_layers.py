"""What holds for every layer, of linen and of nnx, in either convention."""

import copy
import pickle
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax.experimental import checkify

import bnjax
from tests.support.oracle import assert_close

pytestmark = pytest.mark.quick_compile

KEY = jax.random.key(0)
SHAPES = {"BatchNorm1d": (8, 3), "BatchNorm2d": (4, 2, 2, 3), "BatchNorm3d": (2, 2, 2, 1, 3)}


class Layer(NamedTuple):
    """A kind of layer, with one way to call it for linen and nnx: statistics in and out."""

    room: Any
    name: str

    @property
    def x(self) -> jax.Array:
        shape = SHAPES.get(self.name, (8, 3))
        return jnp.asarray(np.random.default_rng(0).normal(3, 2, shape), jnp.float32)

    def make(self, **settings: Any) -> Any:
        kind = getattr(self.room, self.name)
        if self.room is bnjax.nnx:
            return kind(3, **settings, rngs=nnx.Rngs(0))
        return kind(**({} if self.name == "BatchNorm" else {"num_features": 3}), **settings)

    def statistics(self, layer: Any, x: Any) -> Any:
        if self.room is bnjax.nnx:
            return nnx.to_pure_dict(nnx.state(layer, nnx.BatchStat))
        return layer.init(KEY, x, use_running_average=True)["batch_stats"]

    def call(self, layer: Any, stats: Any, x: Any, *, train: bool) -> tuple[jax.Array, Any]:
        """The output, and the statistics after the call."""
        if self.room is bnjax.nnx:
            graph, state, rest = nnx.split(layer, nnx.BatchStat, ...)
            nnx.replace_by_pure_dict(state, stats)
            layer = nnx.merge(graph, state, rest)
            y = layer(x, use_running_average=not train)
            return y, nnx.to_pure_dict(nnx.state(layer, nnx.BatchStat))
        params = layer.init(KEY, x, use_running_average=True)["params"]
        variables = {"params": params, "batch_stats": stats}
        y, updates = layer.apply(
            variables, x, use_running_average=not train, mutable=["batch_stats"]
        )
        return y, updates["batch_stats"]


LINEN, NNX = (
    [
        pytest.param(Layer(room, name), id=f"{room.__name__}.{name}")
        for name in (*SHAPES, "BatchNorm")
    ]
    for room in (bnjax.linen, bnjax.nnx)
)
LAYERS = LINEN + NNX
each_layer = pytest.mark.parametrize("layer", LAYERS)
each_mode = pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])


def outcome(layer: Layer, *, train: bool) -> Any:
    """Output, statistics and the gradient to x of one call."""
    made = layer.make()
    stats = layer.statistics(made, layer.x)

    def loss(x):
        y, moved = layer.call(made, stats, x, train=train)
        return jnp.sum(y**3), (y, moved)

    return jax.grad(loss, has_aux=True)(layer.x)


def cast(tree: Any, dtype: str) -> Any:
    return jax.tree.map(lambda leaf: leaf.astype(dtype), tree)


@each_layer
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_statistics_that_were_cast_to_half_precision_are_float32_after_a_training_call(
    layer, dtype
):
    x = (layer.x - 3) * 300  # variances beyond the largest float16
    made = layer.make()
    stats = cast(layer.statistics(made, x), dtype)
    for _ in range(60):
        _, stats = layer.call(made, stats, x.astype(dtype), train=True)
    assert jax.tree.map(jnp.result_type, stats) == {"mean": "float32", "var": "float32"}
    values = np.asarray(x.astype(dtype), np.float64)
    n = values.size // 3
    share = 1 - (0.99 if layer.name == "BatchNorm" else 0.9) ** 60
    ddof = 0 if layer.name == "BatchNorm" else 1
    var = values.reshape(n, 3).var(0, ddof=ddof)
    assert_close(stats["var"], share * var + 1 - share, rtol=1e-5)


@each_layer
def test_half_precision_statistics_are_left_as_they_are_in_evaluation(layer):
    made = layer.make()
    stats = cast(layer.statistics(made, layer.x), "float16")
    y, after = layer.call(made, stats, layer.x, train=False)
    assert jax.tree.map(jnp.result_type, after) == {"mean": "float16", "var": "float16"}
    assert_close(y, layer.x / np.sqrt(1 + 1e-5), rtol=1e-6)


@each_layer
def test_a_scan_carries_float32_statistics_and_names_the_dtypes_where_they_are_half(layer):
    made = layer.make()
    stats = layer.statistics(made, layer.x)

    def train(stats):
        step = lambda stats, x: layer.call(made, stats, x, train=True)[::-1]  # noqa: E731 - a scan's
        return jax.lax.scan(step, stats, jnp.stack([layer.x] * 3))[0]

    assert jax.tree.map(jnp.result_type, train(stats)) == {"mean": "float32", "var": "float32"}
    with pytest.raises(TypeError, match=r"float16\[3\].*float32\[3\]"):
        train(cast(stats, "float16"))


def test_a_scan_carries_the_complex_mean_of_the_drop_in():
    layer = bnjax.linen.BatchNorm(use_running_average=False, momentum=0.9)
    x = jnp.arange(12.0).reshape(2, 3, 2) * (1 + 2j)
    variables = layer.init(KEY, x[0])

    def step(stats, x):
        _, updates = layer.apply({**variables, "batch_stats": stats}, x, mutable=["batch_stats"])
        return updates["batch_stats"], None

    stats, _ = jax.lax.scan(step, variables["batch_stats"], x)
    means = np.asarray(x).mean(1)
    assert_close(stats["mean"], 0.1 * (0.9 * means[0] + means[1]), rtol=1e-6)


def test_the_nnx_drop_in_keeps_the_imaginary_part_of_the_mean():
    layer = bnjax.nnx.BatchNorm(1, momentum=0.9, rngs=nnx.Rngs(0))
    x = jnp.array([[1 + 2j], [3 + 4j], [5 + 6j]])
    layer(x)
    assert_close(layer.mean[...], jnp.array([0.3 + 0.4j]), rtol=1e-6)
    layer.eval()
    assert_close(layer(x), (x - layer.mean[...]) / np.sqrt(layer.var[...] + 1e-5), rtol=1e-6)


@pytest.mark.parametrize("kind", [bnjax.nnx.BatchNorm2d, bnjax.nnx.BatchNorm])
def test_an_nnx_layer_without_its_popped_statistics_is_an_error(kind):
    layer = kind(3, rngs=nnx.Rngs(0))
    x = jnp.ones((2, 2, 2, 3))
    layer.eval()
    y = layer(x)
    popped = nnx.pop(layer, nnx.BatchStat)
    message = (
        "The layer must have the statistics ['mean', 'var'], but ['mean', 'var'] are gone, as "
        "after `nnx.pop(model, nnx.BatchStat)`. Put them back with "
        f"`nnx.update(model, statistics)`.\nIn {kind.__name__} of 3 features."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        layer(x)
    nnx.update(layer, popped)
    assert_close(layer(x), y)


@each_layer
@each_mode
def test_a_layer_does_the_same_without_jit(layer, train):
    expected = outcome(layer, train=train)
    with jax.disable_jit():
        found = outcome(layer, train=train)
    assert_close(found, expected, rtol=1e-5, atol=1e-5)


@each_layer
@each_mode
def test_a_layer_does_the_same_while_jax_looks_for_nan(layer, train):
    expected = outcome(layer, train=train)
    with jax.debug_nans(True):
        assert_close(outcome(layer, train=train), expected, rtol=1e-6, atol=1e-6)


@each_layer
@each_mode
def test_checkify_finds_nothing_in_a_layer_and_nan_where_it_is(layer, train):
    made = layer.make()
    stats = layer.statistics(made, layer.x)
    run = jax.jit(
        checkify.checkify(
            lambda x: layer.call(made, stats, x, train=train)[0], errors=checkify.float_checks
        )
    )
    error, y = run(layer.x)
    error.throw()
    assert_close(y, layer.call(made, stats, layer.x, train=train)[0], rtol=1e-5, atol=1e-6)
    error, _ = run(layer.x.at[0].set(jnp.nan))
    with pytest.raises(checkify.JaxRuntimeError, match="nan generated by primitive"):
        error.throw()


@each_layer
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda made: pickle.loads(pickle.dumps(made))])
def test_a_copy_of_a_layer_acts_like_the_layer(layer, copied):
    made = layer.make()
    stats = layer.statistics(made, layer.x)
    expected = layer.call(made, stats, layer.x, train=True)
    twin = copied(made)
    assert_close(layer.call(twin, stats, layer.x, train=True), expected)
    assert type(twin) is type(made)


class Linen(nn.Module):
    """A model of one layer, with a name of its own."""

    layer: Any

    @nn.compact
    def __call__(self, x):
        return self.layer.clone(name="bn", parent=self)(x, use_running_average=False)


WIDE: dict[str, Any] = {"console_kwargs": {"width": 200, "force_terminal": False}}
FLOPS: dict[str, Any] = {"compute_flops": True, "compute_vjp_flops": True}


@pytest.mark.parametrize("settings", [{}, FLOPS], ids=["shapes", "flops"])
@pytest.mark.parametrize("layer", LINEN)
def test_a_linen_layer_is_one_row_of_its_table(layer, settings):
    table = Linen(layer.make()).tabulate(KEY, layer.x, **settings, **WIDE)
    rows = [line for line in table.splitlines() if re.match(r"│ bn +│", line)]
    assert len(rows) == 1, table
    assert f"│ {layer.name} " in rows[0]
    assert re.search(r"mean: float32\[3\]", rows[0]), table
    assert re.search(r"bias: float32\[3\]", rows[0]), table


def test_a_layer_whose_mode_is_mutable_is_tabulated_without_a_warning():
    table = bnjax.BatchNorm1d(3).tabulate(KEY, jnp.ones((8, 3)), **FLOPS, **WIDE)
    assert "BatchNorm1d" in table


@pytest.mark.parametrize("settings", [{}, FLOPS], ids=["shapes", "flops"])
@pytest.mark.parametrize("layer", NNX)
def test_an_nnx_layer_is_tabulated_and_shown_and_then_acts_as_before(layer, settings, capsys):
    model = nnx.Sequential(layer.make())
    expected = layer.call(
        layer.make(), layer.statistics(model.layers[0], layer.x), layer.x, train=True
    )
    table = nnx.tabulate(model, layer.x, **settings, **WIDE)
    assert f"│ {layer.name} " in table
    nnx.display(model)
    assert layer.name in capsys.readouterr().out
    stats = layer.statistics(model.layers[0], layer.x)
    assert_close(layer.call(model.layers[0], stats, layer.x, train=True), expected)


class Deep(nn.Module):
    """A layer two modules down."""

    layer: Any

    @nn.compact
    def __call__(self, x):
        return nn.Sequential([nn.Dense(3), Linen(self.layer)])(x)


LINEN_MISTAKES: dict[str, tuple[Callable[[], Any], str]] = {
    "rank": (
        lambda: bnjax.BatchNorm2d(3),
        "BatchNorm2d expected 4D input (N, H, W, C), got 2D input of shape (8, 3). Use "
        "BatchNorm1d, or reshape the input.\nIn BatchNorm2d at 'Linen_0/bn'.",
    ),
    "channels": (
        lambda: bnjax.BatchNorm1d(5),
        "`num_features` is 5, but axis 1 of the input of shape (8, 3) has 3 channels. Make the "
        "layer for the channels it gets.\nIn BatchNorm1d at 'Linen_0/bn'.",
    ),
    "axis": (
        lambda: bnjax.linen.BatchNorm(axis=7),
        "`axis` must lie between -2 and 1 for an input of 2 dimensions, got 7. It names the "
        "channel axis: -1 for channels last, 1 for NCHW.\nIn BatchNorm at 'Linen_0/bn'.",
    ),
}


@pytest.mark.parametrize(("make", "message"), LINEN_MISTAKES.values(), ids=list(LINEN_MISTAKES))
def test_an_error_deep_in_a_linen_model_names_the_layer_and_its_path(make, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        Deep(make()).init(KEY, jnp.ones((8, 3)))


def test_an_error_of_an_initializer_names_the_layer_too():
    def broken(*_: Any) -> Any:
        raise RuntimeError("no such scale")

    message = "^no such scale\nIn BatchNorm1d at the top of the model"
    with pytest.raises(RuntimeError, match=message):
        bnjax.BatchNorm1d(3, scale_init=broken).init(KEY, jnp.ones((8, 3)))


@pytest.mark.parametrize("value", ["3", True, 3.0, -1], ids=repr)
def test_the_number_of_channels_is_an_integer(value):
    message = f"`num_features` must be an integer and not negative, got {value!r}."
    for make in (bnjax.BatchNorm2d, lambda value: bnjax.nnx.BatchNorm2d(value, rngs=nnx.Rngs(0))):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
            make(value)


@pytest.mark.parametrize("layer", LAYERS)
def test_a_momentum_of_one_half_is_the_same_in_both_conventions_and_does_not_warn(layer):
    assert layer.make(momentum=0.5).momentum == 0.5
