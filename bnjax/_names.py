"""Suggest the name that was probably meant when a module or a layer lacks one."""

import difflib
import functools
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import NoReturn

_MODULES = ("bnjax", "bnjax.linen", "bnjax.nnx", "bnjax.training", "bnjax.masks", "bnjax.diagnosis")
_INSTEAD = {
    "BatchNorm": "Use bnjax.linen.BatchNorm or bnjax.nnx.BatchNorm (Flax's arguments), or "
    "bnjax.BatchNorm2d or bnjax.nnx.BatchNorm2d (PyTorch's).",
    "SyncBatchNorm": "Every layer synchronizes: pass `axis_name` to bnjax.BatchNorm2d, or train "
    "over a mesh.",
}


def front(
    module: str, public: Sequence[str]
) -> tuple[Callable[[str], NoReturn], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` for a module that lists its public names and suggests others."""
    return functools.partial(missing, module), lambda: list(public)


def missing(module: str, name: str) -> NoReturn:
    """Raise an `AttributeError` that suggests the name that was probably meant."""
    hint = "" if name.startswith("_") else _hint(module, name)
    raise AttributeError(f"module {module!r} has no attribute {name!r}.{hint}")


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name closest to a misspelt one, ignoring case; None if none is close.

    >>> nearest("Batchnorm2d", ["BatchNorm1d", "BatchNorm2d"]), nearest("loss", ["BatchNorm1d"])
    ('BatchNorm2d', None)
    """
    lower = {each.lower(): each for each in known}
    found = difflib.get_close_matches(name.lower(), lower, n=1, cutoff=0.7)
    return lower[found[0]] if found else None


def _hint(module: str, name: str) -> str:
    if module == "bnjax" and name in _INSTEAD:
        return f" {_INSTEAD[name]}"
    public = {each: getattr(sys.modules.get(each), "__all__", ()) for each in _MODULES}
    exact = [f"{each}.{name}" for each, names in public.items() if name in names]
    own = nearest(name, public[module])
    others = [f"{m}.{close}" for m, names in public.items() if (close := nearest(name, names))]
    found = exact or ([f"{module}.{own}"] if own else others[:1])
    return f" Did you mean {' or '.join(found)}?" if found else f" help({module}) lists its names."
