"""Checkpoints on disk, read and written safely: load, save."""

import contextlib
import importlib
import os
import pickle
import uuid
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import serialization, traverse_util

from bnjax._files import folder_of
from bnjax.checkpoints.folders import LEGACY, found_in, read_orbax, write_orbax
from bnjax.checkpoints.nested import UNWANTED, ContentError, as_dicts, filled
from bnjax.checkpoints.tensors import SHARED, as_numpy, as_tensor

_KNOWN = (
    "Formats are .safetensors, .pth and .pt (PyTorch), .msgpack (Flax), and a folder without a "
    "suffix (orbax)."
)

Only = Callable[[str, tuple[int, ...]], bool]
# The name of a format, and what reads and writes it.
_Format = tuple[str, Callable[[Path, Only], Any], Callable[[Path, dict[str, Any]], None]]


def load(path: str | Path, *, like: Any = None, only: Only | None = None) -> Any:
    """The arrays of a checkpoint, whoever wrote it.

    The suffix says what it is: `.safetensors`; `.pth` or `.pt`, which needs torch and is read by
    `torch.load(weights_only=True)`; Flax's `.msgpack`, or a `checkpoint_100` of its old way; or a
    folder that orbax wrote. No code of the file is run and nothing is written.

    Guide: examples/guides/checkpoints.md

    Args:
        path: the file or folder; or a folder around the only checkpoint, or around the steps that
            a `CheckpointManager` of orbax has saved, of which it is the newest.
        like: what was saved, with any values, such as a new `TrainState`, or `(model, optimizer)`
            of nnx: gives the structure, dtypes and shardings. `jax.ShapeDtypeStruct` will do for
            arrays. It is not touched.
        only: whether an array is wanted, by its name ("/" between nested names) and shape; from a
            safetensors file the others are not even read.

    Returns:
        A tree like `like`. Without it, a dict of NumPy arrays: a state dict of PyTorch has its
        names, for `bnjax.from_torch`; what was nested (in a safetensors file: has "/" in its names)
        is nested, with sequences as dicts by "0", "1" and so on. Random keys are their data. What
        is no array, such as a string, stays as it is.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, truncated, something else, or would run code; or names,
            shapes or kinds of numbers are not those of `like`.
        ModuleNotFoundError: its format needs a package that is not installed.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"There is no checkpoint at {path}.")
    wanted: Only = only or (lambda name, shape: True)
    try:
        path = found_in(path, [suffix for suffix in _FORMATS if suffix])
    except ContentError as error:
        raise ValueError(f"Cannot read {path} as a checkpoint: {error} {_KNOWN}") from error
    what, read, _ = _format(path, bare=path.is_dir())
    try:
        found = as_dicts(read(path, wanted), lambda value, name: _plain(value, name, wanted))
        return found if like is None else filled(like, found)
    except ModuleNotFoundError:
        raise
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"Cannot read {path} as {what}: it is damaged, or holds more than tensors and plain "
            "containers, and to unpickle that could run code. Where you trust it, load it with "
            "torch and save its `state_dict()` alone."
        ) from error
    except ContentError as error:
        raise ValueError(f"Cannot read {path} as {what}: {error}") from error
    except Exception as error:  # Each library has its own.
        reason = (str(error).strip().splitlines() or [""])[0][:200]
        if not reason or isinstance(error, LookupError):
            reason = f"{type(error).__name__} {reason}".strip()
        raise ValueError(
            f"Cannot read {path} as {what}: it is truncated, damaged or something else ({reason}). "
            "Copy or download it again, and check that its suffix is right."
        ) from error


def save(path: str | Path, tree: Any) -> None:
    """Write a checkpoint that appears under its name when it is whole, or not at all.

    A process that is killed meanwhile leaves what was there, and perhaps a hidden `.tmp` beside it.

    Guide: examples/guides/checkpoints.md

    Args:
        path: where it goes; the suffix chooses the format, as for `load`. A file there is replaced,
            a folder is not.
        tree: a state dict, linen variables, a `TrainState`, an nnx model, optimizer or state, or
            any tree of arrays, such as a dict or tuple of these. Random keys are saved as their
            data; functions and other settings, such as a `TrainState` has them, are not.

    Raises:
        ValueError: an unknown suffix, a leaf that is no array of numbers, an array of which another
            process has a part, or a name or dtype that would not come back.
        FileExistsError: the folder is there.
        FileNotFoundError: there is no folder to save it in.
        TypeError: the path is no path.
        ModuleNotFoundError: the format needs a package that is not installed.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(f"{folder}/model.msgpack", {"params": {"bias": np.arange(3)}})
    ...     load(f"{folder}/model.msgpack")
    {'params': {'bias': array([0, 1, 2])}}

    A training, with its optimizer and random keys, comes back into a state like it:

    >>> import bnjax, optax
    >>> from bnjax.training import init_state
    >>> x = jnp.ones((2, 3))
    >>> tx, model = optax.adam(0.1), bnjax.BatchNorm1d()
    >>> make = lambda seed: init_state(model, tx, jax.random.key(seed), x)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(f"{folder}/state.msgpack", make(3))
    ...     state = load(f"{folder}/state.msgpack", like=make(0))
    >>> bool((state.rng == make(3).rng).all()), type(state).__name__
    (True, 'TrainState')
    """
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"`path` comes first, as in save(path, tree), got {type(path).__name__}.")
    path = Path(path)
    *_, write = _format(path, bare=True)
    if path.suffix:  # orbax makes its folders
        folder_of(path)
    write(path, _to_write(path, tree))


# Why arrays can't be saved, in the order in which they are told.
_REASONS = {
    "wrong": "a checkpoint holds arrays of numbers alone, but these are none: {}. Leave them out.",
    "elsewhere": "another process has a part of these arrays: {}. Use a `CheckpointManager` of "
    "orbax, whose folders `bnjax.load` reads.",
    "empty": "orbax has no arrays of size 0: {}. Leave them out, or save as .msgpack, which has "
    "all.",
    "foreign": "this format has no such numbers: {}. Convert them, or save as .msgpack, which has "
    "all.",
}


def _to_write(path: Path, tree: Any) -> dict[str, Any]:
    """Nested dicts of arrays that all come back from a file of this suffix."""
    suffix = path.suffix.lower()
    refused: dict[str, list[str]] = {why: [] for why in _REASONS}

    def array(value: Any, name: str) -> Any:
        if value is None:  # such as the loss scale of a state without one
            return UNWANTED if suffix == ".safetensors" else None
        if isinstance(value, jax.Array) and not _is_here(value):
            refused["elsewhere"].append(name)
            return None
        found = as_numpy(np.asarray(value) if isinstance(value, (bool, int, float)) else value)
        dtype = type(value).__name__ if found is None else found.dtype
        if found is None or not any(jnp.issubdtype(dtype, kind) for kind in (np.number, np.bool_)):
            refused["wrong"].append(f"{name} ({dtype})")
            return None
        found = found.astype(found.dtype.newbyteorder("="), copy=False)  # msgpack has no other
        if not suffix and not found.size:
            refused["empty"].append(name)
        if not _holds(suffix, found.dtype):
            refused["foreign"].append(f"{name} ({found.dtype})")
        return found

    try:
        tree = as_dicts(tree, array, paths=True)
    except ContentError as error:
        raise ValueError(f"Cannot save to {path}: {error}") from error
    for why, names in refused.items():
        if names:
            raise ValueError(f"Cannot save to {path}: {_REASONS[why].format(', '.join(names))}")
    return tree


def _is_here(array: jax.Array) -> bool:
    """Whether this process has all of an array."""
    return array.is_fully_addressable or array.is_fully_replicated


def _holds(suffix: str, dtype: np.dtype) -> bool:
    """Whether what is written in a format comes back in this dtype."""
    if suffix == ".msgpack":
        return True
    own = dtype.type.__module__ == "numpy"
    if suffix == ".safetensors":
        return dtype.name == "bfloat16" or (own and dtype != np.complex128)
    return dtype.name in SHARED or own


def _plain(value: Any, name: str, wanted: Only) -> Any:
    """An array as NumPy has it, if it is wanted; anything else as it is."""
    array = as_numpy(value)
    if array is None:
        return value
    return array if wanted(name, array.shape) else UNWANTED


def _format(path: Path, *, bare: bool) -> _Format:
    """The row of a suffix, or of none where the path may be `bare`."""
    suffix = "" if path.is_dir() else path.suffix.lower()
    if path.is_file() and LEGACY.fullmatch(path.name):
        suffix = ".msgpack"
    if suffix not in _FORMATS or not (suffix or bare):
        raise ValueError(f"The suffix of {path} says of no format what it is. {_KNOWN}")
    return _FORMATS[suffix]


def _needed(module: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        raise ModuleNotFoundError(
            f"This format needs {package}, which is not installed: `pip install {extra}`."
        ) from error


def _read_safetensors(path: Path, wanted: Only) -> dict[str, Any]:
    safetensors = _needed("safetensors", "'bnjax[tools]'")
    tree: dict[str, Any] = {}
    with safetensors.safe_open(path, framework="numpy") as file:
        for name in file.keys():
            *parents, last = name.split("/")
            if {"", ".", ".."} & {*parents, last}:
                raise ContentError(f"it has the name {name!r}, and a name is no such path.")
            node = tree
            for parent in parents:
                node = node.setdefault(parent, {})
            if not isinstance(node, dict) or last in node:
                raise ContentError(f"{name!r} is below or above another array.")
            there = file.get_slice(name)
            if wanted(name, tuple(there.get_shape())):
                if there.get_dtype().startswith("F8_"):
                    raise ContentError(
                        f"{name!r} is of dtype {there.get_dtype()}, which NumPy does not have. "
                        "Load it with `safetensors.torch`, or leave it out with `only`."
                    )
                node[last] = file.get_tensor(name)
    return tree


def _write_safetensors(path: Path, tree: dict[str, Any]) -> None:
    safetensors = _needed("safetensors.numpy", "'bnjax[tools]'")
    arrays = {}
    for names, value in traverse_util.flatten_dict(tree).items():
        name = "/".join(names)
        if any("/" in part for part in names):
            raise ValueError(
                f"Cannot save to {path}: the name {name!r} has a '/', which stands between the "
                "names of nested dicts here. Rename it, or save as .msgpack."
            )
        arrays[name] = np.asarray(value, order="C")
    kind = "flax" if any(isinstance(value, dict) for value in tree.values()) else "pt"
    with _appearing(path) as temporary:
        safetensors.save_file(arrays, temporary, metadata={"format": kind})


def _read_torch(path: Path, _: Only) -> Any:
    torch = _needed("torch", "torch")
    size = path.stat().st_size

    def bounded(value: Any, _: str) -> None:
        # A view that repeats one number can be larger than any memory.
        if isinstance(value, torch.Tensor) and value.numel() * value.element_size() > size:
            raise ContentError(f"a tensor of shape {tuple(value.shape)} is larger than the file.")

    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if (damaged := archive.testzip()) is not None:
                raise ContentError(f"the checksum of its part {damaged} is wrong. Copy it again.")
    tree = torch.load(path, map_location="cpu", weights_only=True)
    as_dicts(tree, bounded)
    return tree


def _write_torch(path: Path, tree: dict[str, Any]) -> None:
    torch = _needed("torch", "torch")
    # A file object, as torch writes the name of a path into it.
    with _appearing(path) as temporary, temporary.open("wb") as file:
        torch.save(as_dicts(tree, _as_torch), file)


def _as_torch(value: Any, _: str) -> Any:
    return None if value is None else as_tensor(value)


def _read_msgpack(path: Path, _: Only) -> Any:
    return serialization.msgpack_restore(path.read_bytes())


def _write_msgpack(path: Path, tree: dict[str, Any]) -> None:
    with _appearing(path) as temporary:
        temporary.write_bytes(serialization.msgpack_serialize(tree))


def _read_orbax(path: Path, _: Only) -> Any:
    return read_orbax(path)


@contextlib.contextmanager
def _appearing(path: Path) -> Iterator[Path]:
    """A file beside the path that takes its place when it is written and on the disk."""
    path = path.resolve()  # a link stays one
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        temporary.touch()
        permissions = (path if path.exists() else temporary).stat().st_mode
        yield temporary
        temporary.chmod(permissions)  # safetensors has its own
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


_TORCH = "a PyTorch checkpoint", _read_torch, _write_torch
_FORMATS: dict[str, _Format] = {
    ".safetensors": ("safetensors", _read_safetensors, _write_safetensors),
    ".pth": _TORCH,
    ".pt": _TORCH,
    ".msgpack": ("Flax's msgpack", _read_msgpack, _write_msgpack),
    "": ("an orbax checkpoint", _read_orbax, write_orbax),
}
