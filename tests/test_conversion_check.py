"""Layers after a flatten, and `check`, which finds the first layer that differs from PyTorch."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import bnjax
from tests.support.state_dicts import F32

pytestmark = pytest.mark.quick_compile

torch = pytest.importorskip("torch", reason="PyTorch is pinned for Python < 3.12 only")


class Torch(torch.nn.Module):
    """A batch norm and a linear layer right after a flatten, as in fastai's heads."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 3, padding=1)
        self.bn1 = torch.nn.BatchNorm2d(4)
        self.bn = torch.nn.BatchNorm1d(24)
        self.fc = torch.nn.Linear(24, 5)

    def forward(self, x: Any) -> Any:
        x = torch.relu_(self.bn1(self.conv(x)))
        return self.fc(self.bn(x.flatten(1)))


class Flax(nn.Module):
    eps: float = 1e-5
    padding: int = 1
    kernel: int = 3

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(4, (self.kernel, self.kernel), padding=self.padding, name="conv")(x)
        make = nn.BatchNorm(use_running_average=not train, epsilon=self.eps, name="bn1")
        x = nn.relu(make(x)).reshape(len(x), -1)
        return nn.Dense(5, name="fc")(bnjax.BatchNorm1d(name="bn")(x))


class Nnx(nnx.Module):
    def __init__(self, eps: float = 1e-5) -> None:
        rngs = nnx.Rngs(0)
        self.conv = nnx.Conv(3, 4, (3, 3), padding=1, rngs=rngs)
        self.bn1 = bnjax.nnx.BatchNorm2d(4, eps=eps, rngs=rngs)
        self.bn = bnjax.nnx.BatchNorm1d(24, rngs=rngs)
        self.fc = nnx.Linear(24, 5, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        x = nnx.relu(self.bn1(self.conv(x)))
        return self.fc(self.bn(x.reshape(len(x), -1)))


FLATTEN = {"bn": (4, 3, 2), "fc": (4, 3, 2)}
X = np.random.default_rng(0).standard_normal((2, 3, 3, 2)).astype(F32)  # channels first
LAST = np.moveaxis(X, 1, -1)


@pytest.fixture
def theirs() -> Any:
    generator = torch.manual_seed(0)
    model = Torch()
    for layer in (model.bn1, model.bn):
        for name in ("running_mean", "weight", "bias"):
            torch.nn.init.normal_(getattr(layer, name), generator=generator)
        torch.nn.init.uniform_(layer.running_var, 0.1, 2, generator=generator)
    return model.eval()


def converted(theirs: Any, model: Any = None, **options: Any) -> Any:
    model = Flax() if model is None else model
    if isinstance(model, nnx.Module):
        return bnjax.from_torch(theirs.state_dict(), model, **options)
    shapes: Any = jax.eval_shape(Flax().init, jax.random.key(0), LAST)
    return bnjax.from_torch(theirs.state_dict(), model, shapes, **options)


def exactly(*lines: str) -> str:
    return "^" + re.escape("\n".join(lines)) + "$"


# A flatten


def test_flatten_permutes_a_batch_norm(theirs):
    variables = converted(theirs, flatten=FLATTEN)
    found: Any = Flax().apply(variables, LAST)
    np.testing.assert_allclose(found, theirs(torch.tensor(X)).detach(), atol=1e-5)
    mean = theirs.bn.running_mean.numpy().reshape(4, 3, 2).transpose(1, 2, 0).reshape(-1)
    np.testing.assert_array_equal(variables["batch_stats"]["bn"]["mean"], mean)
    back = bnjax.to_torch(variables, theirs.state_dict(), flatten=FLATTEN)
    assert all(torch.equal(back[key], tensor) for key, tensor in theirs.state_dict().items())


WARNING = (
    "{} 6 inputs for each of the 4 channels of 'conv', as after a flatten: PyTorch flattens "
    "(C, H, W), Flax (H, W, C). Pass flatten={{{}}} with H * W = 6, or flatten={{}} if both "
    "flatten in the same order, or neither flattens."
)


@pytest.mark.parametrize(
    ("flatten", "who", "what"),
    [
        (None, "'bn' and 'fc' have", '"bn": (4, H, W), "fc": (4, H, W)'),
        ({"fc": (4, 3, 2)}, "'bn' has", '"bn": (4, H, W)'),
    ],
)
def test_layers_with_several_inputs_per_channel_trigger_a_warning(theirs, flatten, who, what):
    with pytest.warns(UserWarning, match=exactly(WARNING.format(who, what))) as caught:
        variables = converted(theirs, flatten=flatten)
    assert [each.filename for each in caught] == [__file__]
    with pytest.warns(UserWarning, match=exactly(WARNING.format(who, what))):
        bnjax.to_torch(variables, theirs.state_dict(), flatten=flatten)


@pytest.mark.parametrize("flatten", [{}, FLATTEN, {"bn": (4, 3, 2)}])
def test_flatten_silences_the_warning(theirs, flatten):
    converted(theirs, flatten=flatten)


def test_norms_over_the_channels_of_several_convs_trigger_no_warning():
    """As in a DenseNet, whose last norm and linear layer take the channels of all convs."""
    names = {"conv0": (4, 3, 1, 1), "bn0": (4,), "conv1": (4, 4, 1, 1), "bn1": (8,)}
    names |= {"conv2": (4, 8, 1, 1), "bn2": (12,), "fc": (3, 12), "head": (5, 3)}
    state_dict = {f"{name}.weight": np.ones(shape, F32) for name, shape in names.items()}
    leaf = lambda shape: "scale" if len(shape) == 1 else "kernel"  # noqa: E731
    shapes = {k: v if len(v) < 3 else (1, 1, v[1], v[0]) for k, v in names.items()}
    shapes |= {"fc": (12, 3), "head": (3, 5)}
    variables = {"params": {k: {leaf(v): np.zeros(v, F32)} for k, v in shapes.items()}}
    bnjax.from_torch(state_dict, None, variables)


def test_a_conv_without_channels_triggers_no_warning():
    state_dict = {"conv.weight": np.ones((0, 3, 1, 1), F32), "fc.weight": np.ones((3, 4), F32)}
    kernels = {"conv": (1, 1, 3, 0), "fc": (4, 3)}
    variables = {"params": {k: {"kernel": np.zeros(v, F32)} for k, v in kernels.items()}}
    bnjax.from_torch(state_dict, None, variables)


# Outputs


@pytest.mark.parametrize("model", [Flax(), Nnx()])
def test_outputs_that_agree_pass_the_check(theirs, model):
    x = torch.tensor(X)
    for y in (theirs(x), theirs(x).detach().numpy(), bnjax.torch_outputs(theirs, x)):
        for inputs in (LAST, (LAST,), X):
            converted(theirs, model, flatten=FLATTEN, check=(inputs, y))
    if isinstance(model, Flax):
        converted(theirs, model, flatten=FLATTEN, check=(LAST, theirs(x), {"train": False}))


def by(text: str) -> float:
    found = re.search(r"differ from PyTorch's by (\S+) times the largest value\.", text)
    assert found is not None
    return float(found[1])


def test_outputs_that_differ_are_refused(theirs):
    y = theirs(torch.tensor(X))
    with pytest.raises(ValueError, match="`check`: the outputs of the Flax model") as caught:
        converted(theirs, flatten={}, check=(LAST, y))
    first, second = str(caught.value).splitlines()
    wanted: Any = Flax().apply(converted(theirs, flatten={}), LAST)
    error = np.abs(wanted - y.detach().numpy()).max() / y.abs().max().item()
    np.testing.assert_allclose(by(first), error, rtol=0.5)
    assert second == (
        "Pass check=(x, bnjax.torch_outputs(torch_model, x_of_torch)) to find the first layer that "
        "differs."
    )


FIRST = re.compile(
    r"They first differ at '(\w+)' \('(\w+)' in Flax\), by (\S+) times the largest value; (all "
    r"layers before it agree to \de-\d\d|it is the first layer)\. Compare (.*), and the operations "
    r"before it\."
)


@pytest.mark.parametrize(
    ("model", "flatten", "layer", "compare"),
    [
        (Flax(eps=0.1), FLATTEN, "bn1", "its eps"),
        (Nnx(eps=0.1), FLATTEN, "bn1", "its eps"),
        (Flax(), {}, "bn", "its eps"),
        (Flax(), {"bn": (4, 3, 2)}, "fc", "whether it follows a flatten"),
    ],
)
def test_the_first_layer_that_differs_is_named(theirs, model, flatten, layer, compare):
    y = bnjax.torch_outputs(theirs, torch.tensor(X))
    with pytest.raises(ValueError, match="`check`: the outputs of the Flax model") as caught:
        converted(theirs, model, flatten=flatten, check=(LAST, y))
    first, second = str(caught.value).splitlines()
    assert by(first) > 1e-4
    match = FIRST.fullmatch(second)
    assert match is not None
    assert match.group(1, 2, 5) == (layer, layer, compare)


def test_a_forgotten_flatten_is_suspected(theirs):
    y = bnjax.torch_outputs(theirs, torch.tensor(X))
    last = r"\nDo 'bn' and 'fc' follow a flatten\? If so, pass `flatten`\.$"
    with (
        pytest.warns(UserWarning, match="as after a flatten"),
        pytest.raises(ValueError, match=last),
    ):
        converted(theirs, check=(LAST, y))


def test_outputs_of_another_shape_are_refused(theirs):
    y = bnjax.torch_outputs(theirs, torch.tensor(X))
    first = (
        "`check`: the outputs of the Flax model differ from PyTorch's in shape: (2, 5) in Flax, "
        "(2, 4) in PyTorch."
    )
    second = "No layer was compared: `y` has none with parameters whose output Flax records too."
    with pytest.raises(ValueError, match=exactly(first, second)):
        converted(theirs, flatten=FLATTEN, check=(LAST, {"": y[""][:, :4]}))
    second = "All layers with parameters agree to 0e+00, so compare the operations after the last "
    pattern = re.escape(f"{first}\n{second}one.").replace(r"0e\+00", r"\de[+-]\d\d")
    with pytest.raises(ValueError, match=f"^{pattern}$"):
        converted(theirs, flatten=FLATTEN, check=(LAST, {**y, "": y[""][:, :4]}))
    message = exactly(
        "`check`: the outputs of the Flax model differ from PyTorch's.",
        "They first differ at 'conv' ('conv' in Flax), in shape: (2, 3, 2, 4) in Flax, "
        "(2, 4, 3, 9) in PyTorch; it is the first layer. Compare its padding, strides, dilation "
        "and groups, and the operations before it.",
    )
    with pytest.raises(ValueError, match=message):
        converted(theirs, flatten=FLATTEN, check=(LAST, {"conv": np.ones((2, 4, 3, 9))}))
    with pytest.raises(ValueError, match=r"differ from PyTorch's in which values are finite\.\n"):
        converted(theirs, flatten=FLATTEN, check=(LAST, np.full((2, 5), np.nan)))


@pytest.mark.parametrize(
    ("check", "message"),
    [
        (
            LAST,
            "`check` must be (x, y), an input of the Flax model and PyTorch's output for it, or "
            "(x, y, kwargs), got ndarray.",
        ),
        (
            (LAST, torch.nn.Linear(1, 1)),
            "`check` takes the outputs of the PyTorch model, not the model itself: pass check=(x, "
            "bnjax.torch_outputs(torch_model, x_of_torch)).",
        ),
    ],
)
def test_an_invalid_check_is_refused(theirs, check, message):
    with pytest.raises(TypeError, match=exactly(message)):
        converted(theirs, flatten=FLATTEN, check=check)


def test_a_check_needs_a_model_that_takes_its_inputs(theirs):
    shapes: Any = jax.eval_shape(Flax().init, jax.random.key(0), LAST)
    message = "`check` runs the Flax model: pass `model`, not None."
    with pytest.raises(ValueError, match=exactly(message)):
        bnjax.from_torch(theirs.state_dict(), None, shapes, flatten=FLATTEN, check=(LAST, LAST))
    with pytest.raises(Exception, match="expected") as caught:
        converted(theirs, flatten=FLATTEN, check=(LAST[..., :2], LAST))
    assert "In `check`, which calls the Flax model with x, channels last." in caught.value.__notes__


def test_torch_outputs_are_copied_before_in_place_operations(theirs):
    theirs.train()
    before = {key: tensor.clone() for key, tensor in theirs.state_dict().items()}
    y = bnjax.torch_outputs(theirs, torch.tensor(X))
    assert list(y) == ["conv", "bn1", "bn", "fc", ""]
    assert (y["bn1"] < 0).any()
    assert theirs.training
    assert theirs.bn.training
    assert all(torch.equal(tensor, before[key]) for key, tensor in theirs.state_dict().items())
    np.testing.assert_array_equal(y[""], theirs.eval()(torch.tensor(X)).detach())
    relu = torch.nn.ReLU()
    again = bnjax.torch_outputs(torch.nn.Sequential(relu, relu), torch.tensor([-1.0, 2.0]))
    assert [each.tolist() for each in again["0"]] == [[0.0, 2.0], [0.0, 2.0]]


class Recurrent(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = torch.nn.GRU(3, 4, batch_first=True, bidirectional=True)
        self.attn = torch.nn.MultiheadAttention(8, 2, batch_first=True)
        self.fc = torch.nn.Linear(8, 2)

    def forward(self, x: Any) -> Any:
        x = self.rnn(x)[0]
        return self.fc(self.attn(x, x, x)[0])


class RecurrentFlax(nn.Module):
    def setup(self):
        cells: Any = [nn.RNN(nn.GRUCell(4)) for _ in range(2)]
        self.rnn = nn.Bidirectional(*cells)
        self.attn = nn.MultiHeadDotProductAttention(2)
        self.fc = nn.Dense(2)

    def __call__(self, x):
        return self.fc(self.attn(jnp.asarray(self.rnn(x))))


def test_recurrent_layers_and_attention_are_compared_too(rng):
    theirs, x = Recurrent().eval(), rng.standard_normal((2, 5, 3)).astype(F32)
    y = bnjax.torch_outputs(theirs, torch.tensor(x))
    shapes: Any = jax.eval_shape(RecurrentFlax().init, jax.random.key(0), x)
    bnjax.from_torch(theirs.state_dict(), RecurrentFlax(), shapes, check=(x, y))
    part = {"attn": [y["attn"][0] + 1, y["attn"][1]], "fc": y["fc"]}
    with pytest.raises(ValueError, match=r"They first differ at 'attn' \('attn' in Flax\), by "):
        bnjax.from_torch(theirs.state_dict(), RecurrentFlax(), shapes, check=(x, part))
