"""Plot training runs and diagnoses. Needs matplotlib, from the extra `tools`."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

_FITS, _FAR, _AFTER = "C0", "C3", "C1"  # colours of layers and lines
_BATCH, _RUNNING = "batch statistic", "running statistic"
_NAMED = 6  # the most names that stay legible below a figure


def plot_curves(history: Sequence[Mapping[str, float]], path: str | Path) -> None:
    """Plot the metrics of a training run over epochs, with one panel for each quantity.

    Args:
        history: one mapping for each epoch, with keys such as `train_loss` and `validation_loss`:
            the last word names the panel, the rest the line.
        path: where to save the figure; the suffix sets the format.
    """
    panels = sorted({name.rpartition("_")[2] for name in history[0]}, reverse=True)
    figure, axes = _figure(1, len(panels))
    for axis, panel in zip(axes.flat, panels, strict=True):
        for name in history[0]:
            line, _, quantity = name.rpartition("_")
            if quantity == panel:
                values = [epoch[name] for epoch in history]
                axis.plot(range(1, len(values) + 1), values, label=line)
        axis.set(xlabel="epoch", ylabel=panel)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    if "loss" in panels:
        axes.flat[panels.index("loss")].set_yscale("log")
    figure.savefig(path)


def plot_statistics(
    record: Mapping[str, Mapping[str, Sequence[Any]]],
    path: str | Path,
    channel: int = 0,
    steps: Sequence[int] | None = None,
) -> None:
    """Plot running and batch statistics over training steps, for one channel of each layer.

    Args:
        record: for each layer, the sequences `mean`, `var`, `batch_mean` and `batch_var`, with an
            array (C,) for each step.
        path: where to save the figure; the suffix sets the format.
        channel: which channel to plot.
        steps: the step numbers; 1, 2 and so on by default.
    """
    figure, axes = _figure(len(record), 2)
    for row, (layer, values) in zip(axes, record.items(), strict=True):
        for axis, name, title in zip(row, ("mean", "var"), ("mean", "variance"), strict=True):
            batch = np.asarray(values[f"batch_{name}"])[:, channel]
            running = np.asarray(values[name])[:, channel]
            at = np.arange(1, len(batch) + 1) if steps is None else steps
            axis.plot(at, batch, ".", color="0.7", markersize=4, label=f"{_BATCH} of each step")
            axis.plot(at, running, color=_FAR, linewidth=2, label=_RUNNING)
            axis.set(title=layer, xlabel="training step", ylabel=f"{title} of channel {channel}")
            # Clip a few outliers among the batches, but show all of the running line.
            low, high = np.nanquantile(np.concatenate([batch, batch, running]), [0.005, 0.995])
            low, high = np.nanmin([low, *running]), np.nanmax([high, *running])
            axis.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2, frameon=False)
    figure.savefig(path)


def plot_layers(
    rows: Sequence[Mapping[str, Any]],
    path: str | Path,
    title: str,
    modes: Sequence[tuple[str, float, float]] = (),
    subtitle: str = "",
) -> None:
    """Plot how far each layer's running statistics are from the batch statistics.

    Args:
        rows: for each layer, its `name`; `mean`, the 10%, 50% and 90% quantiles over the channels
            of running minus batch mean, in standard deviations; `var`, the same quantiles of
            running over batch variance; `mean_spread` and `var_spread`, the standard deviations
            between batches of the mean and of the logarithm of the variance; `distance`, which
            ranks the layers; `found`, whether the layer has a fault, and `starts`, whether the
            fault starts there.
        path: where to save the figure; the suffix sets the format.
        title: the findings.
        modes: for the loss and each metric, its name and its values in training and evaluation.
        subtitle: the effect on the outputs.
    """
    from matplotlib.figure import Figure

    width, narrow = min(max(6.0, 0.17 * len(rows) + 1), 10.0), 2.2 if modes else 0.0
    figure = Figure(figsize=(width + narrow, 6.6), dpi=120, layout="constrained")
    ratios = [width, narrow] if modes else [width]
    wide, *right = figure.subfigures(1, len(ratios), width_ratios=ratios, squeeze=False)[0]
    lines = [textwrap.fill(title, int(11 * (width + narrow))), subtitle]
    figure.suptitle("\n".join(filter(None, lines)), fontsize="large")
    means, variances = wide.subplots(2, 1, sharex=True)
    _draw_layers(means, rows, "mean")
    _draw_layers(variances, rows, "var")
    means.set_ylabel("running mean - batch mean\n(standard deviations)")
    variances.set_ylabel("running variance /\nbatch variance")
    _ratio_axis(variances)
    limit = max(0.3, *np.abs(means.get_ylim()))
    means.set_ylim(-limit, limit)
    _name_layers(variances, rows)
    handles = _layer_legend(rows)
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    for side in right:
        _draw_modes(side, modes)
    figure.savefig(path)


def _name_layers(axis: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    """Label all layers; if there are many, only where a fault starts and the farthest off."""
    farthest = sorted(range(len(rows)), key=lambda i: (not _starts(rows[i]), -rows[i]["distance"]))
    shown = farthest if len(rows) <= 2 * _NAMED else _apart(farthest, len(rows) // 12)
    names = [rows[i]["name"] or "top" for i in shown]
    axis.set_xticks(shown, names, rotation=40, ha="right", rotation_mode="anchor")
    axis.set_xticks(range(len(rows)), minor=True)
    axis.set_xlim(-0.7, len(rows) - 0.3)
    for tick, i in zip(axis.get_xticklabels(), shown, strict=True):
        tick.set_color(_FAR if _starts(rows[i]) else "0.2")
    rest = "" if len(shown) == len(rows) else " (some are labelled)"
    axis.set_xlabel(f"{len(rows)} batch norms{rest}, from the input to the output")


def _draw_modes(side: Any, modes: Sequence[tuple[str, float, float]]) -> None:
    """Draw loss and metrics, with a bar for each mode."""
    panels = side.subplots(len(modes), 1, squeeze=False)[:, 0]
    for panel, (name, *values) in zip(panels, modes, strict=True):
        heights = [value if np.isfinite(value) else 0 for value in values]
        bars = panel.bar(["training", "evaluation"], heights, color=["0.75", "0.4"])
        panel.bar_label(bars, [f"{value:.3g}".replace("nan", "NaN") for value in values])
        panel.margins(y=0.12 * (1 + len(modes)))  # room for the numbers
        panel.set(yticks=[])
        panel.spines[["top", "right", "left"]].set_visible(False)
        panel.set_title(textwrap.fill(name, 24), fontsize="medium")


def _draw_layers(axis: Any, rows: Sequence[Mapping[str, Any]], name: str) -> None:
    """Draw each layer's running statistics as a line with a dot, over the spread of batches."""
    at, colors = range(len(rows)), [_color(row) for row in rows]
    low, middle, high = np.array([row[name] for row in rows]).reshape(-1, 3).T
    spread = np.array([row[f"{name}_spread"] for row in rows])
    below, above = (-spread, spread) if name == "mean" else (np.exp(-spread), np.exp(spread))
    axis.bar(at, above - below, 0.8, below, color="0.87")
    axis.axhline(0 if name == "mean" else 1, color="0.5", linewidth=1, zorder=0)
    axis.vlines(at, low, high, colors, linewidth=3)
    axis.scatter(at, middle, 24, colors, zorder=3)
    axis.spines[["top", "right"]].set_visible(False)


def _layer_legend(rows: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Legend entries for the dots, lines, bars and colours that occur."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    there = {_color(row) for row in rows}
    words = {_FITS: "fits the data", _FAR: "off: starts here, or is worst", _AFTER: "off as well"}
    dot = {"marker": "o", "linewidth": 3, "markersize": 5}
    lines = [Line2D([], [], color=c, label=text, **dot) for c, text in words.items() if c in there]
    channels = Line2D([], [], color="0.4", label="median, and 80% of the channels", **dot)
    return [*lines, channels, Patch(color="0.87", label="from batch to batch (1 std)")]


def _apart(order: Sequence[int], gap: int) -> list[int]:
    """The first few indices, without those whose labels would overlap others."""
    shown: list[int] = []
    for index in order:
        if len(shown) < _NAMED and all(abs(index - other) > gap for other in shown):
            shown.append(index)
    return shown


def _starts(row: Mapping[str, Any]) -> bool:
    return bool(row["found"] and row.get("starts", True))


def _color(row: Mapping[str, Any]) -> str:
    if not row["found"]:
        return _FITS
    return _FAR if _starts(row) else _AFTER


def _ratio_axis(axis: Any) -> None:
    """Make an axis logarithmic and symmetric around 1, over at least a factor of two."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis.set_yscale("log", base=2)
    limit = max(2.0, *(abs(np.log2(np.maximum(axis.get_ylim(), 1e-12)))))
    limit = np.log2(2.2) if limit <= 2.0 and max(abs(np.log2(axis.get_ylim()))) < 1.1 else limit
    axis.set_ylim(2.0**-limit, 2.0**limit)
    axis.yaxis.set_major_locator(LogLocator(base=2, numticks=7))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _figure(rows: int, columns: int) -> tuple[Any, np.ndarray]:
    # Without pyplot: no global state, and no window.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5 * columns, 2.7 * rows + 0.3), dpi=120, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)
