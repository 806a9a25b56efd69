"""Pictures of a training run and of a diagnosis. Needs matplotlib, from the extra `tools`."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

_NAMED = 6  # so many names can be read below a picture of any number of layers


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


def plot_layers(
    rows: Sequence[Mapping[str, Any]],
    path: str | Path,
    title: str,
    modes: Sequence[tuple[str, float, float]] = (),
) -> None:
    """Draw how far each layer's running statistics are from those of the batches.

    Args:
        rows: for each layer `name`; `mean`, the 10%, 50% and 90% quantiles over the channels of
            running minus batch mean in standard deviations; `var`, those of running by batch
            variance; `mean_spread` and `var_spread`, the standard deviations of mean and of the
            logarithm of the variance between batches; `distance`, which ranks the layers; and
            `found`, whether something is wrong with it.
        path: where the picture goes; its suffix chooses the format.
        title: what was found.
        modes: name, value in training and value in evaluation of loss and metrics.
    """
    from matplotlib.figure import Figure

    width, narrow = min(max(7.0, 0.24 * len(rows) + 2), 16.0), 2.4 if modes else 0.0
    figure = Figure(figsize=(width + narrow, 6.4), dpi=120, layout="constrained")
    ratios = [width, narrow] if modes else [width]
    wide, *right = figure.subfigures(1, len(ratios), width_ratios=ratios, squeeze=False)[0]
    figure.suptitle(textwrap.fill(title, int(9 * (width + narrow))))
    means, variances = wide.subplots(2, 1, sharex=True)
    _draw_layers(means, rows, "mean")
    _draw_layers(variances, rows, "var")
    means.set_ylabel("running - batch mean\n(standard deviations)")
    variances.set_ylabel("running / batch variance")
    _ratio_axis(variances)
    limit = max(0.3, *np.abs(means.get_ylim()))
    means.set_ylim(-limit, 1.3 * limit)  # with room for the legend
    means.legend(loc="upper right", ncols=2, frameon=False, fontsize="small")
    farthest = sorted(range(len(rows)), key=lambda i: -rows[i]["distance"])
    shown = farthest if len(rows) <= 2 * _NAMED else _apart(farthest, len(rows) // 20)
    names = [rows[i]["name"] or "top" for i in shown]
    variances.set_xticks(shown, names, rotation=40, ha="right", rotation_mode="anchor")
    variances.set_xticks(range(len(rows)), minor=True)
    variances.set_xlim(-0.7, len(rows) - 0.3)
    for tick, i in zip(variances.get_xticklabels(), shown, strict=True):
        tick.set_color(_color(rows[i]["found"]))
    rest = "" if len(shown) == len(rows) else "; the farthest are named"
    variances.set_xlabel(f"{len(rows)} layers, input at the left, output at the right{rest}")
    wrong = any(row["found"] for row in rows)
    for side in right:
        panels = side.subplots(len(modes), 1, squeeze=False)[:, 0]
        for panel, (name, *values) in zip(panels, modes, strict=True):
            colors = ["0.6", _color(wrong)]
            heights = [value if np.isfinite(value) else 0 for value in values]
            bars = panel.bar(["training", "evaluation"], heights, color=colors)
            panel.bar_label(bars, [f"{value:.3g}".replace("nan", "NaN") for value in values])
            panel.margins(y=0.12 * (1 + len(modes)))  # room for the numbers
            panel.set(yticks=[])
            panel.set_title(textwrap.fill(f"{name}, by mode", 28), fontsize="medium")
    figure.savefig(path)


def _draw_layers(axis: Any, rows: Sequence[Mapping[str, Any]], name: str) -> None:
    """What runs against what batches scatter by: a bar and a line with a dot for each layer."""
    at, colors = range(len(rows)), [_color(row["found"]) for row in rows]
    low, middle, high = np.array([row[name] for row in rows]).reshape(-1, 3).T
    spread = np.array([row[f"{name}_spread"] for row in rows])
    below, above = (-spread, spread) if name == "mean" else (np.exp(-spread), np.exp(spread))
    axis.bar(at, above - below, 0.8, below, color="0.85", label="one batch to the next (1 std)")
    axis.vlines(at, low, high, colors, linewidth=3)
    axis.scatter(at, middle, 24, colors, zorder=3)
    axis.plot([], [], "o-", color="0.3", linewidth=3, label="running, 80% of the channels")
    axis.axhline(0 if name == "mean" else 1, color="0.5", linewidth=1, zorder=0)


def _apart(order: Sequence[int], gap: int) -> list[int]:
    """The first few, but none whose name would be written over another."""
    shown: list[int] = []
    for index in order:
        if len(shown) < _NAMED and all(abs(index - other) > gap for other in shown):
            shown.append(index)
    return shown


def _color(found: bool) -> str:
    return "C3" if found else "C0"


def _ratio_axis(axis: Any) -> None:
    """A logarithmic axis about 1, with plain numbers, never closer than a factor of two."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis.set_yscale("log", base=2)
    limit = max(2.0, *(abs(np.log2(np.maximum(axis.get_ylim(), 1e-12)))))
    limit = np.log2(2.2) if limit <= 2.0 and max(abs(np.log2(axis.get_ylim()))) < 1.1 else limit
    axis.set_ylim(2.0**-limit, 2.0**limit)
    axis.yaxis.set_major_locator(LogLocator(base=2, numticks=7))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _figure(rows: int, columns: int) -> tuple[Any, np.ndarray]:
    # The object interface, without pyplot: no global state, and no window wanted.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * columns, 3 * rows), dpi=120, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)
