"""One picture of a run: time of a layer beside its peers' and the floor, and memory it keeps."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from tests.benchmarks import op
from tests.benchmarks.cases import DTYPES, PASSES
from tests.benchmarks.contenders import OURS, REFERENCE

COLOURS = {
    OURS: "#c0392b",
    "flax.linen": "#1f4e79",
    "flax.nnx": "#5b8db8",
    "haiku": "#6a994e",
    "equinox": "#bc8a2c",
    "keras": "#8e6bbf",
    "torch": "#e07a1f",
    "floor": "#bbbbbb",
}
PANEL = 9.0, 2.3  # inches
LABELS = {
    **{f"time, {dtype}": f"time, {dtype}\n(flax.linen = 1)" for dtype in DTYPES},
    "memory": "kept for the backward\npass (input = 1)",
}
GROUPS = {
    "eval": "evaluation",
    "forward": "training: forward",
    "forward+backward": "training: forward and backward",
}
GROUP = 0.84  # of the space of a group that its bars take
TALLEST = 5.0  # taller bars are cut, and say so

Bars = Mapping[str, Mapping[str, float]]  # by group and contender


def summary(data: Mapping[str, Any]) -> dict[str, Any]:
    """What the picture shows of a run: the panels, of each its groups, and of these the bars."""
    panels = {}
    for dtype in DTYPES if "op" in data else ():
        panels[f"time, {dtype}"] = {which: _ratios(data["op"], dtype, which) for which in PASSES}
    if "memory" in data:
        kept = data["memory"]["layer"]
        panels["memory"] = {
            dtype: {
                row["contender"]: row["of x"]
                for row in kept
                if row["dtype"] == dtype and row["contender"] in COLOURS
            }
            for dtype in DTYPES
        }
    return {"quick": data["setting"]["quick"], "panels": panels}


def _ratios(data: dict[str, Any], dtype: str, which: str) -> dict[str, float]:
    """Geometric means over the 4-d cases, as ratios to the reference."""
    rows = list(filter(op.GROUPS["all 4-d"], op.chosen(data, dtype, which)))
    means = {name: op.geometric_mean(op.ratios(rows, name, REFERENCE)) for name in COLOURS}
    return {name: mean for name, mean in means.items() if mean is not None}


def draw(data: Mapping[str, Any], path: Path) -> None:
    """Draw what has been measured."""
    draw_summary(summary(data), path)


def draw_summary(shown: Mapping[str, Any], path: Path) -> None:
    """Draw what `summary` returned: a panel each, with one legend for all."""
    panels: Mapping[str, Bars] = shown["panels"]
    if not panels:
        raise ValueError("A picture needs the kinds op or memory of a run, got neither.")
    figure = Figure((PANEL[0], PANEL[1] * len(panels) + 0.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    every = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    there = {name for groups in panels.values() for bars in groups.values() for name in bars}
    names = [name for name in COLOURS if name in there]
    for axes, (title, groups) in zip(every, panels.items(), strict=True):
        _panel(axes, groups, names)
        axes.set_ylabel(LABELS[title])
    words = {"floor": "bare kernels (the floor)"}
    handles = [Patch(color=COLOURS[name], label=words.get(name, name)) for name in names]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(names), frameon=False)
    if shown["quick"]:
        figure.supxlabel("a quick run, on tiny inputs: these times say nothing", color="C3")
    figure.savefig(path)


def _panel(axes: Axes, groups: Bars, names: list[str]) -> None:
    """Groups of bars, one for each contender that there is, with their values."""
    names = [name for name in names if any(name in bars for bars in groups.values())]
    width = GROUP / len(names)
    for place, bars in enumerate(groups.values()):
        for number, name in enumerate(names):
            if name not in bars:
                continue
            x = place + (number + 0.5) * width - GROUP / 2
            height = min(bars[name], TALLEST)
            axes.bar(x, height, 0.9 * width, color=COLOURS[name])
            weight = "bold" if name == OURS else "normal"
            axes.text(
                x, height, f"{bars[name]:.2g}", ha="center", va="bottom", size=8, weight=weight
            )
    axes.axhline(1, color="0.4", linewidth=0.8, zorder=0)
    axes.set_xticks(range(len(groups)), [GROUPS.get(name, name) for name in groups])
    axes.set_xlim(-0.5, len(groups) - 0.5)
    axes.set_ylim(0, 1.12 * min(TALLEST, max(v for bars in groups.values() for v in bars.values())))
    axes.spines[["top", "right"]].set_visible(False)
