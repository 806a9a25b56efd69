"""What the library says to each mistake, word by word, and that it is short."""

import re
import textwrap

import pytest
from flax import linen as nn

import bnjax
from tests.support import (
    mistaken_calls,
    mistaken_layers,
    mistaken_names,
    mistaken_training,
)
from tests.support.mistakes import IMMUTABLE, KEY, NC, PARAMS, SINGLE, STATS

pytestmark = pytest.mark.quick_compile

TABLES = {
    **mistaken_layers.TABLES,
    **mistaken_names.TABLES,
    **mistaken_calls.TABLES,
    **mistaken_training.TABLES,
}
MISTAKES = [
    pytest.param(mistake, id=f"{table}: {mistake.name}")
    for table, mistakes in TABLES.items()
    for mistake in mistakes
]


def whole(message: str) -> str:
    """A pattern for the whole of a message; what JAX notes below it may follow."""
    return r"(?m)\A" + re.escape(message) + "$"


def lines(message: str) -> int:
    """How many lines a message takes in a terminal, but for the one that names the layer."""
    told = [line for line in message.splitlines() if not line.startswith("In ")]
    return sum(len(textwrap.wrap(line, 110)) for line in told)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_each_mistake_raises_an_error_with_a_repair(mistake):
    with pytest.raises(mistake.error, match=whole(mistake.message)):
        mistake.call()


def test_no_message_is_longer_than_three_lines():
    assert len(MISTAKES) > 150
    long = {
        table: [m.name for m in mistakes if lines(m.message) > 3]
        for table, mistakes in TABLES.items()
    }
    assert not any(long.values()), long
    assert lines("One line.\nIn BatchNorm2d at 'bn'.") == 1
    assert lines("word " * 100) == 5


def test_zero_eps_and_a_single_value_are_allowed_in_evaluation():
    y, _ = bnjax.batch_norm(PARAMS, STATS, NC[:1], eps=0, mutable=False)
    assert y.tolist() == [[1.0, 1.0, 1.0]]


def test_a_layer_deep_in_a_model_is_named_by_its_path():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            return bnjax.BatchNorm1d(3, use_running_average=False)(x)

    model = nn.Sequential([Block(), Block()])
    variables = model.init(KEY, NC)
    where = "'layers_0/BatchNorm1d_0'"
    with pytest.raises(ValueError, match=whole(IMMUTABLE.format(where))):
        model.apply(variables, NC)
    with pytest.raises(
        ValueError, match=whole(SINGLE.format("(1, 3)") + f"\nIn BatchNorm1d at {where}.")
    ):
        model.apply(variables, NC[:1], mutable=["batch_stats"])
