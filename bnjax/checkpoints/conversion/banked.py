"""Banks, which timm's `SplitBatchNorm2d` keeps as separate batch norms.

The first bank has `bn.weight`, the second `bn.aux_bn.0.weight`.
"""

import re
from collections.abc import Iterable, Mapping

import numpy as np

_AUX = re.compile(r"(?P<path>.+\.)?aux_bn\.(?P<number>\d+)\.(?P<leaf>\w+)")
_LEAVES = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def joined(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Stack the arrays of all banks into one, with a row for each."""
    rows = _rows(arrays)
    new = {name: array for name, array in arrays.items() if not _AUX.fullmatch(name)}
    for name, others in rows.items():
        new[name] = np.stack([arrays[name], *(arrays[other] for other in others)])
    return new


def parted(arrays: Mapping[str, np.ndarray], like: Iterable[str] | None) -> dict[str, np.ndarray]:
    """Split arrays of several banks into one batch norm per bank; arrays they share go into each.

    With `like`, exactly the batch norms named there.
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
    """For each name in a first bank, the names in the others, in order."""
    found: dict[str, dict[int, str]] = {}
    known = set(names)
    for name in known:
        if match := _AUX.fullmatch(name):
            first = (match["path"] or "") + match["leaf"]
            if first in known:
                found.setdefault(first, {})[int(match["number"])] = name
    return {first: [others[n] for n in sorted(others)] for first, others in found.items()}
