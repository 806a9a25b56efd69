"""PyTorch state dicts as Flax variables, and back: from_torch, to_torch, torch_outputs."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, overload

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx

from bnjax import globs
from bnjax.checkpoints.conversion import banked, flattened
from bnjax.checkpoints.conversion.agreement import check_outputs, torch_outputs
from bnjax.checkpoints.conversion.layouts import Layout
from bnjax.checkpoints.conversion.names import COUNTER, Name, Rename
from bnjax.checkpoints.conversion.plan import Plan, exported, plan, state_arrays, without
from bnjax.checkpoints.conversion.problems import counted, is_count
from bnjax.checkpoints.conversion.rules import Options
from bnjax.checkpoints.conversion.trees import Leaf, tree
from bnjax.checkpoints.conversion.words import few
from bnjax.checkpoints.tensors import as_tensor
from bnjax.core.moments import working_dtype
from bnjax.models.banks import with_own_affine

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
    """The variables of a Flax model with the values of a PyTorch state dict.

    Layers come in their own layouts: convs (out, in / groups, *kernel) become (*kernel,
    in / groups, out), 1d to 3d; linear weights are transposed; embeddings stay; `weight` of a
    normalization is `scale`; `running_mean` and `running_var` of a batch norm are `mean` and `var`;
    `num_batches_tracked` is `count` where the layer has one (momentum=None), and is passed over
    elsewhere; `weight` of a PReLU is `negative_slope`. What has another name goes under that name,
    as it is.

    Some layers are arranged differently:

    - LSTM, GRU and RNN stack their gates, which Flax's cells have apart (linen) or in another way
      (nnx). Layer 1 of `rnn` is called `rnn.l1`, backward `rnn.l1_reverse`, and is `rnn/1/cell`; if
      there is one layer, it is `rnn/cell`; of a `Bidirectional` there are `rnn/forward_rnn/cell`
      and `rnn/backward_rnn/cell`. Two biases that are only added become their sum.
    - `MultiheadAttention`, and attention with `qkv` and `proj` or `q_proj`, `k_proj`, `v_proj` and
      `out_proj`, is Flax's with `query`, `key`, `value` and `out`, whose kernels have an axis for
      the heads. A linear layer goes into any `DenseGeneral` whose axes multiply to its own.
    - A batch norm with `banks` and scale and bias of their own (affine="own") is timm's
      `SplitBatchNorm2d`: the first bank is the layer itself, the others are its `aux_bn`.
    - One array under several names, as of tied weights, is read once, by the name that Flax has.

    Names are matched by module path: `layer1.0.bn1` is `layer1/0/bn1` or `layer1_0/bn1`, and the
    `0` of a PyTorch `Sequential` is the `layers_0` of a Flax one. Nothing is guessed: all names
    without a counterpart on either side, or with several, and all arrays that do not fit theirs are
    listed in one error. It says what to write where it is clear: the `rename` without the prefixes
    of wrappers (`module.`, `_orig_mod.`, `model.`), the one for a model whose layers Flax has named
    by itself (`Conv_0`), or how to take off weight norm and other parametrizations.

    A transposed convolution of PyTorch with stride s, padding p, output_padding o and dilation d is
    Flax's `ConvTranspose` with strides s, kernel_dilation d and, for each axis of kernel size k,
    the padding `(d * (k - 1) - p, d * (k - 1) - p + o)`; "VALID" is p = o = 0 where k >= s. With
    `transpose_kernel=True` its kernel lies as that of a conv; without, the default, it is flipped
    and (*kernel, in, out), which nothing but `transposed` says for a linen model. With groups it
    has no counterpart.

    Guide: examples/guides/from_torch.md

    Args:
        state_dict: PyTorch names with tensors or NumPy arrays, as from `module.state_dict()` or
            `bnjax.load`.
        model: a linen or nnx model; None if only its variables are at hand.
        variables: for linen the dict from `model.init`, of which shapes and dtypes count, so
            `jax.eval_shape(model.init, ...)` will do; for nnx a state, by default the model's.
        rename: names to look for in place of those in PyTorch: a mapping of module paths (or names)
            of PyTorch to those of Flax, `{"backbone.stem": "encoder/conv1"}`, where the longest
            that fits counts and "" is the top; or a callable from full name to full name.
        flatten: for a dense layer, a normalization or a recurrent cell after a flatten, by its path
            in Flax, the shape (C, H, W) that PyTorch flattens: Flax flattens (H, W, C). A layer
            that takes several values for each channel of a conv before it draws a warning; pass {}
            if both flatten alike, or neither does.
        transposed: globs over the Flax paths of the transposed convolutions with flipped kernels,
            as above; by default, those of an nnx model, and none in a linen model, where it is an
            error if its code has a `ConvTranspose`.
        ignore: globs over names of either side, with "/" or "." between their parts, such as
            `"fc/*"`: what they fit in PyTorch is dropped, in Flax it keeps its value.
        check: `(x, y)`, an input of the Flax model, channels last, and what PyTorch's gives for it;
            `(x, y, kwargs)` if the Flax model takes keywords. Outputs are compared, in evaluation.
            With `bnjax.torch_outputs(torch_model, x_of_torch)` as y, the error says at which layer
            they part. Several inputs are a tuple.

    Returns:
        A new tree like `variables`, with its dtypes, but statistics in float32 at least. An
        `nnx.State` goes into a model by `nnx.update(model, state)`. No memory is shared.

    Raises:
        ValueError: names or shapes that do not fit, a running variance that is negative or not
            finite, or outputs that differ by more than 1e-4 of the largest one. Nothing is
            converted then.
        TypeError: a state dict that holds something else than dense arrays.

    Warns:
        UserWarning: a layer may come after a flatten.

    >>> weight = np.array([[1.0, 2.0]], np.float32)  # (out, in)
    >>> variables = {"params": {"fc": {"kernel": np.zeros((2, 1), np.float32)}}}
    >>> from_torch({"fc.weight": weight}, None, variables)["params"]["fc"]["kernel"].tolist()
    [[1.0], [2.0]]
    """
    made = tree(model, variables)
    arrays = banked.joined(state_arrays(state_dict, "state_dict"))
    planned = plan(arrays, made.leaves, Options(rename, flatten, transposed, ignore), model)
    arrays = planned.split(arrays)
    planned.check(arrays)
    suspects = _suspects(planned, flatten)
    new = made.replaced(
        {
            name: _converted(arrays[key], name, placed, made.leaves[name])
            for key, (name, placed) in planned.pairs.items()
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
    """A PyTorch state dict with the values of Flax variables, for `load_state_dict(strict=True)`.

    It is `from_torch` backwards, with the same options, and undoes it bit for bit. An array that
    `like` holds under several names is written under all of them. Of two biases that Flax has
    added, the sum is written, and 0, unless those of `like` have this sum.

    Guide: examples/guides/from_torch.md

    Args:
        variables: linen variables, an nnx model or its state.
        like: the state dict of the PyTorch model, for its names, their order and their shapes.
            Without it a path becomes a name, where a number at an end is a module of its own:
            `layer1_0/bn1` is `layer1.0.bn1`, and gates and heads stay apart.
        rename: as for `from_torch`, from names of PyTorch to those of Flax; only with `like`.
        flatten: as for `from_torch`.
        transposed: as for `from_torch`; an nnx model, not a state, is asked by default.
        ignore: as for `from_torch`: what it fits in PyTorch keeps its value in `like`, in Flax it
            is dropped.
        numpy: NumPy arrays, without torch.

    Returns:
        Names with new tensors, in the dtypes of the variables. `num_batches_tracked` of a batch
        norm without `count` is that of `like`, or else 0: Flax does not count, and PyTorch needs
        the number for momentum=None alone, where there is a `count`.

    Raises:
        ValueError: names or shapes that do not fit, or a running variance that is negative or not
            finite. Nothing is converted then.
        TypeError: `like` holds something else than dense arrays.

    >>> variables = {"batch_stats": {"bn_1": {"mean": np.zeros(2), "var": np.ones(2)}}}
    >>> list(to_torch(variables, numpy=True))
    ['bn.1.running_mean', 'bn.1.running_var', 'bn.1.num_batches_tracked']
    """
    model, state = (variables, None) if isinstance(variables, nnx.Module) else (None, variables)
    leaves = tree(model, state).leaves
    if any(name.leaf.startswith("bank_") for name in leaves):
        leaves = tree(None, with_own_affine(nnx.state(model) if state is None else state)).leaves
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
                f"`like` holds {few([*stale.values()])} as {few([*stale])} too, and what is "
                "ignored keeps its old values. If each is one array in PyTorch, `rename` both to "
                "one name instead: they are written alike.",
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
    """Layers that may come after a flatten, with a warning, unless the user says of none."""
    if planned.rules is None or flatten == {}:
        return []
    found = flattened.suspects(planned.pairs, planned.rules, bool(flatten))
    for text in flattened.warnings(found):
        warnings.warn(text, UserWarning, stacklevel=3)
    return found


def _converted(array: np.ndarray, name: Name, placed: Layout, leaf: Leaf) -> np.ndarray:
    """An array as the model has it, but float32 at least for a running mean or variance."""
    dtype = leaf.value.dtype
    if name.statistic and jnp.issubdtype(dtype, jnp.inexact):
        dtype = working_dtype(dtype)
    array = counted(array) if is_count(name) else array
    return placed.to_flax(array).astype(dtype, copy=False)
