"""Damage files of each format and load them.

`python -m tests.support.damaged 20000` tries that many files of each format, and
`... 20000 msgpack` of one.
"""

import json
import os
import resource
import sys
import tempfile
import time
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

import bnjax
from tests.support.checkpoints import STATE_DICT, VARIABLES

# Extreme values of numbers that a reader may trust too much.
_EXTREMES = (b"\xff", b"\xff\xff\xff\xff", b"\xff" * 8, b"\x00" * 8, b"\x7f\xff\xff\xff")


def mutations(content: bytes, number: int, seed: int = 0) -> Iterator[bytes]:
    """Truncated, flipped, overwritten, foreign, shifted, extreme, repeated and dotted versions."""
    rng = np.random.default_rng(seed)
    for kind in range(number):
        changed = bytearray(content)
        place = int(rng.integers(len(content) + 1))
        other = int(rng.integers(len(content) + 1))
        junk = rng.bytes(int(rng.integers(1, 48)))
        match kind % 8:
            case 0:
                changed = changed[:place]
            case 1 if place < len(content):
                changed[place] ^= 1 << rng.integers(8)
            case 2:
                changed[: len(junk)] = junk
            case 3:
                changed = bytearray(junk)
            case 4:
                changed[place:place] = junk
            case 5:
                extreme = _EXTREMES[int(rng.integers(len(_EXTREMES)))]
                changed[place : place + len(extreme)] = extreme
            case 6:
                changed[place:place] = changed[min(place, other) : max(place, other)]
            case _:
                for each in rng.integers(len(content), size=6) if content else ():
                    changed[each] = rng.integers(256)
        yield bytes(changed)


def _saved(suffix: str, tree: dict) -> Callable[[Path], list[Path]]:
    def make(folder: Path) -> list[Path]:
        bnjax.save(folder / f"model{suffix}", tree)
        return [folder / f"model{suffix}"]

    return make


def _legacy(folder: Path) -> list[Path]:
    import torch

    tree = {name: torch.from_numpy(np.ones(3, "f")) for name in STATE_DICT}
    torch.save(tree, folder / "model.pth", _use_new_zipfile_serialization=False)
    return [folder / "model.pth"]


def _orbax(folder: Path) -> list[Path]:
    bnjax.save(folder / "model", VARIABLES)
    return [path for path in sorted((folder / "model").rglob("*")) if path.is_file()]


def _shards(folder: Path) -> list[Path]:
    places = {}
    for number, (name, array) in enumerate(list(STATE_DICT.items())[:2], 1):
        file = f"model-0000{number}-of-00002.safetensors"
        bnjax.save(folder / file, {name: array})
        places[name] = file
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    return [index, *sorted(folder.glob("*.safetensors"))]


# Functions that save a checkpoint in each format and return its files.
FORMATS: dict[str, Callable[[Path], list[Path]]] = {
    "safetensors": _saved(".safetensors", STATE_DICT),
    "pytorch": _saved(".pth", STATE_DICT),
    "legacy": _legacy,
    "msgpack": _saved(".msgpack", VARIABLES),
    "shards": _shards,
    "orbax": _orbax,
}


# The suffix of each format, to look up the packages that it needs.
SUFFIXES = {
    "safetensors": ".safetensors",
    "pytorch": ".pth",
    "legacy": ".pth",
    "pickles": ".pth",
    "msgpack": ".msgpack",
    "shards": ".safetensors",
    "orbax": "",
}


def outcomes(folder: Path, name: str, number: int) -> Counter[str]:
    """Count how many damaged files were loaded and refused; anything else is an error."""
    return _pickles(folder, number) if name == "pickles" else _files(folder, name, number)


def _files(folder: Path, name: str, number: int) -> Counter[str]:
    parts = FORMATS[name](folder)
    path = folder / "model" if name == "orbax" else parts[0]
    found: Counter[str] = Counter()
    for part in parts:
        content = part.read_bytes()
        for changed in mutations(content, -(-number // len(parts))):
            found[_outcome(path, part, changed)] += 1
        part.write_bytes(content)
    return found


def _pickles(folder: Path, number: int) -> Counter[str]:
    """Damage the pickle inside a torch archive, with correct checksums."""
    (path,) = FORMATS["pytorch"](folder)
    with zipfile.ZipFile(path) as archive:
        held = {each: archive.read(each) for each in archive.namelist()}
    (name,) = (each for each in held if each.endswith("data.pkl"))
    found: Counter[str] = Counter()
    for changed in mutations(held[name], number):
        with zipfile.ZipFile(path, "w") as archive:
            for each, content in held.items():
                archive.writestr(each, changed if each == name else content)
        found[_outcome(path, path, path.read_bytes())] += 1
    return found


def _outcome(path: Path, part: Path, content: bytes) -> str:
    part.write_bytes(content)
    there = sorted(path.parent.rglob("*"))
    message = None
    try:
        bnjax.load(path)
    except ValueError as error:
        message = str(error)
    assert message is None or message.startswith("Cannot read ")
    assert sorted(path.parent.rglob("*")) == there
    return "loaded" if message is None else "refused"


def main(number: int, *names: str) -> None:
    """Print the outcomes for damaged files of each format."""
    warnings.simplefilter("ignore")
    for name in names or (*FORMATS, "pickles"):
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            below = Path(folder) / "here"
            below.mkdir()
            found = outcomes(below, name, number)
            assert [path.name for path in Path(folder).iterdir()] == ["here"]
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        seconds = time.monotonic() - start
        print(f"{name}: {dict(found)}, {seconds:.0f} s, at most {memory} MB", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
