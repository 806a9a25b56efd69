"""The report of a diagnosis, as a table, as data or as a plot."""

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from bnjax._files import folder_of
from bnjax._tables import Name, Shown
from bnjax._words import number_of
from bnjax.models.diagnosis.evidence import Finding, part
from bnjax.models.diagnosis.measuring import Layer, Measured
from bnjax.plotting import plot_layers

# The table shows at most this many layers: those with findings first, then the farthest.
_ROWS = 16
_STYLES = {"error": "bold red", "warning": "bold yellow"}


@dataclasses.dataclass(frozen=True, repr=False)
class Report(Shown):
    """The result of `diagnose`; `print(report)` and notebooks show it as tables.

    Attributes:
        findings: what is wrong, errors first; empty if all is well.
        layers: numbers for each batch norm, in call order: `path`, `layer`, `channels`, `values`
            (per channel in a batch), `mean_distance` (root mean square over the channels, in
            standard deviations), `var_ratio` (running over batch variance, geometric mean),
            `distance` (both combined), `spread` (the same between batches, NaN for a single one),
            `dtype`.
        outputs: `gap` and `mates`: how much outputs in evaluation differ from those in training,
            and from those with other examples in the batch, in standard deviations of the outputs.
        losses: mean loss and metrics, in `"train"` and in `"eval"` mode; empty without `loss_fn`.
        batches: the number of batches seen.
    """

    findings: tuple[Finding, ...]
    layers: tuple[dict[str, Any], ...]
    outputs: dict[str, float]
    losses: dict[str, dict[str, float]]
    batches: int
    _measured: Measured = dataclasses.field(repr=False, compare=False)

    def __post_init__(self) -> None:
        """Make all NaN the same object, so that equal diagnoses give equal reports."""
        for name in ("findings", "layers", "outputs", "losses"):
            object.__setattr__(self, name, _with_nan(getattr(self, name), math.nan))

    @property
    def healthy(self) -> bool:
        """Whether there are no findings."""
        return not self.findings

    def to_json(self, indent: int | None = 2) -> str:
        """The whole report as JSON, with null for numbers that are not finite."""
        names = ("layers", "outputs", "losses", "batches")
        data = {name: getattr(self, name) for name in names}
        data["findings"] = [dataclasses.asdict(finding) for finding in self.findings]
        return json.dumps({"healthy": self.healthy, **_with_nan(data, None)}, indent=indent)

    def plot(self, path: str | Path) -> None:
        """Plot running against batch statistics for each layer. Needs matplotlib.

        Args:
            path: where to save the plot; the suffix sets the format.

        Raises:
            FileNotFoundError: there is no such folder.
        """
        folder_of(Path(path))
        plot_layers(path=path, **self.drawn)

    @property
    def drawn(self) -> dict[str, Any]:
        """What `plot` draws, as plain data."""
        quantiles = (0.1, 0.5, 0.9)
        starts = {finding.layer for finding in self.findings}
        rows = [
            {
                "name": x.path,
                "mean": np.quantile(x.mean_distance[~x.poisoned], quantiles).tolist(),
                "var": np.quantile(x.var_ratio[~x.poisoned], quantiles).tolist(),
                "mean_spread": float(np.sqrt(np.mean((x.mean_spread / x.std) ** 2))),
                "var_spread": float(np.sqrt(np.mean(x.var_spread**2))),
                "distance": x.distance,
                "found": any(x.path in finding.layers for finding in self.findings),
                "starts": x.path in starts,
            }
            for x in self._measured.layers
            if x.compared
        ]
        title = f"{self.verdict[0].upper()}{self.verdict[1:]}"
        gap = f"outputs in evaluation and training differ by {part(self.outputs['gap'])} their "
        gap += "standard deviation"
        return {"rows": rows, "title": title, "subtitle": gap, "modes": self._modes()}

    @property
    def verdict(self) -> str:
        """The findings on one line."""
        if self.healthy:
            return f"all is well: {self._fit()}"
        return ", ".join(f"{f.kind} ({named(f.layer)})" for f in self.findings)

    def _fit(self) -> str:
        norms = number_of(len(self.layers), "batch norm")
        return f"{norms} {'fits' if len(self.layers) == 1 else 'fit'} these data"

    def _modes(self) -> list[tuple[str, float, float]]:
        train, evaluation = self.losses["train"], self.losses["eval"]
        return [(name, train[name], evaluation[name]) for name in train]

    def print(self, console: Console | None = None) -> None:
        """Print the tables, on this console or a new one."""
        (console or Console()).print(self)

    def __repr__(self) -> str:
        """The verdict, on one line."""
        seen = number_of(self.batches, "batch")
        return f"Report({self.verdict}; over {seen})"

    def __rich__(self) -> Group:
        """The tables, for rich."""
        return Group(*self._parts())

    def _parts(self) -> Iterator[Any]:
        yield self._table()
        yield Text(self._summary())
        if self.healthy:
            yield Text(f"All is well: {self._fit()}.", "bold green")
        for number, finding in enumerate(self.findings, 1):
            more = len(finding.layers) - 1
            where = named(finding.layer) + (f" and {more} more" if more > 0 else "")
            style = _STYLES[finding.severity]
            grid = Table.grid(padding=(0, 2, 0, 0))
            grid.add_column(no_wrap=True)
            grid.add_column()
            title = Name(f"{finding.kind}, {finding.severity}: {where}", style)
            grid.add_row(Text(str(number), style), title)
            for name in ("evidence", "cause"):
                grid.add_row(name, Name(getattr(finding, name)))
            grid.add_row("repair", Name(finding.repair, "cyan"))
            yield Text("")
            yield grid

    def _table(self) -> Table:
        found = [
            [n for n, f in enumerate(self.findings, 1) if row["path"] in f.layers]
            for row in self.layers
        ]
        far = np.nan_to_num([row["distance"] for row in self.layers])
        order = sorted(range(len(self.layers)), key=lambda i: (not found[i], -far[i]))
        left = len(self.layers) - len(order[:_ROWS])
        norms, batches = number_of(len(self.layers), "batch norm"), number_of(self.batches, "batch")
        table = Table(
            title=f"{norms} over {batches}",
            caption=f"{left} more layers, no farther from the data" if left else None,
            box=box.SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
        )
        table.add_column("\n\nlayer")
        numbers = "\n\nchannels", "values\nper\nchannel", "running\nmean off\nby, std"
        numbers += "running /\nbatch\nvariance", "batch to\nbatch,\nstd", "\n\nfinding"
        for column in numbers:
            table.add_column(column, justify="right", no_wrap=True)
        for row, numbers in ((self.layers[i], found[i]) for i in sorted(order[:_ROWS])):
            table.add_row(
                Name(named(row["path"])),
                str(row["channels"]),
                f"{row['values']:.0f}",
                *(_written(row[name]) for name in ("mean_distance", "var_ratio", "spread")),
                ", ".join(map(str, numbers)),
                style="red" if numbers else None,
            )
        return table

    def _summary(self) -> str:
        gap = part(self.outputs["gap"])
        modes = (f"{n} {a:.4g} in training, {b:.4g} in evaluation" for n, a, b in self._modes())
        differ = f"outputs in evaluation differ from those in training by {gap} their deviation"
        return "; ".join((differ, *modes))


def row_of(layer: Layer, batches: int) -> dict[str, Any]:
    """The numbers of a layer in a report over `batches` batches."""
    compared, nan = layer.compared, float("nan")
    return {
        "path": layer.path,
        "layer": layer.kind.layer,
        "channels": layer.var.size,
        "values": layer.values,
        "mean_distance": layer.mean_off if compared else nan,
        "var_ratio": layer.var_off if compared else nan,
        "distance": layer.distance if compared else nan,
        "spread": layer.spread if compared and batches > 1 else nan,
        "poisoned": int(layer.poisoned.sum()),
        "dtype": layer.dtype.name,
    }


def named(path: str) -> str:
    """A path, or words for the empty one."""
    return path or "the top of the model"


def _written(value: float) -> str:
    """Two decimals, or two digits if it is large."""
    return "-" if not math.isfinite(value) else f"{value:.2f}" if value < 100 else f"{value:.1e}"


def _with_nan(value: Any, nan: float | None) -> Any:
    """Replace each NaN by `nan`; if that is None, each number that is not finite."""
    if isinstance(value, dict):
        return {name: _with_nan(item, nan) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_with_nan(item, nan) for item in value)
    if isinstance(value, Finding):
        return dataclasses.replace(value, numbers=_with_nan(value.numbers, nan))
    lost = isinstance(value, float) and not math.isfinite(value)
    return nan if lost and (nan is None or math.isnan(value)) else value
