"""What was folded, what was not and why: Report."""

import dataclasses
import io
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from bnjax._words import number_of


class Row(NamedTuple):
    """One line of a report: a layer, a batch norm before or after it, and why it stays."""

    layer: str
    batch_norm: str
    reason: str | None


class Branch(NamedTuple):
    """A branch of a sum: a layer or batch norm, the layer that it is merged into, or why not."""

    branch: str
    into: str
    reason: str | None


@dataclasses.dataclass(frozen=True)
class Report:
    """What was folded, what was not and why; `str()` prints it as a table.

    Attributes:
        rows: each conv or dense layer and each batch norm, by path; `reason` is None where folded.
        max_difference: largest difference that folding made to an output on `example_x`, computed
            with the highest matmul precision, and without `quantize`.
        scale: the largest magnitude in that output.
        tolerance: how large `max_difference / scale` may be.
        branches: each layer or batch norm that is added to another layer of the same input, and
            that layer; `reason` is None where they became one.
    """

    rows: tuple[Row, ...]
    max_difference: float
    scale: float
    tolerance: float
    branches: tuple[Branch, ...] = ()

    def __str__(self) -> str:  # noqa: D105 - the class says it
        folded = sum(row.reason is None for row in self.rows)
        merged = sum(branch.reason is None for branch in self.branches)
        also = f", {number_of(merged, 'branch')} merged" if merged else ""
        table = Table(
            title=f"{number_of(folded, 'layer')} folded{also}",
            caption=f"largest output difference {self.max_difference:.2g}, "
            f"of outputs up to {self.scale:.3g}",
        )
        for column in ("layer", "batch norm", "result"):
            table.add_column(column, overflow="fold")
        for row in self.rows:
            result = "folded" if row.reason is None else f"not folded: {row.reason}"
            table.add_row(row.layer or "-", row.batch_norm or "-", result)
        for branch in self.branches:
            how = "merged into" if branch.reason is None else "not merged into"
            why = f": {branch.reason}" if branch.reason else ""
            table.add_row(branch.branch, "-", f"{how} {branch.into}{why}")
        console = Console(file=io.StringIO(), width=100, markup=False, color_system=None)
        console.print(table)
        return console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
