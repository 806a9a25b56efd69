"""Masks and labels of parameters for optax: weight decay, and frozen parts."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
from jax.tree_util import GetAttrKey, keystr, tree_flatten_with_path, tree_map_with_path

from bnjax import globs
from bnjax._names import front

__all__ = ["decay_mask", "trainable_labels"]

if not TYPE_CHECKING:  # else every name would seem to exist
    __getattr__, __dir__ = front(__name__, __all__)

_WITHOUT_DECAY = (("scale",), ("bias",), ("bank_scale",), ("bank_bias",))


def decay_mask(params: Any) -> Any:
    """A mask for weight decay: True except for biases and the scales of normalization layers.

    Decaying a batch norm's scale and bias shrinks the output of the layer, while decaying the
    weights before it only changes their effective learning rate. Parameters are recognized by
    Flax's names, `scale` and `bias`. (The common test `ndim > 1` is wrong for a scale that
    `nn.scan` has stacked.)

    Guide: examples/guides/training.md

    Args:
        params: a tree of parameters, as in `variables["params"]`, or an `nnx.State` of them.

    Returns:
        A tree of bools of the same structure, for the `mask` of `optax.adamw` and others. To have
        it computed from the parameters, pass the function itself:
        `optax.adamw(1e-3, mask=bnjax.decay_mask)`.

    >>> decay_mask({"conv": {"kernel": 1, "bias": 2}, "bn": {"scale": 3, "bias": 4}})
    {'bn': {'bias': False, 'scale': False}, 'conv': {'bias': False, 'kernel': True}}
    """
    return tree_map_with_path(lambda path, _: _names(path)[-1:] not in _WITHOUT_DECAY, params)


def trainable_labels(params: Any, frozen: globs.Paths) -> Any:
    """Label parameters "frozen" or "trainable", by the same patterns that `bnjax.freeze` takes.

    Together they freeze statistics, mode and parameters with one list of patterns:
    `optax.multi_transform({"trainable": tx, "frozen": optax.set_to_zero()}, labels)`.

    Guide: examples/guides/freezing.md

    Args:
        params: a tree of parameters, as in `variables["params"]`, or an `nnx.State` of them.
        frozen: a glob over module paths or several, such as `"encoder/**"`.

    Returns:
        A tree of strings of the same structure.

    Raises:
        ValueError: a pattern matches no module that has parameters.

    >>> trainable_labels({"a": {"bn": {"scale": 1}}, "b": {"kernel": 2}}, frozen="a/**")
    {'a': {'bn': {'scale': 'frozen'}}, 'b': {'kernel': 'trainable'}}
    """
    modules = modules_of(params)
    globs.check_each(frozen, modules, "module with parameters")
    return labels(params, frozen)


def labels(params: Any, frozen: globs.Paths) -> Any:
    """The labels of `trainable_labels`, without a check that each pattern matches."""
    fits = globs.any_of(frozen)
    label = lambda path, _: "frozen" if fits(_module(path)) else "trainable"  # noqa: E731
    return tree_map_with_path(label, params)


def held(params: Any, labels: Any, hold: Callable[..., Any], *others: Any) -> Any:
    """The parameters with `hold` applied to those that are labelled "frozen".

    `labels` has the structure of the parameters. A label of None leaves a parameter unchanged; if
    `labels` itself is None, so are all.
    """
    if labels is None:
        return params

    def one(label: str | None, *leaves: Any) -> Any:
        return hold(*leaves) if label == "frozen" else leaves[0]

    return jax.tree.map(one, labels, params, *others, is_leaf=lambda label: label is None)


def modules_of(params: Any) -> set[str]:
    """The paths of the modules that have parameters."""
    return {_module(path) for path, _ in tree_flatten_with_path(params)[0]}


def _module(path: Any) -> str:
    return "/".join(_names(path)[:-1])


def _names(path: Any) -> tuple[str, ...]:
    """The names along the path to a parameter, in linen variables or an `nnx.State`."""
    if path and path[-1] == GetAttrKey("value"):  # the array inside an nnx variable
        path = path[:-1]
    return tuple(keystr((entry,), simple=True) for entry in path)
