"""Find what a pickle would call without unpickling it, and explain why it is refused."""

import builtins
import pickletools
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from bnjax.checkpoints.contents import ContentError

# The first bytes, after the protocol, of files by `torch.save` before it wrote zip archives.
_MAGIC = b"\x8a\n" + (0x1950A86A20F9469CFC6C).to_bytes(10, "little")
_SHOWN = 5


def is_by_torch(path: Path) -> bool:
    """Whether a file begins like a pickle by `torch.save`."""
    with path.open("rb") as file:
        start = file.read(2 + len(_MAGIC))
    return start[:1] == b"\x80" and start[2:] == _MAGIC


def check_writer(path: Path) -> None:
    """Refuse pickles not written by torch, whatever they hold."""
    with path.open("rb") as file:
        if file.read(1) != b"\x80" or is_by_torch(path):
            return
        file.seek(0)
        names = _called(file)
    calls = f" (it calls {_shown(names)})" if names else ""
    raise ContentError(
        f"it is a pickle that `torch.save` did not write{calls}, or damaged at its start, and "
        "unpickling it could run code.\nIf you trust it, load it with pickle and save its arrays "
        "with `bnjax.save`."
    )


def refusal(torch: Any, path: Path, message: str) -> str:
    """Why torch refused to unpickle a file: the names that it would call, or damage."""
    found = re.findall(r"GLOBAL (\S+)|but got <class '(\S+)'>", message)
    names = {*_listed(torch, path)} or {*map("".join, found)} - {""}
    if not names:
        return "it is truncated, damaged or another format. Copy or download it again."
    may_allow = "is blocked" not in message and not any(map(_is_function, names))
    listed = ", ".join(sorted(names)[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
    first = f"first allow it with `torch.serialization.add_safe_globals([{listed}])`,\nor "
    return (
        f"besides tensors and plain containers it holds {_shown(names)}, and unpickling that could "
        f"run code.\nIf you trust it, {first if may_allow else ''}load it with torch and "
        "save only its `state_dict()`."
    )


def _listed(torch: Any, path: Path) -> list[str]:
    """The names in a file that torch does not allow by default."""
    try:
        return torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # it reads only archives, and each kind of damage raises its own error
        return []


def _is_function(name: str) -> bool:
    """Whether this is a builtin function, such as eval, which no network needs."""
    found = getattr(builtins, name.removeprefix("builtins."), None)
    return found is not None and not isinstance(found, type)


def _called(file: Any) -> set[str]:
    """The names that a pickle would call, as far as it can be read."""
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
    except Exception:  # damaged: return what was found so far
        return names
    return names


def _shown(names: Collection[str]) -> str:
    """The first few names, escaped for a terminal."""
    shown = [each if re.fullmatch(r"[\w.]+", each) else repr(each) for each in sorted(names)]
    more = f" and {len(shown) - _SHOWN} more" if len(shown) > _SHOWN else ""
    return ", ".join(shown[:_SHOWN]) + more
