"""Conversion of state dicts to Flax and back: names, layouts, errors, and batch norms."""

import copy
import re
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import bnjax
from tests.support.state_dicts import (
    F32,
    batch_norm,
    batch_norm_variables,
    mismatch,
    params,
)

pytestmark = pytest.mark.quick_compile

# Names


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("layer1.0.bn1.weight", ("layer1", "0", "bn1")),
        ("layer1.0.bn1.weight", ("layer1_0", "bn1")),
        ("layer1.0.bn1.weight", ("layer1_0_bn1",)),
        ("features.3.weight", ("features", "layers_3")),
        ("0.weight", ("layers_0",)),
        ("encoder.layers.0.weight", ("encoder", "layers_0")),
        ("weight", ()),
    ],
)
def test_module_paths_match_in_all_usual_spellings(name, path):
    value: Any = np.arange(3, dtype=F32)
    tree: Any = {"scale": np.zeros(3, F32)}
    for part in reversed(path):
        tree = {part: tree}
    new = bnjax.from_torch({name: value}, None, {"params": tree})["params"]
    for part in path:
        new = new[part]
    chex.assert_trees_all_equal(new, {"scale": value})


@pytest.mark.parametrize(
    "rename",
    [
        {"module.stem": "encoder/conv1"},
        {"module": "", "module.stem": "encoder.conv1"},
        {"module.stem.weight": "encoder/conv1/kernel"},
        lambda name: name.replace("module.stem", "encoder/conv1"),
    ],
)
def test_rename_maps_names_that_differ(rename):
    weight = np.arange(6, dtype=F32).reshape(2, 3)
    variables = params(encoder={"conv1": {"kernel": np.zeros((3, 2), F32)}})
    new = bnjax.from_torch({"module.stem.weight": weight}, None, variables, rename=rename)
    chex.assert_trees_all_equal(new, params(encoder={"conv1": {"kernel": weight.T}}))
    back = bnjax.to_torch(new, {"module.stem.weight": weight}, rename=rename, numpy=True)
    chex.assert_trees_all_equal(back, {"module.stem.weight": weight})


def test_arrays_of_unknown_layers_keep_their_name_and_layout():
    embedding = np.arange(6, dtype=F32).reshape(1, 2, 3)
    variables = params(pos_embed=np.zeros((1, 2, 3), F32))
    new = bnjax.from_torch({"pos_embed": embedding}, None, variables)
    chex.assert_trees_all_equal(new, params(pos_embed=embedding))


def test_one_error_lists_all_mismatches_with_the_nearest_names():
    state_dict = {
        "cnov1.weight": np.zeros((4, 3, 3, 3), F32),
        "fc.weight": np.zeros((5, 8), F32),
        "fc.bias": np.zeros(5, np.int32),
        "head.num_batches_tracked": np.array(1),
    }
    variables = params(
        conv1={"kernel": np.zeros((3, 3, 3, 4), F32)},
        fc={"kernel": np.zeros((9, 5), F32), "bias": np.zeros(5, F32)},
    )
    message = mismatch(
        'names match with rename={"cnov1": "conv1"}, ignore=["head/**"]',
        "only in PyTorch: cnov1.weight (4, 3, 3, 3); nearest: params/conv1/kernel",
        "only in PyTorch: head.num_batches_tracked ()",
        "only in Flax: params/conv1/kernel (3, 3, 3, 4); nearest: cnov1.weight",
        "wrong shape: fc.weight (5, 8) for params/fc/kernel (9, 5), which is (5, 9) in PyTorch",
        "wrong dtype: fc.bias int32 for params/fc/bias float32",
    )
    with pytest.raises(ValueError, match=message):
        bnjax.from_torch(state_dict, None, variables)
    with pytest.raises(ValueError, match=message):
        bnjax.to_torch(variables, state_dict, numpy=True)


def test_ambiguous_names_are_an_error():
    zero = np.zeros(2, F32)
    variables = params(a={"b": {"c": {"bias": zero}}})
    line = "ambiguous: a.b_c.bias, a_b.c.bias for params/a/b/c/bias"
    with pytest.raises(ValueError, match=mismatch(line)):
        bnjax.from_torch({"a.b_c.bias": zero, "a_b.c.bias": zero + 1}, None, variables)
    line = "ambiguous: b.0.bias for params/b/0/bias, params/b_0/bias"
    with pytest.raises(ValueError, match=mismatch(line)):
        bnjax.to_torch(params(b={"0": {"bias": zero}}, b_0={"bias": zero}), numpy=True)


def test_ignored_arrays_are_dropped_or_keep_their_values():
    state_dict = {"fc.weight": np.ones((5, 2), F32), "conv.bias": np.ones(3, F32)}
    fresh = {"kernel": np.full((2, 7), 3, F32), "bias": np.full(7, 4, F32)}
    variables = params(fc=fresh, conv={"bias": np.zeros(3, F32)})
    new = bnjax.from_torch(state_dict, None, variables, ignore="fc.*")
    chex.assert_trees_all_equal(new, params(fc=fresh, conv={"bias": np.ones(3, F32)}))
    back = bnjax.to_torch(new, state_dict, ignore="fc/*", numpy=True)
    chex.assert_trees_all_equal(back, state_dict)
    assert list(bnjax.to_torch(new, ignore="fc/*", numpy=True)) == ["conv.bias"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"ignore": "head.*"},
            "`ignore` has 'head.*', which matches no name; nearest: 'a/bias', 'a/weight', "
            "'a/kernel'.",
        ),
        (
            {"rename": {"head": "fc"}},
            "`rename` must map PyTorch names to Flax names, but PyTorch has no 'head'; nearest: "
            "'a', 'a.bias', 'a.weight'.",
        ),
        (
            {"rename": {"b": "a"}},
            "`rename` must map PyTorch names to Flax names, but PyTorch has no 'b'; nearest: "
            "'a.bias', 'a.weight', 'a'.",
        ),
        (
            {"transposed": "up"},
            "`transposed` has 'up', which matches no convolution; there are none.",
        ),
        (
            {"flatten": {"fc": (1, 2)}},
            "`flatten` has 'fc', which matches no dense layer, normalization or recurrent cell; "
            "the only one is 'a'.",
        ),
        (
            {"flatten": {"a": 8}},
            "`flatten['a']` must be the shape (C, H, W) that PyTorch flattens into the 8 inputs of "
            "this layer, got 8.",
        ),
        (
            {"flatten": {"a": (3, 2)}},
            "`flatten['a']` must be the shape (C, H, W) that PyTorch flattens into the 8 inputs of "
            "this layer, got (3, 2).",
        ),
    ],
)
def test_an_option_that_matches_nothing_is_an_error(options, message):
    variables = params(a={"kernel": np.zeros((8, 2), F32), "bias": np.zeros(2, F32)})
    state_dict = {"a.weight": np.zeros((2, 8), F32), "a.bias": np.zeros(2, F32)}
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        bnjax.from_torch(state_dict, None, variables, **options)


def test_flatten_must_be_a_mapping():
    message = (
        '`flatten` must map Flax layer paths to shapes (C, H, W), such as {"head/fc": (512, 7, 7)}'
        ", got tuple."
    )
    shape: Any = (512, 7, 7)
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        bnjax.from_torch({}, None, params(), flatten=shape)


@pytest.mark.parametrize(
    ("state_dict", "model", "variables", "message"),
    [
        (
            {"epoch": 3, "state_dict": {}},
            None,
            params(),
            "`state_dict` must hold only dense arrays of numbers, but these are not: "
            "{'epoch': 'int', 'state_dict': 'dict'}. Did you mean state_dict['state_dict']?",
        ),
        (
            [],
            None,
            params(),
            "`state_dict` must be a mapping of names to arrays, got list. For a torch module, pass "
            "`module.state_dict()`.",
        ),
        (
            {},
            nn.Dense,
            params(),
            "`model` must be a flax.linen.Module or flax.nnx.Module instance, or None, got type.",
        ),
        (
            {},
            nn.Dense(3),
            {"kernel": 1},
            "`variables` must be a dict with the collections `params` and `batch_stats`, as "
            "returned by `model.init`, or an `nnx.State`, got ['kernel'].",
        ),
    ],
)
def test_arguments_of_the_wrong_kind_are_an_error(state_dict, model, variables, message):
    with pytest.raises((TypeError, ValueError), match=f"^{re.escape(message)}$"):
        bnjax.from_torch(state_dict, model, variables)


# Batch norm


def test_batch_norms_convert_with_statistics_and_with_the_counter_if_they_have_one():
    stats = {"mean": np.array([3, 4], F32), "var": np.array([4, 5], F32)}
    affine = {"scale": np.array([1, 2], F32), "bias": np.array([2, 3], F32)}
    expected = {"params": {"bn": affine}, "batch_stats": {"bn": stats}}
    chex.assert_trees_all_equal(
        bnjax.from_torch(batch_norm(), None, batch_norm_variables()), expected
    )
    counting = batch_norm_variables(count=np.array(0, np.int32))
    new = bnjax.from_torch(batch_norm(), None, counting)
    assert new["batch_stats"]["bn"]["count"].dtype == np.int32
    chex.assert_trees_all_equal(
        new, {"params": {"bn": affine}, "batch_stats": {"bn": {**stats, "count": 7}}}
    )


def test_the_counter_is_exported_from_the_layer_or_from_like_or_as_zero():
    key = "bn.num_batches_tracked"
    counting = bnjax.from_torch(batch_norm(), None, batch_norm_variables(count=np.array(0)))
    assert bnjax.to_torch(counting, numpy=True)[key] == 7
    plain = bnjax.from_torch(batch_norm(), None, batch_norm_variables())
    assert bnjax.to_torch(plain, batch_norm(), numpy=True)[key] == 7
    back = bnjax.to_torch(plain, numpy=True)[key]
    assert (back, back.dtype, back.shape) == (0, np.int64, ())


def test_statistics_without_a_counterpart_are_an_error():
    untracked = {"params": batch_norm_variables()["params"]}
    message = mismatch(
        "only in PyTorch: bn.running_mean (2,)",
        "only in PyTorch: bn.running_var (2,)",
        "only in PyTorch: bn.num_batches_tracked ()",
    )
    with pytest.raises(ValueError, match=message.replace(r"\(2,\)", r"\(2,\).*")):
        bnjax.from_torch(batch_norm(), None, untracked)
    old = {name: value for name, value in batch_norm().items() if "num_batches" not in name}
    counting = batch_norm_variables(count=np.array(0, np.int32))
    with pytest.raises(ValueError, match=r"\n  only in Flax: batch_stats/bn/count \(\)$"):
        bnjax.from_torch(old, None, counting)
    assert (
        bnjax.from_torch(old, None, counting, ignore="**/count")["batch_stats"]["bn"]["count"] == 0
    )


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16])
def test_statistics_in_half_precision_become_float32(dtype):
    half = {n: v if v.ndim == 0 else v.astype(dtype) for n, v in batch_norm().items()}
    variables = jax.tree.map(lambda v: v.astype(dtype), batch_norm_variables())
    new = bnjax.from_torch(half, None, variables)
    assert {v.dtype.name for v in new["batch_stats"]["bn"].values()} == {"float32"}
    assert {v.dtype.name for v in new["params"]["bn"].values()} == {jnp.dtype(dtype).name}
    chex.assert_trees_all_equal(new["batch_stats"]["bn"]["var"], np.array([4, 5], F32))


def invalid(*lines: str) -> str:
    head = "Some running statistics are invalid, so nothing was converted."
    return "^" + re.escape("\n  ".join((head, *lines))) + "$"


@pytest.mark.parametrize("dtype", [np.float16, np.float32, jnp.bfloat16])
def test_invalid_statistics_are_refused_by_name(dtype):
    state_dict = batch_norm(4)
    state_dict["bn.running_var"] = np.array([-1, np.nan, np.inf, 1], dtype)
    state_dict["bn.running_mean"] = np.array([-1, np.nan, 0, 1], dtype)
    message = invalid(
        "invalid mean: bn.running_mean has 1 non-finite of 4 values",
        "invalid variance: bn.running_var has 2 non-finite and 1 negative of 4 values",
    )
    with pytest.raises(ValueError, match=message):
        bnjax.from_torch(state_dict, None, batch_norm_variables(4))


def test_a_slightly_negative_variance_is_refused_with_both_repairs():
    state_dict = batch_norm(4)
    state_dict["bn.running_var"] = np.array([-5e-6, 1, -1e-6, 1], F32)
    message = invalid(
        "invalid variance: bn.running_var has 2 negative of 4 values, none below -5e-06. Set them "
        "to 0 if they come from rounding, or add the eps back if one was subtracted from all "
        "variances"
    )
    with pytest.raises(ValueError, match=message):
        bnjax.from_torch(state_dict, None, batch_norm_variables(4))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, jnp.bfloat16])
def test_a_count_that_was_averaged_or_cast_is_rounded(dtype):
    state_dict = {**batch_norm(), "bn.num_batches_tracked": np.array(6.75, dtype)}
    counting = batch_norm_variables(count=np.array(0, np.int32))
    new = bnjax.from_torch(state_dict, None, counting)
    assert new["batch_stats"]["bn"]["count"] == 7
    for value in (np.nan, np.inf):
        state_dict["bn.num_batches_tracked"] = np.array(value, dtype)
        line = f"invalid count: bn.num_batches_tracked is {value}; skip it with `ignore`"
        with pytest.raises(ValueError, match=mismatch(line)):
            bnjax.from_torch(state_dict, None, counting)
        bnjax.from_torch(state_dict, None, batch_norm_variables())


@pytest.mark.parametrize("count", [2**31, -(2**31) - 1])
def test_a_count_too_large_for_its_dtype_is_refused(count):
    state_dict = {**batch_norm(), "bn.num_batches_tracked": np.array(count)}
    message = mismatch(
        f"out of range: bn.num_batches_tracked has {count}, but batch_stats/bn/count is int32"
    )
    with pytest.raises(ValueError, match=message):
        bnjax.from_torch(state_dict, None, batch_norm_variables(count=np.array(0, np.int32)))


# Purity


def test_inputs_stay_unchanged_and_no_memory_is_shared():
    state_dict, variables = batch_norm(), jax.tree.map(jnp.asarray, batch_norm_variables())
    before = copy.deepcopy((state_dict, jax.device_get(variables)))
    new = bnjax.from_torch(state_dict, None, variables)
    back = bnjax.to_torch(new, state_dict, numpy=True)
    kept = jax.device_get(new)
    chex.assert_trees_all_equal((state_dict, variables), before)
    for array in (*state_dict.values(), *back.values()):
        array += 1
    chex.assert_trees_all_equal(new, kept)
    chex.assert_trees_all_equal(variables, before[1])


def test_collections_unknown_to_pytorch_stay_as_they_are():
    variables = {**batch_norm_variables(), "cache": {"bn": {"mean": np.ones(3)}}}
    new = bnjax.from_torch(batch_norm(), None, variables)
    assert new["cache"]["bn"]["mean"] is variables["cache"]["bn"]["mean"]


def test_shapes_are_enough_and_boxes_are_kept():
    init = nn.with_partitioning(nn.initializers.ones, ("in", "out"))
    model = nn.Dense(2, kernel_init=init)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, 3)))
    state_dict = {"weight": np.arange(6, dtype=F32).reshape(2, 3), "bias": np.zeros(2, F32)}
    new = bnjax.from_torch(state_dict, model, shapes)
    assert new["params"]["kernel"].names == ("in", "out")
    np.testing.assert_array_equal(new["params"]["kernel"].value, state_dict["weight"].T)
    chex.assert_trees_all_equal(bnjax.to_torch(new, numpy=True), state_dict)


def test_an_extra_prefix_is_found_quickly_among_thousands_of_names():
    stats = {"mean": np.zeros(2, F32), "var": np.ones(2, F32)}
    variables = {"batch_stats": {f"layer_{number}": stats for number in range(1000)}}
    state_dict = bnjax.to_torch(variables, numpy=True)
    wrapped = {f"module.{name}": array for name, array in state_dict.items()}
    with pytest.raises(ValueError, match="extra prefix") as caught:
        bnjax.from_torch(wrapped, None, variables)
    _, first, *others = str(caught.value).splitlines()
    assert first == '  extra prefix \'module\': remove it with rename={"module": ""}'
    assert len(others) == len(state_dict) + 2 * 1000  # Flax has no counters
    bnjax.from_torch(wrapped, None, variables, rename={"module": ""})
