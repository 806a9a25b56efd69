"""What the batch norms of a ResNet-50 say in a training step, over more and more devices.

A layer of each of its widths is compiled for 8, 64, 256 and 4,096 devices, as far as there are such
topologies; the bytes follow from the collectives that are found, each done in a ring.
"""

from collections import Counter
from collections.abc import Iterator
from typing import Any

from rich.table import Table

from tests.benchmarks.cases import BACKWARD, FORWARD, Case
from tests.benchmarks.contenders import OURS, REFERENCE
from tests.benchmarks.environment import Options
from tests.benchmarks.programs import away
from tests.benchmarks.programs.topologies import BIG, Chip, Platform
from tests.support.hlo import Collective

SIZES = (8, 64, 256, 4096)
STAGES = ((64, 3), (128, 4), (256, 6), (512, 3))
CHANNELS = [64] + [
    channels
    for width, blocks in STAGES
    for block in range(blocks)
    for channels in (width, width, 4 * width, *([4 * width] if block == 0 else []))
]
LAYERS = len(CHANNELS)
# Bytes a second that a device sends, and as many that it receives, by the makers' data sheets: half
# of NVLink 4's 900 GB/s inside a host of eight H100, one 400 Gb/s InfiniBand adapter for each GPU
# between hosts, and half of the 1,600, 2,400 or 4,800 Gb/s of all of a TPU's links.
LINKS = {
    "H100": (("NVLink", 8, 450e9), ("InfiniBand", 4096, 50e9)),
    "TPU v5e": (("ICI", 256, 100e9),),
    "TPU v4": (("ICI", 4096, 150e9),),
    "TPU v5p": (("ICI", 4096, 300e9),),
}


def sent(found: Collective, devices: int) -> float:
    """The bytes that each of them sends, and receives, if they stand in a ring."""
    others = devices - 1
    if found.kind == "all-gather":
        return others * found.bytes
    if found.kind == "all-reduce":
        return 2 * others / devices * found.bytes
    if found.kind in ("reduce-scatter", "all-to-all"):
        return others / devices * found.bytes
    return found.bytes


def speed(chip: str, devices: int) -> tuple[str, float]:
    """The slowest link between so many."""
    return next((name, rate) for name, reach, rate in LINKS[chip] if devices <= reach)


def measure(options: Options) -> dict[str, Any]:
    """A row for each chip, number of devices, way and contender."""
    return away.measure("scale", options)


def rows(platform: Platform, quick: bool) -> Iterator[dict[str, Any]]:
    """Those of one platform; where quick, of its first chip and two sizes."""
    from tests.benchmarks.programs.layers import JIT, NAMED

    for chip in BIG[platform][: 1 if quick else None]:
        for devices in SIZES[:2] if quick else SIZES:
            if devices in chip.layouts:
                for contender, way in ((OURS, NAMED), (OURS, JIT), (REFERENCE, NAMED)):
                    yield _row(chip, devices, contender, way)


def _row(chip: Chip, devices: int, contender: str, way: str) -> dict[str, Any]:
    from tests.benchmarks.programs.layers import parallel

    row: dict[str, Any] = {"chip": chip.name, "devices": devices, "contender": contender}
    row["way"] = way
    for which in (FORWARD, BACKWARD):
        total: Counter[str] = Counter()
        kinds: set[str] = set()
        for channels, layers in Counter(CHANNELS).items():
            found = parallel(
                Case((2 * devices, 4, 4, channels)), which, contender, way, chip, devices
            )
            always = [each for each in found if not each.conditional]
            kinds |= {each.kind for each in always}
            total["collectives"] += layers * len(always)
            total["in a branch"] += layers * (len(found) - len(always))
            total["bytes"] += layers * round(sum(sent(each, devices) for each in always))
        row[which] = {**total, "kinds": sorted(kinds)}
    name, rate = speed(chip.name, devices)
    return {**row, "link": name, "milliseconds": row[BACKWARD]["bytes"] / rate * 1e3}


def cells(row: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, str]:
    """A row in words, by column, beside the others of its chip."""
    forward, both = row[FORWARD], row[BACKWARD]
    back = both["collectives"] - forward["collectives"]
    few = next(each for each in rows if _way(each) == _way(row))  # the fewest devices come first
    return {
        "devices": f"{row['devices']:,}",
        "": " ".join(_way(row)),
        "forward": f"{forward['collectives'] / LAYERS:.3g} {', '.join(forward['kinds'])}",
        "backward": f"{back / LAYERS:.3g}",
        "in a branch": f"{both['in a branch'] / LAYERS:.3g}",
        "MB forward": f"{forward['bytes'] / 1e6:,.2f}",
        "MB both": f"{both['bytes'] / 1e6:,.2f}",
        f"to {few['devices']} devices": f"{both['bytes'] / few[BACKWARD]['bytes']:.3g}x",
        "link": row["link"],
        "ms": f"{row['milliseconds']:.3f}",
    }


def of_chips(data: dict[str, Any]) -> Iterator[tuple[str, list[dict[str, str]]]]:
    """Each chip with its rows in words."""
    for _, rows in away.measured(data):
        for chip in dict.fromkeys(row["chip"] for row in rows):
            own = [row for row in rows if row["chip"] == chip]
            yield chip, [cells(row, own) for row in own]


def tables(data: dict[str, Any]) -> Iterator[Table | str]:
    """A table for each chip."""
    yield from away.headings(data)
    for chip, rows in of_chips(data):
        title = f"{chip}: the {LAYERS} batch norms of a ResNet-50 in one training step, float32"
        caption = (
            "MB: sent by each device, and as many received; ms: both directions, without latency"
        )
        table = Table(title=title, caption=caption)
        for column in rows[0]:
            table.add_column(column, justify="right")
        for row in rows:
            table.add_row(*row.values(), style="bold" if OURS in row[""] else None)
        yield table


def _way(row: dict[str, Any]) -> tuple[str, str]:
    return row["contender"], row["way"]
