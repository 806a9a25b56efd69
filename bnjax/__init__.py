"""Batch normalization for JAX and Flax, done completely."""

from importlib import import_module, util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bnjax._public import *  # noqa: F403

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """A submodule; or what `bnjax._public` has, which takes JAX and is loaded on first use."""
    if not name.startswith("__") and util.find_spec(f"{__name__}.{name}"):
        return import_module(f"{__name__}.{name}")
    public = import_module("bnjax._public")
    if name == "__all__" or name in public.__all__:
        return getattr(public, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return import_module("bnjax._public").__all__
