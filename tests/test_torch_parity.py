"""The layers beside PyTorch's, live: outputs, gradients, running statistics and counter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import bnjax
from tests.support.cases import NCHW, Case, Outcome, each_case, run_layer
from tests.support.oracle import assert_close

torch = pytest.importorskip("torch", reason="PyTorch is pinned for Python < 3.12 only")

# PyTorch allows 1.0, so it is compared here; that it warns is tested elsewhere.
pytestmark = [
    pytest.mark.filterwarnings(r"ignore:momentum=1\.0 gives the new batch:UserWarning"),
    pytest.mark.quick_compile,
]

MOMENTA = (0.1, 0.0, 1.0, None)
WITHIN = {"float32": 1e-5, "float64": 1e-12}
BIAS_AND_SCALE = {"bias": "bias", "scale": "weight"}
LAYERS = {1: bnjax.BatchNorm1d, 2: bnjax.BatchNorm2d, 3: bnjax.BatchNorm3d}

each_dtype = pytest.mark.parametrize("dtype", WITHIN)
TRACKED = [
    {"affine": affine, "momentum": momentum} for affine in (True, False) for momentum in MOMENTA
]
UNTRACKED = [{"affine": affine, "track_running_stats": False} for affine in (True, False)]


class Pair:
    """A bnjax layer and its twin in PyTorch, with the same parameters."""

    def __init__(self, case: Case, dtype: str, rng: np.random.Generator, **settings) -> None:
        self.case, self.dtype, self.rng = case, dtype, rng
        self.layer = case.layer(
            case.channels, axis=case.axis, param_dtype=jnp.dtype(dtype), **settings
        )
        self.twin = getattr(torch.nn, case.layer.__name__)(case.channels, **settings)
        self.twin.to(getattr(torch, dtype))
        self.variables = jax.jit(self.layer.init)(jax.random.key(0), self.batch())
        if "params" in self.variables:
            params = {key: v.astype(dtype) for key, v in case.params(rng).items()}
            self.variables = {**self.variables, "params": params}
            for key, name in BIAS_AND_SCALE.items():
                getattr(self.twin, name).data = torch.tensor(params[key])

    def batch(self) -> np.ndarray:
        return self.case.values(self.rng).astype(self.dtype)

    def step(self, x: np.ndarray, dy: np.ndarray, *, mutable: bool) -> None:
        """Both take one step, and agree; the statistics are kept for the next."""
        found = run_layer(self.layer, self.variables, x, dy, mutable=mutable)
        within = WITHIN[self.dtype]
        assert_close(found, self.torch_outcome(x, dy, mutable), rtol=within, atol=within)
        if found.batch_stats:
            self.variables = {**self.variables, "batch_stats": found.batch_stats}

    def torch_outcome(self, x: np.ndarray, dy: np.ndarray, mutable: bool) -> Outcome:
        channels_first = torch.tensor(np.moveaxis(x, self.case.axis, 1), requires_grad=True)
        self.twin.train(mutable)
        self.twin.zero_grad()
        y = self.twin(channels_first)
        y.backward(torch.tensor(np.moveaxis(dy, self.case.axis, 1)))
        stats, params = {}, {}
        if self.twin.running_mean is not None:
            stats = {"mean": self.twin.running_mean, "var": self.twin.running_var}
            if self.twin.momentum is None:
                stats["count"] = self.twin.num_batches_tracked
        if self.twin.affine:
            params = {key: getattr(self.twin, name).grad for key, name in BIAS_AND_SCALE.items()}
        return Outcome(
            np.moveaxis(y.detach().numpy(), 1, self.case.axis),
            {key: value.numpy() for key, value in stats.items()},
            np.moveaxis(channels_first.grad.numpy(), 1, self.case.axis),
            {key: value.numpy() for key, value in params.items()},
        )

    def train_and_evaluate(self, steps: int = 3) -> None:
        for _ in range(steps):
            self.step(self.batch(), self.batch(), mutable=True)
        self.step(self.batch(), self.batch(), mutable=False)


def precision(dtype: str):
    return jax.enable_x64(dtype == "float64")


@each_case
@each_dtype
def test_every_layout_trains_and_evaluates_as_in_torch(rng, case, dtype):
    with precision(dtype):
        Pair(case, dtype, rng).train_and_evaluate()


@pytest.mark.parametrize("settings", TRACKED + UNTRACKED, ids=str)
@each_dtype
def test_every_setting_trains_and_evaluates_as_in_torch(rng, settings, dtype):
    with precision(dtype):
        Pair(NCHW, dtype, rng, eps=1e-3, **settings).train_and_evaluate()


@st.composite
def layouts(draw) -> Case:
    """A layer and an input of it with at least four values per channel."""
    spatial = draw(st.integers(0, 3))
    sizes = draw(st.lists(st.integers(1, 5), min_size=spatial + 1, max_size=spatial + 1))
    sizes[0] += 3
    axis = draw(st.sampled_from([1, -1]))
    shape = [*sizes]
    shape.insert(1 if axis == 1 else len(shape), draw(st.integers(1, 6)))
    return Case("drawn", tuple(shape), axis, LAYERS[max(spatial, 1)])


@given(
    case=layouts(),
    dtype=st.sampled_from(list(WITHIN)),
    seed=st.integers(0, 2**32 - 1),
    affine=st.booleans(),
    tracked=st.booleans(),
    momentum=st.sampled_from((*MOMENTA, 0.3)),
    eps=st.sampled_from([1e-5, 1e-3, 1.0]),
)
def test_drawn_layouts_and_settings_agree_with_torch(
    case, dtype, seed, affine, tracked, momentum, eps
):
    settings = {"affine": affine, "track_running_stats": tracked, "momentum": momentum}
    with precision(dtype):
        pair = Pair(case, dtype, np.random.default_rng(seed), eps=eps, **settings)
        pair.train_and_evaluate(steps=2)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_input_keeps_float32_statistics_as_in_torch(rng, dtype):
    x = NCHW.values(rng, mean=20.0)
    twin = torch.nn.BatchNorm2d(6)
    y = twin(torch.tensor(x).to(getattr(torch, dtype)))
    layer = bnjax.BatchNorm2d(6, axis=1)
    x = jnp.asarray(x, dtype)
    found, updates = layer.apply(layer.init(jax.random.key(0), x), x, mutable=["batch_stats"])
    stats = {"mean": twin.running_mean.numpy(), "var": twin.running_var.numpy()}
    assert_close(updates["batch_stats"], stats, rtol=1e-5)
    assert_close(found, y.detach().float().numpy(), atol=4 * float(jnp.finfo(dtype).eps))
    assert found.dtype == jnp.dtype(dtype)


def test_a_single_value_per_channel_is_refused_in_both(rng):
    x = rng.standard_normal((1, 3)).astype(np.float32)
    sentence = r"^Expected more than 1 value per channel when training, got input s"
    with pytest.raises(ValueError, match=sentence):
        torch.nn.BatchNorm1d(3)(torch.tensor(x))
    layer = bnjax.BatchNorm1d(3)
    variables = layer.init(jax.random.key(0), x)
    with pytest.raises(ValueError, match=sentence):
        layer.apply(variables, x, mutable=["batch_stats"])
    twin = torch.nn.BatchNorm1d(3).eval()
    assert_close(layer.apply(variables, x), twin(torch.tensor(x)).detach().numpy(), rtol=1e-6)


def test_an_empty_batch_leaves_the_statistics_in_both():
    x = np.ones((0, 3), np.float32)
    twin = torch.nn.BatchNorm1d(3)
    y = twin(torch.tensor(x)).detach().numpy()
    layer = bnjax.BatchNorm1d(3)
    variables = layer.init(jax.random.key(0), jnp.ones((2, 3)))
    found, updates = layer.apply(variables, x, mutable=["batch_stats"])
    stats = {"mean": twin.running_mean.numpy(), "var": twin.running_var.numpy()}
    assert_close((found, updates["batch_stats"]), (y, stats))
