"""Recurrent layers, converted and compared with PyTorch live, and converted back."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import bnjax
from tests.support.state_dicts import F32, mismatch, params, refused

pytest.importorskip("torch", reason="PyTorch is pinned for Python < 3.12 only")

import torch

from tests.support.both_ways import INPUTS, converts_both_ways, outputs

pytestmark = pytest.mark.quick_compile

CELLS = {
    "LSTM": (nn.LSTMCell, nnx.LSTMCell),
    "OptimizedLSTM": (nn.OptimizedLSTMCell, nnx.OptimizedLSTMCell),
    "GRU": (nn.GRUCell, nnx.GRUCell),
    "RNN": (nn.SimpleCell, nnx.SimpleCell),
}


class Torch(torch.nn.Module):
    """A model with one recurrent layer."""

    def __init__(self, name: str, **options: Any) -> None:
        super().__init__()
        make = getattr(torch.nn, name.removeprefix("Optimized"))
        self.rnn = make(6, 5, batch_first=True, **options)

    def forward(self, x: Any) -> Any:
        return self.rnn(x)[0]


class Linen(nn.Module):
    """The same model in linen."""

    cell: Any
    layers: int = 1
    both: bool = False

    def setup(self):
        make: Any = lambda: nn.RNN(self.cell(5))  # noqa: E731
        one: Any = lambda: nn.Bidirectional(make(), make()) if self.both else make()  # noqa: E731
        self.rnn: Any = one() if self.layers == 1 else [one() for _ in range(self.layers)]

    def __call__(self, x):
        for layer in [self.rnn] if self.layers == 1 else self.rnn:
            x = layer(x)
        return x


class Nnx(nnx.Module):
    """The same model in nnx."""

    def __init__(self, cell: Any, layers: int = 1, both: bool = False) -> None:
        rngs = nnx.Rngs(0)
        make: Any = lambda size: nnx.RNN(cell(size, 5, rngs=rngs))  # noqa: E731
        sizes = [6, *[10 if both else 5] * (layers - 1)]
        made: list[Any] = [
            nnx.Bidirectional(make(size), make(size)) if both else make(size) for size in sizes
        ]
        self.rnn: Any = made[0] if layers == 1 else nnx.List(made)

    def __call__(self, x: Any) -> Any:
        for layer in [self.rnn] if not isinstance(self.rnn, nnx.List) else self.rnn:
            x = layer(x)
        return x


def biased_inside(model: Any) -> None:
    """Give nnx's GRU cells the bias that PyTorch's have."""
    for _, module in nnx.iter_modules(model):
        if isinstance(module, nnx.GRUCell):
            module.dense_h = nnx.Linear(5, 15, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {}) for name in CELLS),
        *((name, {"bias": False}) for name in CELLS if name != "OptimizedLSTM"),
        ("LSTM", {"num_layers": 2}),
        ("RNN", {"bidirectional": True}),
        ("GRU", {"num_layers": 2, "bidirectional": True}),
        ("OptimizedLSTM", {"num_layers": 2, "bidirectional": True}),
    ],
)
@pytest.mark.parametrize("framework", ["linen", "nnx"])
def test_recurrent_layers_convert_both_ways(name, options, framework):
    layers, both = options.get("num_layers", 1), options.get("bidirectional", False)
    linen, cell = CELLS[name]
    model = Linen(linen, layers, both) if framework == "linen" else Nnx(cell, layers, both)
    biased_inside(model) if framework == "nnx" else None
    converts_both_ways(Torch(name, **options), model)


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_single_cells_convert_both_ways(name):
    theirs = getattr(torch.nn, f"{name}Cell")(6, 5)
    model = CELLS[name][0](5)
    x, h = INPUTS[:, 0], np.ones((2, 5), F32)
    carry = (np.full((2, 5), 2, F32), h) if name == "LSTM" else h
    variables: Any = model.init(jax.random.key(0), carry, x)
    variables = bnjax.from_torch(theirs.state_dict(), model, variables)
    hidden = (torch.tensor(h), torch.tensor(carry[0])) if name == "LSTM" else torch.tensor(h)
    expected = theirs(torch.tensor(x), hidden)
    expected = expected[0] if name == "LSTM" else expected
    found: Any = model.apply(variables, carry, x)
    np.testing.assert_allclose(found[1], expected.detach(), atol=1e-6)
    back = bnjax.to_torch(variables, theirs.state_dict())
    assert all(torch.equal(back[key], tensor) for key, tensor in theirs.state_dict().items())


def test_half_precision_biases_are_summed_in_float32():
    state_dict = Torch("LSTM").half().state_dict()
    shapes: Any = jax.eval_shape(Linen(nn.LSTMCell).init, jax.random.key(0), INPUTS)
    variables = bnjax.from_torch(state_dict, None, shapes)
    biases = [state_dict[f"rnn.bias_{side}h_l0"].float() for side in "ih"]
    found = variables["params"]["rnn"]["cell"]["hi"]["bias"]
    np.testing.assert_array_equal(found, (biases[0] + biases[1])[:5])
    back = bnjax.to_torch(variables, state_dict)
    assert all(torch.equal(back[key].half(), tensor) for key, tensor in state_dict.items())


def test_gates_that_were_split_by_hand_convert_too():
    theirs = Torch("LSTM")
    state_dict = {}
    for side in "ih":
        rows = theirs.state_dict()[f"rnn.weight_{side}h_l0"].split(5)
        state_dict |= {f"rnn.cell.{side}{g}.weight": w for g, w in zip("ifgo", rows, strict=True)}
    sums = (theirs.rnn.bias_ih_l0 + theirs.rnn.bias_hh_l0).split(5)
    state_dict |= {f"rnn.cell.h{g}.bias": b for g, b in zip("ifgo", sums, strict=True)}
    model = Linen(nn.OptimizedLSTMCell)
    shapes: Any = jax.eval_shape(model.init, jax.random.key(0), INPUTS)
    found: Any = model.apply(bnjax.from_torch(state_dict, model, shapes), INPUTS)
    np.testing.assert_allclose(found, outputs(theirs, INPUTS), atol=1e-6)


def test_gates_stay_stacked_if_the_flax_model_stacks_them():
    state_dict = Torch("LSTM").state_dict()
    variables = params(
        rnn={k.partition(".")[2]: np.zeros(v.shape, F32) for k, v in state_dict.items()}
    )
    new = bnjax.from_torch(state_dict, None, variables)
    np.testing.assert_array_equal(
        new["params"]["rnn"]["weight_ih_l0"], state_dict["rnn.weight_ih_l0"]
    )


class Auto(nn.Module):
    """Two cells, named by Flax."""

    @nn.compact
    def __call__(self, x):
        for _ in range(2):
            x = nn.RNN(nn.OptimizedLSTMCell(5))(jnp.asarray(x))
        return x


def test_errors_list_unmatched_recurrent_layers_as_a_whole():
    theirs = Torch("LSTM", num_layers=2)
    shapes: Any = jax.eval_shape(Auto().init, jax.random.key(0), INPUTS)
    arrays = [
        ", ".join(f"rnn.{w}_{s}h_l{n}" for w in ("weight", "bias") for s in "ih") for n in (0, 1)
    ]
    assert refused(theirs.state_dict(), shapes) == [
        'by order and shape, names match with rename={"rnn.l0": "OptimizedLSTMCell_0", "rnn.l1": '
        '"OptimizedLSTMCell_1"}. Verify it with `check`',
        f"only in PyTorch: LSTM rnn.l0 (6, 5), gates stacked in {arrays[0]}",
        f"only in PyTorch: LSTM rnn.l1 (5, 5), gates stacked in {arrays[1]}",
        "only in Flax: LSTM cell OptimizedLSTMCell_0 (6, 5)",
        "only in Flax: LSTM cell OptimizedLSTMCell_1 (5, 5)",
    ]
    rename = {"rnn.l0": "OptimizedLSTMCell_0", "rnn.l1": "OptimizedLSTMCell_1"}
    converts_both_ways(theirs, Auto(), rename=rename)
    converts_both_ways(
        theirs,
        Auto(),
        rename=lambda name: re.sub(r"rnn\.(.*)_l(\d)", r"OptimizedLSTMCell_\2.\1", name),
    )


def test_recurrent_layers_of_another_kind_or_size_are_refused():
    gru: Any = jax.eval_shape(Linen(nn.GRUCell).init, jax.random.key(0), INPUTS)
    arrays = ", ".join(f"rnn.{w}_{s}h_l0" for w in ("weight", "bias") for s in "ih")
    assert refused(Torch("LSTM").state_dict(), gru) == [
        f"only in PyTorch: LSTM rnn.l0 (6, 5), gates stacked in {arrays}",
        "only in Flax: GRU cell rnn/cell (6, 5)",
    ]
    other: Any = jax.eval_shape(Linen(nn.LSTMCell).init, jax.random.key(0), INPUTS[..., :4])
    first, *_ = refused(Torch("LSTM").state_dict(), other)
    assert first == (
        "wrong shape: rnn.weight_ih_l0[0:5] (5, 6) for params/rnn/cell/ii/kernel (4, 5), which is "
        "(5, 4) in PyTorch"
    )


def test_a_bias_inside_the_reset_gate_is_refused_for_nnx_cells_without_one():
    message = mismatch(
        "no counterpart: rnn.bias_ih_l0 and rnn.bias_hh_l0. The flax.nnx.GRUCell at rnn/cell has "
        "no bias inside its reset gate; add one first: cell.dense_h = nnx.Linear(5, 15, rngs=rngs)"
    )
    theirs: Any = Torch("GRU")
    with pytest.raises(ValueError, match=message):
        bnjax.from_torch(theirs.state_dict(), Nnx(nnx.GRUCell))
    theirs.rnn.bias_hh_l0.data[10:] = 0
    converts_both_ways(theirs, Nnx(nnx.GRUCell))


def test_an_lstm_projection_is_refused():
    theirs = Torch("LSTM", proj_size=2)
    shapes: Any = jax.eval_shape(Linen(nn.LSTMCell).init, jax.random.key(0), INPUTS)
    assert refused(theirs.state_dict(), shapes)[-1] == (
        "only in PyTorch: rnn.weight_hr_l0 (2, 5). It is an LSTM projection (proj_size), which "
        "Flax's cells do not support"
    )


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_non_finite_biases_survive_a_round_trip(value):
    state_dict = {key: tensor * value for key, tensor in Torch("GRU").state_dict().items()}
    shapes: Any = jax.eval_shape(Linen(nn.GRUCell).init, jax.random.key(0), INPUTS)
    back = bnjax.to_torch(bnjax.from_torch(state_dict, None, shapes), state_dict)
    for key, tensor in state_dict.items():
        torch.testing.assert_close(back[key], tensor, rtol=0, atol=0, equal_nan=True)


def test_a_bias_in_flax_is_refused_if_pytorch_has_none():
    theirs = Torch("LSTM", bias=False)
    variables: Any = Linen(nn.LSTMCell).init(jax.random.key(0), INPUTS)
    variables["params"]["rnn"]["cell"]["hi"]["bias"] += 1
    line = "no counterpart: biases of rnn/cell. rnn.l0 has bias=False in PyTorch"
    with pytest.raises(ValueError, match=mismatch(line)):
        bnjax.to_torch(variables, theirs.state_dict())


# After a flatten


class FlatTorch(torch.nn.Module):
    """A conv, and a GRU over its columns, each with all channels and rows."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(2, 3, 3, padding=1)
        self.rnn = torch.nn.GRU(12, 5, batch_first=True)

    def forward(self, x: Any) -> Any:
        x = self.conv(x).permute(0, 3, 1, 2)
        return self.rnn(x.flatten(2))[0]


class FlatFlax(nn.Module):
    def setup(self):
        self.conv = nn.Conv(3, (3, 3), padding=1)
        self.rnn = nn.RNN(nn.GRUCell(5))

    def __call__(self, x):
        x = self.conv(x).transpose(0, 2, 1, 3)
        return self.rnn(x.reshape(*x.shape[:2], -1))


def test_flatten_permutes_a_recurrent_layer(rng):
    x = rng.standard_normal((2, 2, 4, 7)).astype(F32)
    theirs, last = FlatTorch(), np.moveaxis(x, 1, -1)
    shapes: Any = jax.eval_shape(FlatFlax().init, jax.random.key(0), last)
    with pytest.warns(UserWarning, match=r"^'rnn/cell' has 4 inputs for each of the 3 channels of"):
        bnjax.from_torch(theirs.state_dict(), FlatFlax(), shapes)
    flatten = {"rnn/cell": (3, 4)}
    variables = bnjax.from_torch(theirs.state_dict(), FlatFlax(), shapes, flatten=flatten)
    found: Any = FlatFlax().apply(variables, last)
    np.testing.assert_allclose(found, outputs(theirs, x), atol=1e-6)
    back = bnjax.to_torch(variables, theirs.state_dict(), flatten=flatten)
    assert all(torch.equal(back[key], tensor) for key, tensor in theirs.state_dict().items())
