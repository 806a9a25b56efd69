"""Checkpoints on disk, read and written safely: load, save."""

import contextlib
import glob
import importlib
import os
import pickle
import shutil
import uuid
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, serialization, traverse_util
from flax.core import meta

from bnjax._files import folder_of
from bnjax.checkpoints.tensors import SHARED, as_numpy, as_tensor

_KNOWN = (
    "Formats are .safetensors, .pth and .pt (PyTorch), .msgpack (Flax), and a folder without a "
    "suffix (orbax)."
)

Only = Callable[[str, tuple[int, ...]], bool]
# The name of a format, and what reads and writes it.
_Format = tuple[str, Callable[[Path, Only], Any], Callable[[Path, dict[str, Any]], None]]


def load(path: str | Path, *, only: Only | None = None) -> dict[str, Any]:
    """The arrays of a checkpoint, whoever wrote it.

    The suffix says what it is: `.safetensors`; `.pth` or `.pt`, which needs torch and is read by
    `torch.load(weights_only=True)`; Flax's `.msgpack`; or a folder that orbax wrote. No code of the
    file is run and nothing is written.

    Args:
        path: the file or folder.
        only: whether an array is wanted, by its name ("/" between nested names) and shape; from a
            safetensors file the others are not even read.

    Returns:
        A dict of NumPy arrays. A state dict of PyTorch has its names, for `bnjax.from_torch`; what
        was nested (in a safetensors file: has "/" in its names) is nested, with sequences as dicts
        by "0", "1" and so on. What is no array, such as a string, stays as it is.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, truncated, something else, or would run code.
        ModuleNotFoundError: its format needs a package that is not installed.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"There is no checkpoint at {path}.")
    what, read, _ = _format(path, bare=path.is_dir())
    wanted: Only = only or (lambda name, shape: True)
    try:
        return _tree(read(path, wanted), lambda value, name: _plain(value, name, wanted))
    except ModuleNotFoundError:
        raise
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"Cannot read {path} as {what}: it is damaged, or holds more than tensors and plain "
            "containers, and to unpickle that could run code. Where you trust it, load it with "
            "torch and save its `state_dict()` alone."
        ) from error
    except _ContentError as error:
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

    Args:
        path: where it goes; the suffix chooses the format, as for `load`. A file there is replaced,
            a folder is not.
        tree: a state dict, linen variables, an `nnx.State`, or any nested dict of arrays.

    Raises:
        ValueError: an unknown suffix, a leaf that is no array of numbers, or a name or dtype that
            would not come back.
        FileExistsError: the folder is there.
        FileNotFoundError: there is no folder to save it in.
        TypeError: the path is no path.
        ModuleNotFoundError: the format needs a package that is not installed.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(f"{folder}/model.msgpack", {"params": {"bias": np.arange(3)}})
    ...     load(f"{folder}/model.msgpack")
    {'params': {'bias': array([0, 1, 2])}}
    """
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"`path` comes first, as in save(path, tree), got {type(path).__name__}.")
    path = Path(path)
    *_, write = _format(path, bare=True)
    if path.suffix:  # orbax makes its folders
        folder_of(path)
    wrong: list[str] = []
    foreign: list[str] = []

    def array(value: Any, name: str) -> Any:
        found = as_numpy(np.asarray(value) if isinstance(value, (bool, int, float)) else value)
        dtype = type(value).__name__ if found is None else found.dtype
        if found is None or not any(jnp.issubdtype(dtype, kind) for kind in (np.number, np.bool_)):
            wrong.append(f"{name} ({dtype})")
            return None
        found = found.astype(found.dtype.newbyteorder("="), copy=False)  # msgpack has no other
        if not _holds(path.suffix.lower(), found.dtype):
            foreign.append(f"{name} ({found.dtype})")
        return found

    try:
        tree = _tree(tree, array)
    except _ContentError as error:
        raise ValueError(f"Cannot save to {path}: {error}") from error
    if wrong:
        raise ValueError(
            f"Cannot save to {path}: a checkpoint holds arrays of numbers alone, but these are "
            f"none: {', '.join(wrong)}. Leave them out; random keys of nnx with "
            "`nnx.state(model, nnx.Not(nnx.RngState))`."
        )
    if foreign:
        raise ValueError(
            f"Cannot save to {path}: this format has no such numbers: {', '.join(foreign)}. "
            "Convert them, or save as .msgpack, which has all."
        )
    write(path, tree)


def _holds(suffix: str, dtype: np.dtype) -> bool:
    """Whether what is written in a format comes back in this dtype."""
    if suffix == ".msgpack":
        return True
    own = dtype.type.__module__ == "numpy"
    if suffix == ".safetensors":
        return dtype.name == "bfloat16" or (own and dtype != np.complex128)
    return dtype.name in SHARED or own


_UNWANTED = object()


class _ContentError(Exception):
    """What is wrong with the contents, in a sentence."""


def _tree(value: Any, leaf: Callable[[Any, str], Any]) -> dict[str, Any]:
    """Nested dicts with all leaves as `leaf(value, name)` gives them."""
    if isinstance(value, nnx.State):
        value = nnx.to_pure_dict(value)
    if not isinstance(value, Mapping):
        raise _ContentError(
            f"it holds a {type(value).__name__} where a dict of names and arrays is expected. Save "
            "the `state_dict()` or the variables of a model."
        )
    return _nested(value, leaf, "")


def _nested(value: Any, leaf: Callable[[Any, str], Any], name: str) -> Any:
    value = meta.unbox(value) if isinstance(value, meta.AxisMetadata) else value
    if isinstance(value, (list, tuple)):
        value = {str(number): item for number, item in enumerate(value)}
    if not isinstance(value, Mapping):
        return leaf(value, name)
    for key in value:
        if not isinstance(key, (str, int)) or set(str(key).split("/")) & {"", ".", ".."}:
            raise _ContentError(
                f"it has the name {key!r} in {name or 'it'}, and a name is no such path."
            )
    prefix = f"{name}/" if name else ""
    items = {str(key): _nested(item, leaf, f"{prefix}{key}") for key, item in value.items()}
    if len(items) < len(value):
        raise _ContentError(f"two names in {name or 'it'} differ by their type only.")
    return {key: item for key, item in items.items() if item is not _UNWANTED}


def _plain(value: Any, name: str, wanted: Only) -> Any:
    """An array as NumPy has it, if it is wanted; anything else as it is."""
    array = as_numpy(value)
    if array is None:
        return value
    return array if wanted(name, array.shape) else _UNWANTED


def _format(path: Path, *, bare: bool) -> _Format:
    """The row of a suffix, or of none where the path may be `bare`."""
    suffix = "" if path.is_dir() else path.suffix.lower()
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
                raise _ContentError(f"it has the name {name!r}, and a name is no such path.")
            node = tree
            for parent in parents:
                node = node.setdefault(parent, {})
            if not isinstance(node, dict) or last in node:
                raise _ContentError(f"{name!r} is below or above another array.")
            there = file.get_slice(name)
            if wanted(name, tuple(there.get_shape())):
                if there.get_dtype().startswith("F8_"):
                    raise _ContentError(
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
            raise _ContentError(f"a tensor of shape {tuple(value.shape)} is larger than the file.")

    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if (damaged := archive.testzip()) is not None:
                raise _ContentError(f"the checksum of its part {damaged} is wrong. Copy it again.")
    tree = torch.load(path, map_location="cpu", weights_only=True)
    _nested(tree, bounded, "")
    return tree


def _write_torch(path: Path, tree: dict[str, Any]) -> None:
    torch = _needed("torch", "torch")
    # A file object, as torch writes the name of a path into it.
    with _appearing(path) as temporary, temporary.open("wb") as file:
        torch.save(_nested(tree, lambda value, _: as_tensor(value), ""), file)


def _read_msgpack(path: Path, _: Only) -> Any:
    return serialization.msgpack_restore(path.read_bytes())


def _write_msgpack(path: Path, tree: dict[str, Any]) -> None:
    with _appearing(path) as temporary:
        temporary.write_bytes(serialization.msgpack_serialize(tree))


def _read_orbax(path: Path, _: Only) -> Any:
    if not (path / "_METADATA").is_file():
        inside = sorted(str(found.parent) for found in path.rglob("_METADATA"))
        there = f"These are some: {', '.join(inside)}." if inside else _KNOWN
        raise _ContentError(f"the folder itself is no checkpoint. {there}")
    import orbax.checkpoint as ocp

    as_array = ocp.RestoreArgs(restore_type=np.ndarray)
    with ocp.PyTreeCheckpointer() as checkpointer:
        found: Any = checkpointer.metadata(path.absolute())
        arguments = jax.tree.map(
            lambda leaf: as_array if hasattr(leaf, "shape") else ocp.RestoreArgs(),
            found.item_metadata.tree,
        )
        return checkpointer.restore(path.absolute(), restore_args=arguments)


def _write_orbax(path: Path, tree: dict[str, Any]) -> None:
    if path.exists():
        raise FileExistsError(
            f"There is a folder at {path}, and a folder can't be replaced in one moment. Choose "
            "another name, or remove it first."
        )
    written: dict[str, tuple[str, ...]] = {}
    for names in traverse_util.flatten_dict(tree):
        file = ".".join(names).replace("/", ".")
        if file in written:
            raise ValueError(
                f"Cannot save to {path}: orbax writes {written[file]} and {names} to the same "
                f"file, {file}. Rename one, or save as .msgpack."
            )
        written[file] = names
    import orbax.checkpoint as ocp

    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            checkpointer.save(path.absolute(), tree)
    except Exception:
        for unfinished in path.parent.glob(f"{glob.escape(path.name)}.orbax-checkpoint-tmp*"):
            shutil.rmtree(unfinished, ignore_errors=True)
        raise


@contextlib.contextmanager
def _appearing(path: Path) -> Iterator[Path]:
    """A file beside the path that takes its place when it is written and on the disk."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.touch()
        permissions = temporary.stat().st_mode
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
    "": ("an orbax checkpoint", _read_orbax, _write_orbax),
}
