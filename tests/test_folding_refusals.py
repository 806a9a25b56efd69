"""What `fold` leaves as it is, with a reason, and what it refuses altogether."""

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import bnjax
from tests.support.folded import EVAL, IMAGES, outputs, prepare, reasons
from tests.support.models import ResNet

pytestmark = pytest.mark.quick_compile


class Around(nn.Module):
    """A dense layer and a batch norm, called by a function."""

    way: Callable[..., Any]
    layer: Callable[..., nn.Module] = partial(nn.Dense, 3)
    norm: Callable[..., nn.Module] = EVAL

    @nn.compact
    def __call__(self, x: jax.Array) -> Any:
        # Another pair folds, so that `fold` does not raise.
        x = EVAL(name="other_bn")(nn.Dense(3, name="other")(x))
        return self.way(self.layer(name="layer"), self.norm(name="bn"), x)


class Standardized(nn.Dense):
    """In the style of weight standardization."""

    def param(self, name: str, *arguments: Any, **options: Any) -> Any:
        value = super().param(name, *arguments, **options)
        return value / jnp.std(value) if name == "kernel" else value


def tied(layer: nn.Module, norm: nn.Module, x: jax.Array) -> jax.Array:
    y = norm(layer(x))
    return y @ layer.variables["params"]["kernel"].T


def penalized(layer: nn.Module, norm: nn.Module, x: jax.Array) -> Any:
    y = norm(layer(x))
    return y, jnp.sum(norm.variables["params"]["scale"] ** 2)


def scanned(layer: nn.Module, norm: nn.Module, x: jax.Array) -> Any:
    loop = nn.scan(
        lambda m, x, _: (norm(layer(x)), None),
        variable_broadcast=("params", "batch_stats"),
        split_rngs={"params": False},
        length=2,
    )
    return loop(layer, x, None)[0]


def chosen(layer: nn.Module, norm: nn.Module, x: jax.Array) -> Any:
    if layer.is_initializing():
        return norm(layer(x))
    return nn.cond(x.sum() > 0, lambda m, x: norm(layer(x)), lambda m, x: x, layer, x)


def mapped(layer: nn.Module, norm: nn.Module, x: jax.Array) -> Any:
    axes: Any = {"params": None, "batch_stats": None}
    if layer.is_initializing():
        return norm(layer(x))
    return nn.vmap(lambda m, x: norm(layer(x)), variable_axes=axes, split_rngs={})(layer, x)


def masked(layer: nn.Module, norm: Any, x: jax.Array) -> Any:
    return norm(layer(x), mask=jnp.ones((5, 1), bool))


def in_two(layer: nn.Module, norm: nn.Module, x: jax.Array) -> Any:
    return norm(layer(x)) + norm(x)


ONLY = "its output goes into {}, not only into a batch norm"
REFUSALS: dict[str, tuple[Any, str]] = {
    "residual": (Around(lambda f, bn, x: (y := f(x)) + bn(y)), ONLY.format("'bn' and add")),
    "returned too": (
        Around(lambda f, bn, x: (bn(y := f(x)), y)),
        ONLY.format("'bn' and the model's output"),
    ),
    "residual under remat": (
        Around(lambda f, bn, x: (y := f(x)) + nn.remat(lambda bn, y: bn(y))(bn, y)),
        ONLY.format("'bn' and add"),
    ),
    "normalized twice": (
        Around(lambda f, bn, x: bn(y := f(x)) + bn(y)),
        ONLY.format("'bn'"),
    ),
    "another input of the batch norm": (Around(in_two), "'bn' is also used for another input"),
    "relu between": (
        Around(lambda f, bn, x: bn(nn.relu(f(x)))),
        "its output goes into max, not into a batch norm",
    ),
    "integers between": (
        Around(lambda f, bn, x: bn(f(x).astype(int))),
        "its output goes into convert_element_type, not into a batch norm",
    ),
    "unused": (
        Around(lambda f, bn, x: bn(x) if f(x) is not None else x),
        "its output is not used",
    ),
    "tied kernel": (Around(tied), "the kernel of 'layer' is used outside it"),
    "penalized scale": (Around(penalized), "the scale of 'bn' is used outside it"),
    "scan": (Around(scanned), "inside a scan"),
    "cond": (Around(chosen), "inside a cond"),
    "vmap": (Around(mapped), "mapped by vmap"),
    "mask": (
        Around(masked),
        "the batch norm is called with a mask, which it does not need in evaluation",
    ),
    "no statistics": (
        Around(
            lambda f, bn, x: bn(f(x)),
            norm=partial(bnjax.BatchNorm1d, track_running_stats=False),
        ),
        "the batch norm has no running statistics",
    ),
    "weight standardization": (
        Around(lambda f, bn, x: bn(f(x)), layer=partial(Standardized, 3)),
        "Standardized changes what Dense computes",
    ),
    "weight norm": (
        Around(lambda f, bn, x: bn(nn.WeightNorm(f)(x))),
        "the kernel of 'layer' is computed in the model",
    ),
    "other axis": (
        Around(
            lambda f, bn, x: bn(f(x[:, None])),
            norm=partial(EVAL, axis=1),
        ),
        "the batch norm is over axis 1 of its output, but its channels are 2",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_fold_that_would_be_wrong_is_refused_with_a_reason(name):
    model, reason = REFUSALS[name]
    model, variables, x = prepare(model, (5, 3))
    folded = bnjax.fold(model, variables, x)
    found = reasons(folded)
    assert found.pop(("other", "other_bn")) is None
    assert next(iter(found.values())) == reason
    assert next(iter(found))[0] == "layer"
    assert None not in found.values()
    expected, actual = outputs(model, variables, folded, x)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), actual, expected)
    assert ("bn" in folded.variables["params"]) == ("bn" in variables["params"])


MODEL, VARIABLES, X = prepare(nn.Sequential([nn.Dense(3), EVAL()]), (5, 3))
PARAMS = VARIABLES["params"]
OTHER = {**VARIABLES, "params": {"other": PARAMS["layers_0"]}}
NARROW = {**VARIABLES, "params": jax.tree.map(lambda leaf: leaf[..., :2], PARAMS)}
ALL = " Pass {'params': params, 'batch_stats': batch_stats}."
NO_STATISTICS = "`variables` must be a dict with the collection `batch_stats`, like those of "
MISTAKES: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "no model": (
        lambda: bnjax.fold(MODEL.apply, VARIABLES, X),  # pyright: ignore[reportArgumentType]
        TypeError,
        "`model` must be an instance of a flax.linen.Module or a flax.nnx.Module, got method. "
        "Pass the model itself, not its variables or its apply.",
    ),
    "no statistics": (
        lambda: bnjax.fold(MODEL, {"params": PARAMS}, X),
        ValueError,
        NO_STATISTICS + "any model with batch norms, got ['params']." + ALL,
    ),
    "parameters alone": (
        lambda: bnjax.fold(MODEL, PARAMS, X),
        ValueError,
        NO_STATISTICS + "any model with batch norms, got ['layers_0', 'layers_1']." + ALL,
    ),
    "no dict": (
        lambda: bnjax.fold(MODEL, [PARAMS], X),  # pyright: ignore[reportArgumentType]
        ValueError,
        NO_STATISTICS + "any model with batch norms, got list." + ALL,
    ),
    "no batch norm": (
        lambda: bnjax.fold(nn.Dense(3), {"params": PARAMS["layers_0"]}, X),
        ValueError,
        "`model` must call a batch norm of bnjax or Flax, but calls none. If it has one of another "
        "class, register that with bnjax.register.",
    ),
    "nothing to fold": (
        lambda: bnjax.fold(EVAL(), {c: t["layers_1"] for c, t in VARIABLES.items()}, X),
        ValueError,
        "`model` must have a batch norm that can be folded.\n"
        "  -, -: its input comes from an input of the model, not from a conv or dense layer.",
    ),
    "training": (
        lambda: bnjax.fold(
            ResNet((1,)),
            prepare(ResNet((1,)))[1],
            jnp.ones(IMAGES),
            apply_kwargs={"train": True},
        ),
        ValueError,
        "`model` must be in evaluation mode, but the batch norm at 'stem_bn' is in training mode. "
        "Switch it, as with `apply_kwargs={'train': False}`.",
    ),
    "training by the mutable flag": (
        lambda: bnjax.fold(
            nn.Sequential([nn.Dense(3), bnjax.BatchNorm1d(3)]),
            VARIABLES,
            X,
            apply_kwargs={"mutable": ["batch_stats"]},
        ),
        ValueError,
        "`model` must be in evaluation mode, but the batch norm at 'layers_1' is in training mode. "
        "Switch it, as with `apply_kwargs={'train': False}`.",
    ),
    "NaN": (
        lambda: bnjax.fold(MODEL, VARIABLES, X * jnp.nan),
        ValueError,
        "Folding must preserve the outputs on `example_x` to 3.5e-04 of their scale 0, but changed "
        "them by nan. Do they hold NaN or inf, or does a layer change its kernel, or a registered "
        "batch norm its scale, before use?",
    ),
    "the old variables": (
        lambda: bnjax.fold(MODEL, VARIABLES, X).apply(VARIABLES, X),
        ValueError,
        "`variables` must be those of the folded model, but still hold the batch norms "
        "['layers_1']. Pass `folded.variables`.",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_each_mistake_raises_an_error_with_a_repair(name):
    call, error, message = MISTAKES[name]
    with pytest.raises(error, match=rf"(?m)\A{re.escape(message)}$"):
        call()


@pytest.mark.parametrize("variables", [OTHER, NARROW], ids=["other names", "other shapes"])
def test_variables_of_another_model_are_refused_with_flaxs_message(variables):
    message = r"^`variables` or an input of shape .* do not fit the model: "
    message += r".*\"kernel\" in (scope )?.*\)$"
    with pytest.raises(ValueError, match=message):
        bnjax.fold(MODEL, variables, X)


def test_a_layer_that_changes_its_kernel_before_use_is_caught_by_the_outputs():
    def squared(inputs: Any, kernel: Any, *arguments: Any, **options: Any) -> jax.Array:
        return jax.lax.dot_general(inputs, kernel**2, *arguments, **options)

    layer = nn.Dense(3, dot_general=squared)
    message = r"^Folding must preserve the outputs on `example_x` to 3\.5e-04 of their scale .*\?$"
    with pytest.raises(ValueError, match=message):
        bnjax.fold(nn.Sequential([layer, EVAL()]), VARIABLES, X)
