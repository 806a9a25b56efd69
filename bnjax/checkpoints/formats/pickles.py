"""What a pickle would call, found without unpickling it, and why that is refused."""

import builtins
import pickletools
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from bnjax.checkpoints.contents import ContentError

# How the files of `torch.save` before its zip archives begin, after the protocol.
_MAGIC = b"\x8a\n" + (0x1950A86A20F9469CFC6C).to_bytes(10, "little")
_SHOWN = 5


def is_torchs(path: Path) -> bool:
    """Whether a file begins as `torch.save` began its pickles."""
    with path.open("rb") as file:
        start = file.read(2 + len(_MAGIC))
    return start[:1] == b"\x80" and start[2:] == _MAGIC


def check_writer(path: Path) -> None:
    """Refuse pickles that others than torch have written, whatever they hold."""
    with path.open("rb") as file:
        if file.read(1) != b"\x80" or is_torchs(path):
            return
        file.seek(0)
        names = _called(file)
    held = f", of {_shown(names)}" if names else ""
    raise ContentError(
        f"it is a pickle that `torch.save` did not write{held}, or damaged at its start, and to "
        "unpickle it could run code.\nWhere you trust it, load it with pickle and save its arrays "
        "with `bnjax.save`."
    )


def refusal(torch: Any, path: Path, message: str) -> str:
    """Why torch did not unpickle a file: for what it would have to call, or for damage."""
    found = re.findall(r"GLOBAL (\S+)|but got <class '(\S+)'>", message)
    names = {*_listed(torch, path)} or {*map("".join, found)} - {""}
    if not names:
        return "it is truncated, damaged or something else. Copy or download it again."
    may_allow = "is blocked" not in message and not any(map(_is_function, names))
    listed = ", ".join(sorted(names)[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
    first = f"allow it before by `torch.serialization.add_safe_globals([{listed}])`,\nor "
    return (
        f"besides tensors and plain containers it holds {_shown(names)}, and to unpickle that "
        f"could run code.\nWhere you trust it, {first if may_allow else ''}load it with torch and "
        "save its `state_dict()` alone."
    )


def _listed(torch: Any, path: Path) -> list[str]:
    """What a file holds beyond what is allowed, as far as torch lists it."""
    try:
        return torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # it lists archives alone, and each damage has an error of its own
        return []


def _is_function(name: str) -> bool:
    """Whether it is one of Python's own functions, such as eval: no network needs that."""
    found = getattr(builtins, name.removeprefix("builtins."), None)
    return found is not None and not isinstance(found, type)


def _called(file: Any) -> set[str]:
    """What a pickle would call, as far as it can be read."""
    names, strings, memo = set(), ["", ""], []
    try:
        for code, argument, _ in pickletools.genops(file):
            if code.name == "GLOBAL":
                names.add(str(argument).replace(" ", "."))
            elif code.name == "STACK_GLOBAL":
                names.add(".".join(strings[-2:]))
            elif code.name == "MEMOIZE":
                memo.append(strings[-1])
            elif code.name in ("BINGET", "LONG_BINGET"):
                strings.append(memo[int(argument or 0)])
            elif isinstance(argument, str):
                strings.append(argument[:100])
            else:
                strings.append("")
    except Exception:  # where it is damaged, what was found so far
        return names
    return names


def _shown(names: Collection[str]) -> str:
    """The first of some names, with no letter that a terminal would follow."""
    shown = [each if re.fullmatch(r"[\w.]+", each) else repr(each) for each in sorted(names)]
    more = f" and {len(shown) - _SHOWN} more" if len(shown) > _SHOWN else ""
    return ", ".join(shown[:_SHOWN]) + more
