"""Pictures of a training run. Needs matplotlib, from the extra `tools`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np


def plot_curves(history: Sequence[Mapping[str, float]], path: str | Path) -> None:
    """Draw what a training run recorded, one panel for each quantity, over the epochs.

    Args:
        history: one mapping for each epoch, with keys such as `train_loss` and `validation_loss`:
            the last word names the panel, the rest the line.
        path: where the picture goes; its suffix chooses the format.
    """
    panels = sorted({name.rpartition("_")[2] for name in history[0]}, reverse=True)
    figure, axes = _figure(1, len(panels))
    for axis, panel in zip(axes.flat, panels, strict=True):
        for name in history[0]:
            line, _, quantity = name.rpartition("_")
            if quantity == panel:
                values = [epoch[name] for epoch in history]
                axis.plot(range(1, len(values) + 1), values, label=line)
        axis.set(title=panel, xlabel="epoch")
        axis.legend()
    if "loss" in panels:
        axes.flat[panels.index("loss")].set_yscale("log")
    figure.savefig(path)


def plot_statistics(
    record: Mapping[str, Mapping[str, Sequence[Any]]], path: str | Path, channel: int = 0
) -> None:
    """Draw running against batch statistics over the steps, for one channel of each layer.

    Args:
        record: for each layer the sequences `mean`, `var`, `batch_mean` and `batch_var`, each of
            arrays (C,), one for each step.
        path: where the picture goes; its suffix chooses the format.
        channel: which channel to draw.
    """
    figure, axes = _figure(len(record), 2)
    for row, (layer, values) in zip(axes, record.items(), strict=True):
        for axis, name, title in zip(row, ("mean", "var"), ("mean", "variance"), strict=True):
            batch = np.asarray(values[f"batch_{name}"])[:, channel]
            axis.plot(batch, ".", color="0.7", markersize=3, label="this batch")
            axis.plot(np.asarray(values[name])[:, channel], color="C3", label="running")
            axis.set(title=f"{layer}, channel {channel}: {title}", xlabel="step")
            # A few wild batches at the start must not flatten the rest.
            low, high = np.nanquantile(batch, [0.005, 0.995])
            axis.set_ylim(low - 0.2 * (high - low), high + 0.2 * (high - low))
            axis.legend(loc="upper right")
    figure.savefig(path)


def _figure(rows: int, columns: int) -> tuple[Any, np.ndarray]:
    # The object interface, without pyplot: no global state, and no window wanted.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * columns, 3 * rows), dpi=120, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)
