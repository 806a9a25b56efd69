"""The report of a fold: what was folded, what was not, and why."""

import dataclasses
from typing import NamedTuple

from rich.table import Table
from rich.text import Text

from bnjax._tables import Name, Shown
from bnjax._words import number_of


class Row(NamedTuple):
    """A row of a report: a layer, a batch norm before or after it, and why it was not folded."""

    layer: str
    batch_norm: str
    reason: str | None


class Branch(NamedTuple):
    """A branch of a sum, the layer that it was merged into, and why it was not merged."""

    branch: str
    into: str
    reason: str | None


@dataclasses.dataclass(frozen=True, repr=False)
class Report(Shown):
    """What was folded, what was not, and why; `print(report)` and notebooks show it as a table.

    Attributes:
        rows: each conv or dense layer and each batch norm, by path; `reason` is None if folded.
        max_difference: the largest change of an output on `example_x`, computed with the highest
            matmul precision and without `quantize`.
        scale: the largest magnitude in that output.
        tolerance: how large `max_difference / scale` may be.
        branches: each layer or batch norm that is added to a layer with the same input, and that
            layer; `reason` is None if they were merged.
    """

    rows: tuple[Row, ...]
    max_difference: float
    scale: float
    tolerance: float
    branches: tuple[Branch, ...] = ()

    def __repr__(self) -> str:
        """The result on one line."""
        return f"Report({self._done}; {self._difference})"

    @property
    def _done(self) -> str:
        folded = sum(row.reason is None for row in self.rows)
        merged = sum(branch.reason is None for branch in self.branches)
        also = f", {number_of(merged, 'branch')} merged" if merged else ""
        return f"{number_of(folded, 'layer')} folded{also}"

    @property
    def _difference(self) -> str:
        largest = f"largest output difference {self.max_difference:.2g}"
        return f"{largest}, for outputs up to {self.scale:.3g}"

    def __rich__(self) -> Table:
        """The table, for rich."""
        table = Table(title=self._done, caption=self._difference)
        for column in ("layer", "batch norm", "result"):
            table.add_column(column)
        for row in self.rows:
            result = "folded" if row.reason is None else f"not folded: {row.reason}"
            table.add_row(Name(row.layer or "-"), Name(row.batch_norm or "-"), Text(result))
        for branch in self.branches:
            how = "merged into" if branch.reason is None else "not merged into"
            why = f": {branch.reason}" if branch.reason else ""
            table.add_row(Name(branch.branch), "-", Text(f"{how} {branch.into}{why}"))
        return table
