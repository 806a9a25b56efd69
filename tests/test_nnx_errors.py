"""What the nnx layers say of a mistake."""

import re

import jax.numpy as jnp
import pytest
from flax import nnx

import bnjax
from tests.support.mistakes import NUM_FEATURES
from tests.support.nnx_layers import KINDS, ROW, ROWS, X, make

pytestmark = pytest.mark.quick_compile

NOTE = "\nIn {} of {} features."
RANGE = (
    "`momentum` must lie between 0 and 1, got {}. In PyTorch's convention it is the weight of the "
    "new batch (0.1), in Flax's the weight of the old statistics (0.9)."
)
MISTAKES = {
    "no channels": (
        lambda: make(num_features=-2),
        NUM_FEATURES.format(-2),
    ),
    "channels in a string": (
        lambda: make(**{"num_features": "3"}),  # pyright: ignore[reportArgumentType] - the mistake
        NUM_FEATURES.format("'3'"),
    ),
    "channels that are a flag": (
        lambda: make(bnjax.nnx.BatchNorm, num_features=True),
        NUM_FEATURES.format(True),
    ),
    "rank": (
        lambda: make(bnjax.nnx.BatchNorm1d)(X),
        "BatchNorm1d expected 2D input (N, C) or 3D input (N, L, C), got 4D input of shape "
        "(8, 4, 2, 3). Use BatchNorm2d, or reshape the input." + NOTE.format("BatchNorm1d", 3),
    ),
    "any rank": (
        lambda: make(axis=1)(X[None, None]),
        "BatchNorm2d expected 4D input (N, C, H, W), got 6D input of shape (1, 1, 8, 4, 2, 3). "
        "Reshape the input; bnjax.nnx.BatchNorm takes any rank." + NOTE.format("BatchNorm2d", 3),
    ),
    "channels": (
        lambda: make(num_features=4)(X),
        "`num_features` is 4, but axis 3 of the input of shape (8, 4, 2, 3) has 3 channels. "
        "Axis 1 has that size: did you mean `axis=1`?" + NOTE.format("BatchNorm2d", 4),
    ),
    "features": (
        lambda: make(bnjax.nnx.BatchNorm)(X[..., :2]),
        "`params` must hold arrays of shape (2,), one entry for each channel of the input, got "
        "{'scale': (3,), 'bias': (3,)}. Was it made for another `num_features`, or is `axis` wrong?"
        + NOTE.format("BatchNorm", 3),
    ),
    "single value": (
        lambda: make(bnjax.nnx.BatchNorm1d)(ROW[:1]),
        "Expected more than 1 value per channel when training, got input shape (1, 3). Use a "
        "larger batch, drop the last partial batch, or normalize with the running statistics "
        "(mutable=False, or .eval() in nnx)." + NOTE.format("BatchNorm1d", 3),
    ),
    "no mode": (
        lambda: make(bnjax.nnx.BatchNorm, use_running_average=None)(X),
        "`use_running_average` was given neither to the constructor nor to the call. Pass "
        "use_running_average=False to train, True to evaluate; bnjax.BatchNorm2d needs neither."
        + NOTE.format("BatchNorm", 3),
    ),
    "torch momentum": (lambda: make(momentum=1.5), RANGE.format(1.5)),
    "flax momentum": (lambda: make(bnjax.nnx.BatchNorm, momentum=7), RANGE.format(7)),
    "no momentum in Flax's convention": (
        lambda: make(bnjax.nnx.BatchNorm, momentum=None),
        RANGE.format(None),
    ),
    "torch eps": (
        lambda: make(eps=-1.0),
        "`eps` must be a number and not negative, got -1.0. The usual value is 1e-5.",
    ),
    "flax eps": (
        lambda: make(bnjax.nnx.BatchNorm, epsilon=-1.0),
        "`epsilon` must be a number and not negative, got -1.0. The usual value is 1e-5.",
    ),
}


@pytest.mark.parametrize(("call", "sentence"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_told_in_a_sentence(call, sentence):
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}(\n|$)"):
        call()


def test_an_input_that_is_not_floating_point_or_a_mask_that_is_not_bool_is_a_mistake_of_type():
    real = "`x` must be real floating point, got int32. Convert it first, as in "
    real += "`x.astype(jnp.float32)`." + NOTE.format("BatchNorm2d", 3)
    with pytest.raises(TypeError, match=f"^{re.escape(real)}(\n|$)"):
        make()(X.astype(jnp.int32))
    mask = "`mask` must be boolean, got float32. Convert it first, as in `mask != 0`."
    for kind in KINDS[:2]:
        note = NOTE.format(kind.__name__, 3)
        with pytest.raises(TypeError, match=f"^{re.escape(mask + note)}(\n|$)"):
            make(kind)(X, mask=ROWS.astype(jnp.float32))


@pytest.mark.parametrize(
    ("kind", "momentum", "sentence"),
    [
        (
            bnjax.nnx.BatchNorm2d,
            0.87643,
            "momentum=0.87643 gives the new batch a weight of 0.87643 (PyTorch's convention): the "
            "running statistics are little more than those of the last batch. If it comes from "
            "Flax, Keras or Haiku, write momentum=0.12357.",
        ),
        (
            bnjax.nnx.BatchNorm,
            0.12354,
            "momentum=0.12354 gives the old statistics a weight of 0.12354 (Flax's convention): "
            "the running statistics are little more than those of the last batch. If it comes "
            "from PyTorch, write momentum=0.87646.",
        ),
    ],
    ids=["torch", "flax"],
)
def test_a_momentum_of_the_other_convention_warns_once_and_where_it_was_written(
    kind, momentum, sentence
):
    with pytest.warns(UserWarning, match="^momentum=") as caught:
        [kind(3, momentum=momentum, rngs=nnx.Rngs(0)) for _ in range(3)]
    assert [str(warning.message) for warning in caught] == [sentence]
    assert caught[0].filename == __file__
