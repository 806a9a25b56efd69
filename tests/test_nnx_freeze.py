"""Freeze the batch norms of nnx models, whatever mode the model is set to."""

import copy
import pickle
import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import bnjax
from tests.support.nnx_layers import (
    DECODER,
    ENCODER,
    KINDS,
    ROW,
    ROWS,
    SHARED,
    X,
    assert_bits,
    held,
    make,
    moved,
    moving,
    net,
)

pytestmark = pytest.mark.quick_compile

UNDOINGS = {
    "train": lambda model: model.train(),
    "set_attributes": lambda model: model.set_attributes(use_running_average=False),
    "assignment": lambda model: setattr(model.encoder.first, "use_running_average", False),
}
COPIES = {
    "view": lambda model: nnx.view(model, use_running_average=False),
    "merge": lambda model: nnx.merge(*nnx.split(model)),
    "clone": nnx.clone,
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "pickled graph": lambda model: nnx.merge(*pickle.loads(pickle.dumps(nnx.split(model)))),
    "tree": lambda model: jax.tree.map(lambda leaf: leaf + 0, model),
}


@pytest.mark.parametrize("undo", UNDOINGS.values(), ids=UNDOINGS)
def test_a_frozen_part_of_a_model_stays_frozen_whatever_the_whole_is_told(undo):
    model = net()
    bnjax.nnx.freeze(model, "encoder/**")
    undo(model)
    assert moving(model) == DECODER
    assert model.encoder.first.use_running_average is True


@pytest.mark.parametrize("make_copy", COPIES.values(), ids=COPIES)
def test_a_copy_of_a_frozen_model_is_frozen(make_copy):
    model = net()
    bnjax.nnx.freeze(model, "encoder/**")
    again = make_copy(model)
    again.train()
    assert moving(again) == DECODER
    bnjax.nnx.unfreeze(again)
    assert moving(again) >= ENCODER | DECODER | SHARED


@pytest.mark.parametrize("kind", KINDS)
def test_a_frozen_layer_evaluates_whatever_the_call_says(kind):
    layer = make(kind)
    layer(X)
    layer.eval()
    expected, before = layer(X, mask=ROWS), held(layer)
    bnjax.nnx.freeze(layer)
    layer.train()
    assert_bits(layer(X, False, mask=ROWS), expected)
    assert_bits(held(layer), before)
    assert isinstance(layer, kind)


def test_a_compiled_training_step_leaves_frozen_statistics_alone():
    model = net()
    bnjax.nnx.freeze(model, ["encoder/first", "*/layers/*"])

    @nnx.jit
    def step(model, x):
        model.train()
        return nnx.grad(lambda model: jnp.sum(model(x) ** 2))(model)

    before = held(model)
    gradients = step(model, ROW)
    names = {path for path in moved(before, held(model)) if path.endswith(("mean", "var"))}
    assert names == {f"{path}/{n}" for path in ("decoder/first", *SHARED) for n in ("mean", "var")}
    assert "scale" in gradients["encoder"]["first"]


def test_freezing_adds_nothing_to_the_state():
    model = net()
    before = jax.tree.structure(nnx.state(model))
    bnjax.nnx.freeze(model)
    assert jax.tree.structure(nnx.state(model)) == before
    assert not moving(model)


def test_freezing_twice_and_unfreezing_once_restores_the_last_mode():
    model = net()
    types = [type(model.encoder.first), type(model.encoder.layers[1])]
    for _ in range(2):
        bnjax.nnx.freeze(model, "encoder/**")
    model.eval()
    bnjax.nnx.unfreeze(model, "encoder/**")
    assert [type(model.encoder.first), type(model.encoder.layers[1])] == types
    assert not moving(model)
    model.train()
    assert moving(model) == ENCODER | DECODER | SHARED


def test_a_subclass_with_its_own_arguments_can_be_frozen():
    class Renamed(nnx.BatchNorm):
        def __call__(self, x, train):  # pyright: ignore[reportIncompatibleMethodOverride]
            return super().__call__(x, use_running_average=not train)

    layer = make(Renamed)
    bnjax.nnx.freeze(layer)
    before = held(layer)
    layer(X, train=True)
    assert not moved(before, held(layer))


def test_a_module_that_knows_its_parent_can_be_frozen():
    model = net()
    setattr(model.encoder, "parent", model)  # noqa: B010 - an attribute of this test alone
    bnjax.nnx.freeze(model, "encoder/first")
    assert moving(model) == (ENCODER | DECODER | SHARED) - {"encoder/first"}


def test_freezing_with_a_pattern_that_matches_nothing_changes_nothing():
    model = net()
    sentence = (
        "The pattern 'encoder/bn*' matches no batch norm: there are ['decoder/first', "
        "'decoder/last', 'decoder/layers/1', 'encoder/first', 'encoder/last', 'encoder/layers/1']. "
        "`*` matches part of one name, `**` any number of names, as in 'encoder/**'."
    )
    for change in (bnjax.nnx.freeze, bnjax.nnx.unfreeze):
        with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
            change(model, ["decoder/**", "encoder/bn*"])
    assert moving(model) == ENCODER | DECODER | SHARED


def test_the_layers_of_a_module_that_is_not_a_pytree_can_be_frozen():
    class Plain(nnx.Module, pytree=False):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.bn = nnx.BatchNorm(3, rngs=rngs)

    class Outer(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.plain = Plain(rngs)

    model = Outer(nnx.Rngs(0))
    bnjax.nnx.freeze(model, "plain/bn")
    before = held(model)
    model.plain.bn(ROW)
    assert not moved(before, held(model))
