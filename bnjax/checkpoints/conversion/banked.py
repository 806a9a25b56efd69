"""Banks, of which PyTorch makes batch norms of their own: timm's `SplitBatchNorm2d`.

There `bn.weight` is that of the first bank, and `bn.aux_bn.0.weight` that of the second.
"""

import re
from collections.abc import Iterable, Mapping

import numpy as np

_AUX = re.compile(r"(?P<path>.+\.)?aux_bn\.(?P<number>\d+)\.(?P<leaf>\w+)")
_LEAVES = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def joined(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A state dict in which the arrays of all banks are one, with a row for each."""
    rows = _rows(arrays)
    new = {name: array for name, array in arrays.items() if not _AUX.fullmatch(name)}
    for name, others in rows.items():
        new[name] = np.stack([arrays[name], *(arrays[other] for other in others)])
    return new


def parted(arrays: Mapping[str, np.ndarray], like: Iterable[str] | None) -> dict[str, np.ndarray]:
    """A state dict with batch norms for the banks: those of `like`, or all that have several rows.

    What banks share goes into each.
    """
    if like is not None:
        rows = _rows(like)
        new = dict(arrays)
        for name, others in rows.items():
            for number, other in enumerate((name, *others)):
                new[other] = arrays[name][number]
        return {name: new[name] for name in like}
    new = {}
    for name, array in arrays.items():
        path, _, leaf = name.rpartition(".")
        mean = arrays.get(f"{path}.running_mean" if path else "running_mean")
        if mean is None or mean.ndim < 2 or leaf not in _LEAVES:
            new[name] = array
            continue
        own = array.ndim == (1 if leaf == "num_batches_tracked" else mean.ndim)
        each = list(array) if own else [array] * len(mean)
        new[name] = each[0]
        for number, row in enumerate(each[1:]):
            new[".".join(filter(None, (path, f"aux_bn.{number}", leaf)))] = row
    return new


def _rows(names: Iterable[str]) -> dict[str, list[str]]:
    """For each name of a first bank those of the others, in their order."""
    found: dict[str, dict[int, str]] = {}
    known = set(names)
    for name in known:
        if match := _AUX.fullmatch(name):
            first = (match["path"] or "") + match["leaf"]
            if first in known:
                found.setdefault(first, {})[int(match["number"])] = name
    return {first: [others[n] for n in sorted(others)] for first, others in found.items()}
