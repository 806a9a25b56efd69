"""Names that nearly match: wrappers, auto-named models, and the `rename` that errors suggest."""

import ast
import re
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import bnjax
from tests.support.state_dicts import F32, mismatch, params, refused

pytestmark = pytest.mark.quick_compile


def network() -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """A conv, a batch norm and a linear layer in both frameworks."""
    rng = np.random.default_rng(0)
    shapes = {"conv.weight": (4, 3, 3, 3), "bn.weight": (4,), "bn.bias": (4,), "fc.weight": (2, 4)}
    state_dict = {name: rng.uniform(1, 2, shape).astype(F32) for name, shape in shapes.items()}
    for name in ("running_mean", "running_var"):
        state_dict[f"bn.{name}"] = rng.uniform(1, 2, 4).astype(F32)
    state_dict["bn.num_batches_tracked"] = np.array(5)
    array = lambda *shape: jax.ShapeDtypeStruct(shape, F32)  # noqa: E731
    variables = params(
        conv={"kernel": array(3, 3, 3, 4)},
        bn={"scale": array(4), "bias": array(4)},
        fc={"kernel": array(4, 2)},
    )
    return state_dict, {**variables, "batch_stats": {"bn": {"mean": array(4), "var": array(4)}}}


def options_of(line: str) -> dict[str, Any]:
    """The options that a line suggests."""
    found = {k: re.search(rf"{k}=([{{\[].*?[}}\]])", line) for k in ("rename", "ignore")}
    return {k: ast.literal_eval(match[1]) for k, match in found.items() if match}


# Prefixes


@pytest.mark.parametrize(
    ("form", "line"),
    [
        (r"module.\g<0>", 'extra prefix \'module\': remove it with rename={"module": ""}'),
        (
            r"_orig_mod.module.\g<0>",
            'extra prefix \'_orig_mod.module\': remove it with rename={"_orig_mod.module": ""}',
        ),
        (
            r"model.backbone.\g<0>",
            'extra prefix \'model.backbone\': remove it with rename={"model.backbone": ""}',
        ),
        (
            r"\1._orig_mod.\2",
            'names match with rename={"conv._orig_mod": "conv", "bn._orig_mod": "bn", '
            '"fc._orig_mod": "fc"}',
        ),
        (
            r"module.\1._fsdp_wrapped_module._checkpoint_wrapped_module.\2",
            'names match with rename={"module.conv._fsdp_wrapped_module.'
            '_checkpoint_wrapped_module": "conv", "module.bn._fsdp_wrapped_module.'
            '_checkpoint_wrapped_module": "bn", "module.fc._fsdp_wrapped_module.'
            '_checkpoint_wrapped_module": "fc"}',
        ),
    ],
)
def test_errors_suggest_a_rename_without_wrappers(form, line):
    state_dict, variables = network()
    wrapped = {re.sub(r"(\w+)\.(\w+)$", form, k, count=1): v for k, v in state_dict.items()}
    first, *_ = refused(wrapped, variables)
    assert first == line
    new = bnjax.from_torch(wrapped, None, variables, **options_of(line))
    chex.assert_trees_all_equal(new, bnjax.from_torch(state_dict, None, variables))


@pytest.mark.parametrize(
    ("others", "line"),
    [
        ({"n_averaged": 1}, 'names match with rename={"model": ""}, ignore=["n_averaged"]'),
        (
            {"criterion.weight": 1, "criterion.pos.weight": 2},
            'names match with rename={"model": ""}, ignore=["criterion/**"]',
        ),
        (
            {"model.neck.weight": 1, "loss.w": 2},
            'names match with rename={"model": ""}, ignore=["model/neck/weight", "loss/**"]',
        ),
    ],
)
def test_errors_suggest_to_ignore_other_networks(others, line):
    state_dict, variables = network()
    wrapped = {f"model.{name}": array for name, array in state_dict.items()}
    wrapped |= {name: np.full(7, value, F32) for name, value in others.items()}
    first, *_ = refused(wrapped, variables)
    assert first == line
    new = bnjax.from_torch(wrapped, None, variables, **options_of(line))
    chex.assert_trees_all_equal(new, bnjax.from_torch(state_dict, None, variables))


def test_errors_suggest_each_of_several_networks_that_match():
    state_dict, variables = network()
    both = {f"{net}.{k}": v + 0 for net in ("student", "teacher") for k, v in state_dict.items()}
    lines = refused(both, variables)[:2]
    assert lines == [
        'names match with rename={"student": ""}, ignore=["teacher/**"]',
        'names match with rename={"teacher": ""}, ignore=["student/**"]',
    ]
    for line in lines:
        new = bnjax.from_torch(both, None, variables, **options_of(line))
        chex.assert_trees_all_equal(new, bnjax.from_torch(state_dict, None, variables))


def test_errors_suggest_a_module_around_the_flax_model():
    state_dict, variables = network()
    around = {name: {"net": {"backbone": tree}} for name, tree in variables.items()}
    for wrapped, rename in (
        (state_dict, {"": "net/backbone"}),
        ({f"module.{k}": v for k, v in state_dict.items()}, {"module": "net/backbone"}),
    ):
        first, *_ = refused(wrapped, around)
        assert options_of(first) == {"rename": rename}
        bnjax.from_torch(wrapped, None, around, rename=rename)


def test_errors_suggest_a_function_for_many_wrapped_modules():
    arrays = {f"layer{n}": np.full((n + 1, 2), n, F32) for n in range(30)}
    variables = params(**{name: {"kernel": array.T} for name, array in arrays.items()})
    wrapped = {f"net.{name}._orig_mod.weight": array for name, array in arrays.items()}
    first, *_ = refused(wrapped, variables)
    wrappers = "_checkpoint_wrapped_module|_forward_module|_fsdp_wrapped_module|_orig_mod|module"
    code = rf'lambda name: re.sub(r"\b({wrappers})\.", "", name).removeprefix("net.")'
    assert first == f"names match with rename={code}"
    new = bnjax.from_torch(wrapped, None, variables, rename=eval(code))
    chex.assert_trees_all_equal(new, variables)


def test_errors_suggest_no_rename_if_shapes_differ():
    state_dict, variables = network()
    wrapped = {f"model.{name}": array for name, array in state_dict.items()}
    wrapped["model.fc.weight"] = np.ones((7, 4), F32)
    assert not any("rename=" in line for line in refused(wrapped, variables))


# Layers


@pytest.mark.parametrize("attribute", ["features", "layers", "layers_of_net"])
def test_a_sequential_matches_whatever_its_attribute_is_called(attribute):
    def setup(self):
        setattr(self, attribute, nn.Sequential([nn.Dense(3), bnjax.BatchNorm1d(3)]))

    call = lambda self, x: getattr(self, attribute)(x)  # noqa: E731
    linen: Any = type("Net", (nn.Module,), {"setup": setup, "__call__": call})()
    layers = nnx.Sequential(
        nnx.Linear(2, 3, rngs=nnx.Rngs(0)), bnjax.nnx.BatchNorm1d(3, rngs=nnx.Rngs(0))
    )
    model: Any = nnx.Dict({attribute: layers})
    names = {"0.weight": (3, 2), "0.bias": (3,), "1.weight": (3,), "1.bias": (3,)}
    names |= {"1.running_mean": (3,), "1.running_var": (3,)}
    state_dict = {f"{attribute}.{name}": np.ones(shape, F32) for name, shape in names.items()}
    shapes = jax.eval_shape(linen.init, jax.random.key(0), jnp.ones((1, 2)))
    both: list[tuple[Any, Any]] = [(linen, shapes), (model, None)]
    for made, variables in both:
        new = bnjax.from_torch(state_dict, made, variables)
        back = bnjax.to_torch(new, state_dict, numpy=True)
        chex.assert_trees_all_equal(back, state_dict)


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.WeightNorm(nn.Dense(3), name="wn")(x)


@pytest.mark.parametrize("scale", ["wn/Dense_0/kernel/scale", "wn.Dense_0/kernel/scale"])
def test_rename_accepts_names_with_slashes(scale):
    x = np.array([[1.0, -2.0]], F32)
    weight = np.array([[3.0, 4.0], [0.0, 2.0], [1.0, 0.0]], F32)
    state_dict = {"fc.weight_v": weight, "fc.weight_g": np.array([[5.0], [6.0], [7.0]], F32)}
    state_dict["fc.bias"] = np.ones(3, F32)
    rename = {"fc.weight_g": scale, "fc.weight_v": "Dense_0/kernel", "fc": "Dense_0"}
    shapes = jax.eval_shape(Normed().init, jax.random.key(0), x)
    variables = bnjax.from_torch(state_dict, Normed(), shapes, rename=rename)
    found: Any = Normed().apply(variables, x)
    expected = [[5 * (3 - 8) / 5 + 1, 6 * -4 / 2 + 1, 7 * 1 + 1]]
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    back = bnjax.to_torch(variables, state_dict, rename=rename, numpy=True)
    chex.assert_trees_all_equal(back, state_dict)


# Automatic names


def test_errors_suggest_a_rename_for_auto_named_models_by_order_and_shape():
    state_dict, variables = network()
    names = {"conv": "Conv_0", "bn": "BatchNorm_0", "fc": "Dense_0"}
    auto = {kind: {names[k]: v for k, v in tree.items()} for kind, tree in variables.items()}
    lines = refused(state_dict, auto)
    assert lines[:3] == [
        'by order and shape, names match with rename={"conv": "Conv_0", "bn": "BatchNorm_0", '
        '"fc": "Dense_0"}. Verify it with `check`',
        "only in PyTorch: conv.weight (4, 3, 3, 3); nearest: params/Conv_0/kernel",
        "only in PyTorch: bn.weight (4,); nearest: params/BatchNorm_0/scale",
    ]
    new = bnjax.from_torch(state_dict, None, auto, **options_of(lines[0]))
    wanted = bnjax.from_torch(state_dict, None, variables)
    for name, given in names.items():
        chex.assert_trees_all_equal(new["params"][given], wanted["params"][name])
    both = {f"net.{k}": v for k, v in state_dict.items()} | {"loss.weight": np.ones(9, F32)}
    first, *_ = refused(both, auto)
    assert options_of(first) == {
        "rename": {"net.conv": "Conv_0", "net.bn": "BatchNorm_0", "net.fc": "Dense_0"},
        "ignore": ["loss/**"],
    }


def dense(*sizes: tuple[int, int]) -> dict[str, Any]:
    return {f"Dense_{n}": {"kernel": np.zeros(size, F32)} for n, size in enumerate(sizes)}


def test_blocks_of_a_flax_model_stay_together_and_in_order():
    """`Dense_1` of the top may come before, between or after the blocks, as in PyTorch."""
    blocks = {f"Block_{n}": dense((2, 3), (3, 2)) for n in (0, 1, 10, 2)}
    variables = params(**blocks, **dense((5, 2), (2, 2)))
    sizes = {"stem": (2, 5), "mid": (2, 2)}
    order = ["stem", "b0.up", "b0.down", "b1.up", "b1.down", "mid", "b2.up", "b2.down"]
    order += ["b3.up", "b3.down"]
    shape = {"up": (3, 2), "down": (2, 3), **sizes}
    state_dict = {f"{k}.weight": np.ones(shape[k.split(".")[-1]], F32) for k in order}
    first, *_ = refused(state_dict, variables)
    assert first.endswith("}. Verify it with `check`")
    assert options_of(first)["rename"] == {
        "stem": "Dense_0",
        "mid": "Dense_1",
        **{f"b{n}.up": f"Block_{m}/Dense_0" for n, m in enumerate((0, 1, 2, 10))},
        **{f"b{n}.down": f"Block_{m}/Dense_1" for n, m in enumerate((0, 1, 2, 10))},
    }


def test_errors_say_if_another_order_matches_too():
    variables = params(actor=dense((2, 2)), critic=dense((2, 2)))
    state_dict = {f"{name}.weight": np.ones((2, 2), F32) for name in ("policy", "value")}
    first, *_ = refused(state_dict, variables)
    assert first == (
        'by order and shape, names match with rename={"policy": "actor/Dense_0", "value": '
        '"critic/Dense_0"}, but another order matches too. Verify it with `check`'
    )


def test_layers_in_another_order_are_matched_by_shape():
    variables = params(**dense((2, 3), (3, 4)))
    state_dict = {"out.weight": np.ones((4, 3), F32), "in.weight": np.ones((3, 2), F32)}
    first, *_ = refused(state_dict, variables)
    assert options_of(first)["rename"] == {"out": "Dense_1", "in": "Dense_0"}
    state_dict["in.weight"] = np.ones((3, 5), F32)
    assert not any("rename=" in line for line in refused(state_dict, variables))


# Invalid renames


@pytest.mark.parametrize(
    ("rename", "error", "message"),
    [
        (
            ["conv"],
            TypeError,
            "`rename` must map PyTorch names to Flax names, such as "
            '{"backbone.stem": "encoder/conv1"}, or be a function from name to name, got list.',
        ),
        ({"conv": 3}, TypeError, "`rename` must map str to str, got 'conv': 3."),
        (
            lambda name: None,
            TypeError,
            "`rename` must return a str, got NoneType for 'conv.weight'.",
        ),
        (
            {"stem/conv": "conv"},
            ValueError,
            "`rename` must map PyTorch names to Flax names, not the reverse: write "
            'rename={"conv": "stem/conv"}.',
        ),
        (
            {"covn": "stem/conv"},
            ValueError,
            "`rename` must map PyTorch names to Flax names, but PyTorch has no 'covn'; nearest: "
            "'conv', 'conv.weight', 'fc'.",
        ),
    ],
)
def test_invalid_renames_are_refused(rename, error, message):
    state_dict, variables = network()
    around = {name: {"stem": tree} for name, tree in variables.items()}
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        bnjax.from_torch(state_dict, None, around, rename=rename)


def test_errors_show_the_renamed_name():
    array = np.ones((2, 2), F32)
    message = mismatch(
        'by order and shape, names match with rename={"a": "net/b"}. Verify it with `check`',
        "only in PyTorch: a.weight (2, 2), renamed to nett.b.weight; nearest: params/net/b/kernel",
        "only in Flax: params/net/b/kernel (2, 2); nearest: a.weight",
    )
    with pytest.raises(ValueError, match=message):
        bnjax.from_torch(
            {"a.weight": array}, None, params(net={"b": {"kernel": array}}), rename={"a": "nett/b"}
        )
