"""Which parameters an optimizer treats differently, as trees for optax."""

from collections.abc import Callable
from typing import Any

import jax
from jax.tree_util import GetAttrKey, keystr, tree_flatten_with_path, tree_map_with_path

from bnjax import globs

__all__ = ["decay_mask", "trainable_labels"]

_WITHOUT_DECAY = (("scale",), ("bias",))


def decay_mask(params: Any) -> Any:
    """True where weight decay belongs: not on normalization scales and biases, nor other biases.

    Decay of a batch norm's scale and bias shrinks the output of the layer, where decay of the
    weights before it changes nothing but their effective learning rate. It goes by name, as Flax
    names them: `scale` and `bias`. (The habit of `ndim > 1` is right by accident, and wrong for a
    scale that is stacked by `nn.scan`.)

    Guide: examples/guides/training.md

    Args:
        params: a tree of parameters, as in `variables["params"]`, or an `nnx.State` of them.

    Returns:
        A tree of the same structure with bools, for the `mask` of `optax.adamw` and others. Pass
        the function itself, as in `optax.adamw(1e-3, mask=bnjax.decay_mask)`, to have it applied to
        whatever is optimized.

    >>> decay_mask({"conv": {"kernel": 1, "bias": 2}, "bn": {"scale": 3, "bias": 4}})
    {'bn': {'bias': False, 'scale': False}, 'conv': {'bias': False, 'kernel': True}}
    """
    return tree_map_with_path(lambda path, _: _names(path)[-1:] not in _WITHOUT_DECAY, params)


def trainable_labels(params: Any, frozen: globs.Paths) -> Any:
    """Labels "frozen" and "trainable", by the same patterns that `bnjax.freeze` takes.

    With both, one list of patterns freezes statistics, mode and parameters:
    `optax.multi_transform({"trainable": tx, "frozen": optax.set_to_zero()}, labels)`.

    Guide: examples/guides/freezing.md

    Args:
        params: a tree of parameters, as in `variables["params"]`, or an `nnx.State` of them.
        frozen: a glob over module paths or several, such as `"encoder/**"`.

    Returns:
        A tree of the same structure with strings.

    Raises:
        ValueError: a pattern fits no module that has parameters.

    >>> trainable_labels({"a": {"bn": {"scale": 1}}, "b": {"kernel": 2}}, frozen="a/**")
    {'a': {'bn': {'scale': 'frozen'}}, 'b': {'kernel': 'trainable'}}
    """
    modules = modules_of(params)
    globs.check_each(frozen, modules, "module with parameters")
    return labels(params, frozen)


def labels(params: Any, frozen: globs.Paths) -> Any:
    """What `trainable_labels` returns, also where a pattern fits nothing."""
    fits = globs.any_of(frozen)
    label = lambda path, _: "frozen" if fits(_module(path)) else "trainable"  # noqa: E731
    return tree_map_with_path(label, params)


def held(params: Any, labels: Any, hold: Callable[..., Any], *others: Any) -> Any:
    """The parameters, those that are labelled as frozen replaced by what `hold` makes of them.

    `labels` are of the same tree, None for all parameters of a tree without any, or at a leaf.
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
    """The names on the way to a parameter, in linen variables or in an `nnx.State`."""
    if path and path[-1] == GetAttrKey("value"):  # the inside of an nnx variable
        path = path[:-1]
    return tuple(keystr((entry,), simple=True) for entry in path)
