"""PyTorch state dicts as Flax variables, and back: from_torch, to_torch."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from bnjax import globs
from bnjax.checkpoints.conversion.names import COUNTER, Name, Rename
from bnjax.checkpoints.conversion.plan import Options, exported, plan, state_arrays, without
from bnjax.checkpoints.conversion.trees import Leaf, tree
from bnjax.checkpoints.tensors import as_tensor
from bnjax.core.moments import working_dtype


def from_torch(
    state_dict: Mapping[str, Any],
    model: Any,
    variables: Any = None,
    *,
    rename: Rename | None = None,
    flatten: Mapping[str, Sequence[int]] | None = None,
    transposed: globs.Paths | None = None,
    ignore: globs.Paths = (),
) -> Any:
    """The variables of a Flax model with the values of a PyTorch state dict.

    Layers come in their own layouts: convs (out, in / groups, *kernel) become (*kernel,
    in / groups, out), 1d to 3d; linear weights are transposed; embeddings stay; `weight` of a
    normalization is `scale`; `running_mean` and `running_var` of a batch norm are `mean` and `var`;
    `num_batches_tracked` is `count` where the layer has one (momentum=None), and is passed over
    elsewhere. What has another name goes under that name, as it is.

    Names are matched by module path: `layer1.0.bn1` is `layer1/0/bn1` or `layer1_0/bn1`, and the
    `0` of a PyTorch `Sequential` is the `layers_0` of a Flax one. Nothing is guessed: all names
    without a counterpart on either side, or with several, and all arrays that do not fit theirs are
    listed in one error.

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
        flatten: for a linear layer after a flatten, by its path in Flax, the shape (C, H, W) that
            PyTorch flattens: Flax flattens (H, W, C). It has to be told, as no shape shows it.
        transposed: globs over the Flax paths of the transposed convolutions with flipped kernels,
            as above; by default, those of an nnx model, and none in a linen model, where it is an
            error if its code has a `ConvTranspose`.
        ignore: globs over names of either side, with "/" or "." between their parts, such as
            `"fc/*"`: what they fit in PyTorch is dropped, in Flax it keeps its value.

    Returns:
        A new tree like `variables`, with its dtypes, but statistics in float32 at least. An
        `nnx.State` goes into a model by `nnx.update(model, state)`. No memory is shared.

    Raises:
        ValueError: names or shapes that do not fit, or a running variance that is negative or not
            finite. Nothing is converted then.
        TypeError: a state dict that holds something else than dense arrays.

    >>> weight = np.array([[1.0, 2.0]], np.float32)  # (out, in)
    >>> variables = {"params": {"fc": {"kernel": np.zeros((2, 1), np.float32)}}}
    >>> from_torch({"fc.weight": weight}, None, variables)["params"]["fc"]["kernel"].tolist()
    [[1.0], [2.0]]
    """
    made = tree(model, variables)
    arrays = state_arrays(state_dict, "state_dict")
    planned = plan(arrays, made.leaves, Options(rename, flatten, transposed, ignore), model)
    planned.check(arrays)
    return made.replaced(
        {
            name: placed.to_flax(arrays[key]).astype(_dtype(name, made.leaves[name]), copy=False)
            for key, (name, placed) in planned.pairs.items()
        }
    )


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

    It is `from_torch` backwards, with the same options, and undoes it bit for bit.

    Guide: examples/guides/from_torch.md

    Args:
        variables: linen variables, an nnx model or its state.
        like: the state dict of the PyTorch model, for its names, their order and their shapes.
            Without it a path becomes a name, where a number at an end is a module of its own:
            `layer1_0/bn1` is `layer1.0.bn1`.
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
    options = Options(rename, flatten, transposed, ignore)
    if like is None:
        leaves, arrays = without(leaves, ignore), {}
        planned = exported(leaves, options, model)
    else:
        arrays = state_arrays(like, "like")
        planned = plan(arrays, leaves, options, model)
    for key, (name, placed) in planned.pairs.items():
        array = placed.to_torch(np.asarray(leaves[name].value))
        arrays[key] = array.astype(np.int64) if name.in_torch.endswith(COUNTER) else array
    planned.check(arrays)
    for name in leaves if like is None else ():
        if name.statistic and name.leaf == "mean":
            arrays.setdefault(name._replace(leaf="count").exported, np.zeros((), np.int64))
    convert = (lambda array: np.array(array, order="C")) if numpy else as_tensor
    return {key: convert(array) for key, array in arrays.items()}


def _dtype(name: Name, leaf: Leaf) -> Any:
    """The dtype of the model, but float32 at least for a running mean or variance."""
    dtype = leaf.value.dtype
    statistic = name.statistic and jnp.issubdtype(dtype, jnp.inexact)
    return working_dtype(dtype) if statistic else dtype
