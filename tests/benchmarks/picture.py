"""One picture of a run: times beside Flax's and the floor, the growing batch, memory."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from tests.benchmarks import op
from tests.benchmarks.cases import DTYPES, PASSES, STEADY
from tests.benchmarks.contenders import OURS, REFERENCE

COLOURS = {
    OURS: "#c0392b",
    "flax.linen": "#1f4e79",
    "flax.nnx": "#5b8db8",
    "haiku": "#6a994e",
    "equinox": "#bc8a2c",
    "keras": "#8e6bbf",
    "torch": "#e07a1f",
    "floor": "#444444",
    "affine": "#999999",
}
PANEL = 5.2, 4.0  # inches


def draw(data: dict[str, Any], path: Path) -> None:
    """Draw what has been measured; each panel says what it shows."""
    panels: list[Callable[[Axes], None]] = []
    if "op" in data:
        panels += [lambda axes, d=dtype: _times(axes, data["op"], d) for dtype in DTYPES]
    if "network" in data:
        growth, steps = data["network"]["growth"], data["network"]["blocks"]
        panels += [lambda axes: _growth(axes, growth), lambda axes: _steps(axes, steps)]
    if "memory" in data:
        panels += [lambda axes: _kept(axes, data["memory"]), lambda axes: _temp(axes, data)]
    if not panels:
        raise ValueError("A picture needs at least one of op, network and memory.")
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure((PANEL[0] * columns, PANEL[1] * lines), layout="constrained")
    FigureCanvasAgg(figure)
    for number, panel in enumerate(panels):
        axes = figure.add_subplot(lines, columns, number + 1)
        axes.spines[["top", "right"]].set_visible(False)
        panel(axes)
    figure.savefig(path, dpi=130)


def _times(axes: Axes, data: dict[str, Any], dtype: str) -> None:
    """Geometric means over the 4-d cases, one column for each pass."""
    for name, colour in COLOURS.items():
        points = []
        for which in PASSES:
            rows = list(filter(op.GROUPS["all 4-d"], op.chosen(data, dtype, which)))
            mean = op.geometric_mean(op.ratios(rows, name, REFERENCE))
            points.append(float("nan") if mean is None else mean)
        if all(map(math.isnan, points)):
            continue
        floor = name == op.FLOOR
        (line,) = axes.plot(PASSES, points, "--" if floor else "o-", color=colour, label=name)
        line.set_linewidth(2.5 if name == OURS else 1.2)
    axes.set_yscale("log")
    axes.set_ylim(0.2, 5)
    axes.set_yticks((0.25, 0.5, 1, 2, 4), ("0.25", "0.5", "1", "2", "4"))
    axes.minorticks_off()
    axes.set_xlim(-0.2, len(PASSES) - 0.8)
    axes.set_title(f"time, {dtype}, as a ratio to flax.linen's (4-d cases)", fontsize=10)
    _legend_below(axes, 4)


def _growth(axes: Axes, data: dict[str, Any]) -> None:
    for dtype, style in zip(DTYPES, ("-", ":"), strict=True):
        rows = [row for row in data["rows"] if row["dtype"] == dtype]
        for name in rows[0]["nanoseconds"]:
            axes.plot(
                [row["batch"] for row in rows],
                [row["nanoseconds"][name] for row in rows],
                style,
                color=COLOURS[name],
                marker=".",
                label=f"{name}, {dtype}",
            )
    axes.set_xscale("log", base=2)
    batches = sorted({row["batch"] for row in data["rows"]})
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.set_ylim(bottom=0)
    axes.set_xlabel(f"images of {'x'.join(map(str, data['image']))} in the batch")
    axes.set_title("forward+backward: nanoseconds per value", fontsize=10)
    _legend_below(axes, 2)


def _steps(axes: Axes, data: dict[str, Any]) -> None:
    rows = [row for row in data["rows"] if row["norms"] and row["state"] == STEADY]
    values = {(row["contender"], row["dtype"]): row["norms"] for row in rows}
    _bars(axes, values, "{:z.0f}")
    title = f"{data['depth']} conv+BN+relu: a training step less one without BN, ms"
    axes.set_title(title, fontsize=10)


def _kept(axes: Axes, data: dict[str, Any]) -> None:
    values = {(row["contender"], row["dtype"]): row["of x"] for row in data["layer"]}
    _bars(axes, values, "{:.1f}")
    axes.set_title("kept by one layer between the passes, times x", fontsize=10)


def _temp(axes: Axes, data: dict[str, Any]) -> None:
    memory = data["memory"]
    values = {(row["contender"], row["dtype"]): row["bytes"] / 1e6 for row in memory["gradient"]}
    _bars(axes, values, "{:z.0f}")
    title = f"temporary MB of the gradient of {memory['depth']} conv+BN+relu"
    axes.set_title(title, fontsize=10)


def _bars(axes: Axes, values: dict[tuple[str, str], float], form: str) -> None:
    """A bar for each contender and dtype: solid for float32, pale for bfloat16."""
    names = list(dict.fromkeys(name for name, _ in values))
    for offset, (dtype, alpha) in enumerate(zip(DTYPES, (1.0, 0.45), strict=True)):
        heights = [values[name, dtype] for name in names]
        bars = axes.barh(
            [i + 0.38 * offset for i in range(len(names))],
            heights,
            0.36,
            color=[COLOURS[name] for name in names],
            alpha=alpha,
            label=dtype,
        )
        axes.bar_label(bars, [form.format(height) for height in heights], padding=2, fontsize=7)
    axes.set_yticks([i + 0.19 for i in range(len(names))], names)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel("above float32, below and pale bfloat16", fontsize=8)


def _legend_below(axes: Axes, columns: int) -> None:
    if axes.get_legend_handles_labels()[0]:
        where = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.1 if columns > 2 else -0.16)}
        axes.legend(frameon=False, fontsize=7, ncols=columns, **where)
