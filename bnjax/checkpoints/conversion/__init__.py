"""Convert PyTorch state dicts to Flax variables and back: from_torch, to_torch, torch_outputs."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, overload

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx

from bnjax import globs
from bnjax.checkpoints.conversion import banked, flattened, repeated
from bnjax.checkpoints.conversion.agreement import check_outputs, torch_outputs
from bnjax.checkpoints.conversion.names import COUNTER, Name, Rename
from bnjax.checkpoints.conversion.plan import Plan, exported, plan, state_arrays, without
from bnjax.checkpoints.conversion.problems import counted, is_count
from bnjax.checkpoints.conversion.rules import Options
from bnjax.checkpoints.conversion.trees import Leaf, tree
from bnjax.checkpoints.conversion.words import few
from bnjax.checkpoints.tensors import as_tensor
from bnjax.core.moments import working_dtype

__all__ = ["from_torch", "to_torch", "torch_outputs"]


@overload
def from_torch(
    state_dict: Mapping[str, Any],
    model: nnx.Module,
    variables: nnx.State | None = None,
    *,
    rename: Rename | None = None,
    flatten: Mapping[str, Sequence[int]] | None = None,
    transposed: globs.Paths | None = None,
    ignore: globs.Paths = (),
    check: tuple[Any, ...] | None = None,
) -> nnx.State: ...
@overload
def from_torch(
    state_dict: Mapping[str, Any],
    model: None,
    variables: nnx.State,
    *,
    rename: Rename | None = None,
    flatten: Mapping[str, Sequence[int]] | None = None,
    transposed: globs.Paths | None = None,
    ignore: globs.Paths = (),
) -> nnx.State: ...
@overload
def from_torch(
    state_dict: Mapping[str, Any],
    model: nn.Module | None,
    variables: Mapping[str, Any],
    *,
    rename: Rename | None = None,
    flatten: Mapping[str, Sequence[int]] | None = None,
    transposed: globs.Paths | None = None,
    ignore: globs.Paths = (),
    check: tuple[Any, ...] | None = None,
) -> dict[str, Any]: ...
def from_torch(
    state_dict: Mapping[str, Any],
    model: Any,
    variables: Any = None,
    *,
    rename: Rename | None = None,
    flatten: Mapping[str, Sequence[int]] | None = None,
    transposed: globs.Paths | None = None,
    ignore: globs.Paths = (),
    check: tuple[Any, ...] | None = None,
) -> Any:
    """Convert a PyTorch state dict to the variables of a Flax model.

    Arrays change name and layout with their layer. Conv weights (out, in / groups, *kernel) become
    (*kernel, in / groups, out), in 1d to 3d; linear weights are transposed; embeddings stay as they
    are. The `weight` of a normalization becomes `scale`, that of a PReLU `negative_slope`. A batch
    norm's `running_mean` and `running_var` become `mean` and `var`; `num_batches_tracked` becomes
    `count` if the layer has one (momentum=None), and is dropped otherwise. Any other array keeps
    its name and layout.

    Some layers are organized differently:

    - LSTM, GRU and RNN stack their gates; Flax's cells keep them separate (linen) or stack them
      differently (nnx). Layer 1 of `rnn`, called `rnn.l1` here (backward: `rnn.l1_reverse`), is
      `rnn/1/cell`; a single layer is `rnn/cell`; a `Bidirectional` has `rnn/forward_rnn/cell` and
      `rnn/backward_rnn/cell`. Two biases become their sum if Flax has only one.
    - `MultiheadAttention`, and attention with `qkv` and `proj` or with `q_proj`, `k_proj`, `v_proj`
      and `out_proj`, becomes Flax's `query`, `key`, `value` and `out`, whose kernels have a heads
      axis. A linear layer also fits any `DenseGeneral` whose axes multiply to the same sizes.
    - A batch norm with `banks` is timm's `SplitBatchNorm2d`: the first bank is the layer itself,
      the others are its `aux_bn`. With affine=True they must have the same weight and bias; with
      "both", the first bank's are shared, and the others add their differences.
    - An array under several names, such as a tied weight, is read once, by the name Flax uses.

    Names are matched by module path: `layer1.0.bn1` is `layer1/0/bn1` or `layer1_0/bn1`, and the
    `0` of a PyTorch `Sequential` is the `layers_0` of a Flax one. Nothing is guessed: one error
    lists all names that have no counterpart, or several, and all arrays of the wrong shape or
    dtype. Where it can, it also gives the fix: a `rename` that strips the prefixes of wrappers
    (`module.`, `_orig_mod.`, `model.`) or maps layers to Flax's automatic names (`Conv_0`), or the
    call that removes weight norm or another parametrization.

    A PyTorch transposed convolution with stride s, padding p, output_padding o and dilation d is
    Flax's `ConvTranspose` with strides s, kernel_dilation d and, on each axis with kernel size k,
    the padding `(d * (k - 1) - p, d * (k - 1) - p + o)`; "VALID" is p = o = 0 if k >= s. With
    `transpose_kernel=True`, its kernel has the layout of a conv. By default, it is flipped and
    (*kernel, in, out); for a linen model, only `transposed` can tell. Flax's has no groups.

    Guide: examples/guides/from_torch.md

    Args:
        state_dict: tensors or NumPy arrays by PyTorch name, as from `module.state_dict()` or
            `bnjax.load`.
        model: a linen or nnx model, or None to convert from its variables alone.
        variables: for linen, the dict from `model.init`; only shapes and dtypes matter, so
            `jax.eval_shape(model.init, ...)` is enough. For nnx, a state; by default the model's.
        rename: maps PyTorch module paths or names to Flax ones, as in
            `{"backbone.stem": "encoder/conv1"}`; the longest match wins, and "" is the top. Or a
            function from full name to full name.
        flatten: for each dense layer, normalization or recurrent cell after a flatten, its Flax
            path and the shape (C, H, W) that PyTorch flattens; Flax flattens (H, W, C). A layer
            with several inputs per channel of the preceding conv triggers a warning; pass {} if
            both frameworks flatten in the same order, or neither flattens.
        transposed: globs over the Flax paths of transposed convolutions with flipped kernels, as
            above. Detected for an nnx model; required for a linen model whose code uses
            `ConvTranspose`.
        ignore: globs over PyTorch or Flax names, with "/" or "." as separator, such as `"fc/*"`.
            Matching PyTorch arrays are dropped; matching Flax arrays keep their values.
        check: `(x, y)`, an input of the Flax model (channels last) and PyTorch's output for it, or
            `(x, y, kwargs)` with keyword arguments for the Flax model. Compares the outputs, in
            evaluation mode. With `bnjax.torch_outputs(torch_model, x_of_torch)` as y, the error
            names the first layer that differs. Pass several inputs as a tuple.

    Returns:
        A new tree like `variables`, with the same dtypes, except that statistics are at least
        float32. Update an nnx model with `nnx.update(model, state)`. No memory is shared.

    Raises:
        ValueError: names or shapes do not match, a running variance is negative or not finite, or
            the outputs differ by more than 1e-4 times the largest one. Nothing is converted.
        TypeError: the state dict holds anything but dense arrays.

    Warns:
        UserWarning: a layer seems to follow a flatten.

    >>> weight = np.array([[1.0, 2.0]], np.float32)  # (out, in)
    >>> variables = {"params": {"fc": {"kernel": np.zeros((2, 1), np.float32)}}}
    >>> from_torch({"fc.weight": weight}, None, variables)["params"]["fc"]["kernel"].tolist()
    [[1.0], [2.0]]
    """
    made = tree(model, variables)
    given = state_arrays(state_dict, "state_dict")
    arrays = banked.joined(given)
    leaves = banked.apart(made.leaves, arrays.keys() != given.keys())
    planned = plan(arrays, leaves, Options(rename, flatten, transposed, ignore), model)
    arrays = planned.split(arrays)
    planned.problems += banked.unshared(arrays, planned.pairs, made.leaves)
    planned.check(arrays)
    suspects = _suspects(planned, flatten)
    found = {name: placed.to_flax(arrays[key]) for key, (name, placed) in planned.pairs.items()}
    new = made.replaced(
        {
            name: _converted(array, name, made.leaves[name])
            for name, array in banked.shared(found, made.leaves).items()
        }
    )
    if check is not None:
        check_outputs(model, new, planned, check, [each.path for each in suspects])
    return new


def to_torch(
    variables: Any,
    like: Mapping[str, Any] | None = None,
    *,
    rename: Rename | None = None,
    flatten: Mapping[str, Sequence[int]] | None = None,
    transposed: globs.Paths | None = None,
    ignore: globs.Paths = (),
    numpy: bool = False,
) -> dict[str, Any]:
    """Convert Flax variables to a PyTorch state dict, for `load_state_dict(strict=True)`.

    The inverse of `from_torch`, bit for bit, with the same options. An array that `like` holds
    under several names is written under all of them. If Flax has only the sum of two biases, they
    are restored from `like` if their sum still matches; otherwise one is the sum, the other 0.

    Guide: examples/guides/from_torch.md

    Args:
        variables: linen variables, an nnx model or its state.
        like: the state dict of the PyTorch model, for names, their order and shapes. Without it,
            names are made from paths, and a trailing number becomes a module: `layer1_0/bn1` is
            `layer1.0.bn1`. Gates and attention projections are then not stacked.
        rename: as for `from_torch`, from PyTorch names to Flax names; only with `like`.
        flatten: as for `from_torch`.
        transposed: as for `from_torch`; detected for an nnx model, but not for its state.
        ignore: as for `from_torch`: matching PyTorch arrays keep their values from `like`, and
            matching Flax arrays are dropped.
        numpy: return NumPy arrays; does not need torch.

    Returns:
        New tensors by name, in the dtypes of the variables. For a batch norm without `count`,
        `num_batches_tracked` comes from `like`, or is 0; PyTorch uses it only with momentum=None,
        where there is a `count`.

    Raises:
        ValueError: names or shapes do not match, or a running variance is negative or not finite.
            Nothing is converted.
        TypeError: `like` holds anything but dense arrays.

    >>> variables = {"batch_stats": {"bn_1": {"mean": np.zeros(2), "var": np.ones(2)}}}
    >>> list(to_torch(variables, numpy=True))
    ['bn.1.running_mean', 'bn.1.running_var', 'bn.1.num_batches_tracked']
    """
    model, state = (variables, None) if isinstance(variables, nnx.Module) else (None, variables)
    leaves = tree(model, state).leaves
    if like is None:
        repeated.check_single(leaves, model)
    leaves = banked.apart(leaves)
    options = Options(rename, flatten, transposed, ignore)
    if like is None:
        leaves, arrays = without(leaves, ignore), {}
        planned = exported(leaves, options, model)
    else:
        arrays = banked.joined(state_arrays(like, "like"))
        planned = plan(arrays, leaves, options, model)
    old = dict(arrays)
    for key, (name, placed) in planned.pairs.items():
        array = placed.to_torch(np.asarray(leaves[name].value))
        arrays[key] = array.astype(np.int64) if name.in_torch.endswith(COUNTER) else array
    planned.check(arrays)
    if like is not None:
        _suspects(planned, flatten)
        arrays = planned.join(arrays, old)
        if stale := planned.stale(arrays, old):
            warnings.warn(
                f"`ignore` keeps the old values of {few([*stale])}, which "
                f"{'equal' if len(stale) > 1 else 'equals'} {few([*stale.values()])} in `like`. If "
                "these are tied in PyTorch, `rename` both to one name instead, so that both are "
                "updated.",
                UserWarning,
                stacklevel=2,
            )
    for name in leaves if like is None else ():
        if name.statistic and name.leaf == "mean":
            arrays.setdefault(name._replace(leaf="count").exported, np.zeros((), np.int64))
    arrays = banked.parted(arrays, like)
    convert = (lambda array: np.array(array, order="C")) if numpy else as_tensor
    return {key: convert(array) for key, array in arrays.items()}


def _suspects(planned: Plan, flatten: Mapping[str, Any] | None) -> list[flattened.Suspect]:
    """The layers that may follow a flatten, with a warning, unless the user says there are none."""
    if planned.rules is None or flatten == {}:
        return []
    found = flattened.suspects(planned.pairs, planned.rules, bool(flatten))
    for text in flattened.warnings(found):
        warnings.warn(text, UserWarning, stacklevel=3)
    return found


def _converted(array: np.ndarray, name: Name, leaf: Leaf) -> np.ndarray:
    """The array in the model's dtype, but running statistics at least in float32."""
    dtype = leaf.value.dtype
    if name.statistic and jnp.issubdtype(dtype, jnp.inexact):
        dtype = working_dtype(dtype)
    array = counted(array) if is_count(name) else array
    return array.astype(dtype, copy=False)
