"""What the tools say of batches and models that they cannot take."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import bnjax
from bnjax.training import init_state, train_step

pytestmark = pytest.mark.quick_compile

X = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(4)(x)
        return nn.BatchNorm(use_running_average=not train)(x)


NET = Net()
VARIABLES = NET.init(jax.random.key(0), X, train=False)
TOOLS = {"recalibrate": bnjax.recalibrate, "diagnose": bnjax.diagnose}
each_tool = pytest.mark.parametrize("tool", TOOLS.values(), ids=TOOLS)


def refused(kind: type[Exception], sentence: str) -> Any:
    return pytest.raises(kind, match=f"^{re.escape(sentence)}$")


@each_tool
@pytest.mark.parametrize(
    ("batches", "got"), [(X, "an array of shape (4, 3)"), ({"x": X}, "a dict")], ids=["x", "dict"]
)
def test_a_single_batch_is_an_error(tool, batches, got):
    sentence = f"`batches` must be a list or an iterator of batches, got {got}: write [batch]."
    with refused(TypeError, sentence):
        tool(NET, VARIABLES, batches, apply_kwargs={"train": False})


@each_tool
def test_a_batch_must_be_an_array_or_a_dict_with_x(tool):
    sentence = (
        "A batch must be an array or a dict with the model's input as `x`, got tuple. Write "
        '{"x": images, "y": labels}.'
    )
    with refused(TypeError, sentence):
        tool(NET, VARIABLES, [(X, X)], apply_kwargs={"train": False})
    sentence = (
        "A batch must hold the model's input as `x`, got ['image']. Rename it, as in "
        '{"x": images, "y": labels}, or name it: inputs="image", inputs=("obs", "action").'
    )
    with refused(ValueError, sentence):
        tool(NET, VARIABLES, [{"image": X}], apply_kwargs={"train": False})


@each_tool
def test_tensors_of_pytorch_are_refused(tool):
    torch = pytest.importorskip("torch")
    for batch, name in ((torch.tensor(X), "x"), ({"x": {"image": torch.tensor(X)}}, "x/image")):
        sentence = (
            f"A batch must hold arrays of NumPy or JAX, got a torch.Tensor as `{name}`. Convert "
            "it, as with np.asarray, where the batches are loaded."
        )
        with refused(TypeError, sentence):
            tool(NET, VARIABLES, [batch], apply_kwargs={"train": False})
    state = init_state(NET, optax.sgd(0.1), jax.random.key(0), X, train=True)
    step = train_step(lambda y, batch: jnp.mean(y**2, -1), apply_kwargs={"train": True})
    with refused(TypeError, sentence.replace("x/image", "y")):
        step(state, {"x": X, "y": torch.zeros(4)})


def test_a_training_step_refuses_a_tuple():
    state = init_state(NET, optax.sgd(0.1), jax.random.key(0), X, train=True)
    step = train_step(lambda y, batch: jnp.mean(y**2), apply_kwargs={"train": True})
    untyped: Any = (X, X)
    with pytest.raises(TypeError, match=r"^A batch must be an array or a dict "):
        step(state, untyped)


@pytest.mark.parametrize(
    ("kwargs", "problem"),
    [
        ({}, "missing 1 required positional argument: 'train'"),
        ({"train": False, "deep": 1}, "got an unexpected keyword argument 'deep'"),
    ],
    ids=["missing", "unexpected"],
)
def test_missing_model_arguments_are_asked_for_in_apply_kwargs(kwargs, problem):
    sentence = (
        f"The model is called with its inputs and `apply_kwargs`, but Net.__call__() {problem}"
        ". Pass its evaluation arguments, as in `apply_kwargs={'train': False}`."
    )
    for tool in TOOLS.values():
        with refused(TypeError, sentence):
            tool(NET, VARIABLES, [X], apply_kwargs=kwargs)
    with refused(TypeError, sentence):
        bnjax.fold(NET, VARIABLES, X, apply_kwargs=kwargs)


def test_an_input_with_other_channels_is_an_error_with_its_shape():
    message = r"^`variables` or an input of shape \(4, 2\) do not fit the model: "
    for tool in TOOLS.values():
        with pytest.raises(ValueError, match=message):
            tool(NET, VARIABLES, [X[:, :2]], apply_kwargs={"train": False})
    with pytest.raises(ValueError, match=message):
        bnjax.fold(NET, VARIABLES, X[:, :2], apply_kwargs={"train": False})
