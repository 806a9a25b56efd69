"""Summarize running statistics as scalars for a logger, such as TensorBoard or W&B."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import nnx
from flax.core import meta

from bnjax import globs
from bnjax.models.statistics import layers_of
from bnjax.training import checks
from bnjax.training.history import held

Arrays = Mapping[str, np.ndarray]


def scalars(
    trained: Any,
    other: Any = None,
    *,
    paths: globs.Paths = "**",
    prefix: str = "bn",
    eps: float = 1e-5,
) -> dict[str, float]:
    """Summarize each batch norm in a few numbers, as a flat dict that any logger takes.

    Guide: examples/guides/logging.md

    The names are `{prefix}/{path}/{number}`. For a state or variables, the numbers are

    - `scale_min`: the smallest magnitude of the learned scale;
    - `dead`: the number of channels with constant output, because scale or running variance is 0;
    - `updates`: the number of batches counted, if the layer counts them.

    Compared with other statistics, they are

    - `mean_gap`: the difference of the means, in running standard deviations, sqrt(var + eps); the
      root mean square over the channels;
    - `var_ratio`: the running variance divided by the other, with eps added to both; the geometric
      mean over the channels.

    They are NaN for a layer with NaN.

    Args:
        trained: a `TrainState`, linen variables, an nnx model or its state; or a record of
            `bnjax.training.history`, whose last running statistics are compared with those of the
            last batch.
        other: statistics to compare with, as for `trained`, such as the state of an earlier step
            or recalibrated variables. A record needs none.
        paths: which layers, as globs over module paths.
        prefix: the prefix of all names.
        eps: the eps of the layers.

    Returns:
        Python floats by name.

    Raises:
        TypeError: `other` is passed with a record.
        ValueError: there are no running statistics, a pattern matches no batch norm, or a layer has
            different channels in `other`.

    >>> stats = {"mean": np.zeros(2), "var": np.ones(2)}
    >>> moved = {"mean": np.array([3.0, 4.0]), "var": np.array([4.0, 4.0])}
    >>> now, later = ({"params": {}, "batch_stats": {"bn": each}} for each in (stats, moved))
    >>> {name: round(value, 2) for name, value in scalars(now, later).items()}
    {'bn/bn/dead': 0.0, 'bn/bn/mean_gap': 3.54, 'bn/bn/var_ratio': 0.25}
    """
    if _is_record(trained):
        checks.record_alone(other)
        layers, others, alone = *_of_record(trained), False
    else:
        layers, others, alone = _layers(trained), {} if other is None else _layers(other), True
    checks.some_statistics(layers)
    globs.check_each(paths, layers)
    fits = globs.any_of(paths)
    found = {}
    for path in filter(fits, layers):
        numbers = _alone(layers[path]) if alone else {}
        if path in others:
            checks.same_channels(path, layers[path]["mean"].shape, others[path]["mean"].shape)
            numbers |= _compared(layers[path], others[path], eps)
        name = "/".join(filter(None, (prefix, path)))
        found |= {f"{name}/{key}": float(value) for key, value in numbers.items()}
    return found


def _is_record(value: Any) -> bool:
    return isinstance(value, Mapping) and {"step", "layers"} <= {*value}


def _of_record(record: Mapping[str, Any]) -> tuple[dict[str, Arrays], dict[str, Arrays]]:
    """The last running statistics, and those of the last batch."""
    running, batch = {}, {}
    for path, lines in record["layers"].items():
        running[path] = {name: np.asarray(lines[name][-1]) for name in ("mean", "var")}
        if "batch_mean" in lines:
            batch[path] = {n: np.asarray(lines[f"batch_{n}"][-1]) for n in ("mean", "var")}
    return running, batch


def _layers(trained: Any) -> dict[str, Arrays]:
    """The arrays of each batch norm by path: its statistics, and its scale if it has one."""
    if isinstance(trained, nnx.Module | nnx.State):
        tree: Any = held((trained, None))
    elif isinstance(trained, Mapping):
        tree = trained
    else:
        tree = {name: getattr(trained, name, {}) for name in ("params", "batch_stats")}
    params = tree.get("params", {})
    params = getattr(params, "slow", params)  # with lookahead
    found = {}
    for path, stats in layers_of(tree.get("batch_stats", {})).items():
        arrays = {name: _array(stats[name]) for name in ("mean", "var", "count") if name in stats}
        node = params
        for name in path:
            node = node.get(name, {}) if isinstance(node, Mapping) else {}
        if isinstance(node, Mapping) and "scale" in node:
            arrays["scale"] = _scale(node, np.shape(meta.unbox(stats["mean"])))
        found["/".join(path)] = arrays
    return found


def _scale(params: Mapping[str, Any], shape: tuple[int, ...]) -> np.ndarray:
    """The scales of a layer, one for each of its statistics, even if banks share them."""
    scale = np.asarray(meta.unbox(params["scale"]))
    if scale.ndim < len(shape):
        scale = np.expand_dims(scale, 0 if scale.shape == shape[1:] else -2)
    scale = scale + np.asarray(meta.unbox(params.get("bank_scale", 0)))
    return _array(np.broadcast_to(scale, shape))


def _array(value: Any) -> np.ndarray:
    array = np.ravel(np.asarray(meta.unbox(value)))
    return array if np.iscomplexobj(array) else array.astype(np.float64)


def _alone(arrays: Arrays) -> dict[str, Any]:
    """The numbers of a layer without a comparison."""
    scale = arrays.get("scale", np.ones(1))
    found = {"scale_min": np.abs(scale).min(initial=np.inf)} if "scale" in arrays else {}
    found["dead"] = np.sum(scale * arrays["var"] == 0)
    return found | ({"updates": arrays["count"].max()} if "count" in arrays else {})


def _compared(arrays: Arrays, other: Arrays, eps: float) -> dict[str, Any]:
    """The numbers of a layer compared with other statistics; NaN without channels."""
    if not arrays["mean"].size:
        return {"mean_gap": np.nan, "var_ratio": np.nan}
    with np.errstate(invalid="ignore", divide="ignore"):
        gap = np.abs(other["mean"] - arrays["mean"]) / np.sqrt(arrays["var"] + eps)
        ratio = np.log((arrays["var"] + eps) / (other["var"] + eps))
    return {"mean_gap": np.sqrt(np.mean(gap**2)), "var_ratio": np.exp(np.mean(ratio))}
