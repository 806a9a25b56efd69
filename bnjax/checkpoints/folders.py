"""Find the checkpoint in a folder."""

import re
from pathlib import Path

from bnjax.checkpoints.contents import ContentError
from bnjax.checkpoints.formats import is_read
from bnjax.checkpoints.formats.orbax import is_orbax, is_step

# The usual names for the state in orbax checkpoints that also hold records or data iterators.
_ITEMS = ("default", "state", "pytree")
# Model files in a Hugging Face folder, which has other files too; the first one found is used.
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
        there = f"It holds {', '.join(map(str, inside))}." if inside else "It holds none."
        raise ContentError(f"the folder is not a checkpoint itself. {there}")
    return found_in((items if len(inside) > 1 else inside)[0])


def _hub_model(path: Path) -> Path | None:
    """The model file in a Hugging Face folder, or the index if it is sharded."""
    names = (name for file in _HUB for name in (f"{file}.index.json", file))
    usual = next((path / name for name in names if is_read(path / name)), None)
    others = [each for each in sorted(path.glob("*.index.json")) if is_read(each)]
    return usual or (others[0] if len(others) == 1 else None)


def _inside(path: Path) -> list[Path]:
    """The entries of a folder that are or contain checkpoints, each once even if symlinked."""
    found: dict[Path, Path] = {}
    for each in sorted(path.iterdir()):
        if _holds(each):
            there = each.resolve()
            if there not in found or found[there].is_symlink():
                found[there] = each
    return list(found.values())


def _holds(path: Path) -> bool:
    """Whether a file is, or a folder contains, a checkpoint other than an unfinished orbax save."""
    if ".orbax-checkpoint-tmp" in path.name or path.name.startswith("."):
        return False
    if not path.is_dir():
        return is_read(path)
    if path.is_symlink() and path.resolve() in path.absolute().parents:
        return False
    return is_orbax(path) or any(_holds(each) for each in path.iterdir())
