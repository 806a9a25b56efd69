"""Folders with checkpoints in them, and the one that is meant."""

import re
from pathlib import Path

from bnjax.checkpoints.contents import ContentError
from bnjax.checkpoints.formats import is_read
from bnjax.checkpoints.formats.orbax import is_orbax, is_step

# The usual names of what a manager of orbax saves beside records and data iterators.
_ITEMS = ("default", "state", "pytree")
# The model in a folder of Hugging Face, beside its optimizer and tokenizer; the first one counts.
_HUB = ("model.safetensors", "pytorch_model.bin", "flax_model.msgpack")


def found_in(path: Path) -> Path:
    """The checkpoint at a path: the path itself, or the only or the newest one inside.

    Raises:
        ContentError: there is none, or several that are not steps of one training.
    """
    if not path.is_dir() or is_orbax(path):
        return path
    if (model := _hub_model(path)) is not None:
        return model
    inside = _inside(path)
    steps = {
        int(m[1]): each for each in inside if (m := re.fullmatch(r"(?:.*[_-])?(\d+)", each.name))
    }
    if steps and len(steps) == len(inside):
        return found_in(steps[max(steps)])
    items = [each for each in inside if each.name in _ITEMS]
    if is_step(path) and len(inside) > 1 and not items:
        return path
    if len(inside) != 1 and len(items) != 1:
        there = f"These are some: {', '.join(map(str, inside))}." if inside else "None is inside."
        raise ContentError(f"the folder itself is no checkpoint. {there}")
    return found_in((items if len(inside) > 1 else inside)[0])


def _hub_model(path: Path) -> Path | None:
    """The file of the model in a folder of Hugging Face; the index where it is in shards."""
    names = (name for file in _HUB for name in (f"{file}.index.json", file))
    usual = next((path / name for name in names if is_read(path / name)), None)
    others = [each for each in sorted(path.glob("*.index.json")) if is_read(each)]
    return usual or (others[0] if len(others) == 1 else None)


def _inside(path: Path) -> list[Path]:
    """What in a folder is a checkpoint or has one, each once, however many links lead to it."""
    found: dict[Path, Path] = {}
    for each in sorted(path.iterdir()):
        if _holds(each):
            there = each.resolve()
            if there not in found or found[there].is_symlink():
                found[there] = each
    return list(found.values())


def _holds(path: Path) -> bool:
    """Whether a file is a checkpoint, or a folder has one; what orbax has not finished is none."""
    if ".orbax-checkpoint-tmp" in path.name or path.name.startswith("."):
        return False
    if not path.is_dir():
        return is_read(path)
    if path.is_symlink() and path.resolve() in path.absolute().parents:
        return False
    return is_orbax(path) or any(_holds(each) for each in path.iterdir())
