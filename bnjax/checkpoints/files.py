"""Read and write checkpoints safely: load, save."""

import os
from pathlib import Path
from typing import Any

from bnjax._files import folder_of
from bnjax.checkpoints.contents import UNWANTED, ContentError, Only, as_dicts, part_of
from bnjax.checkpoints.folders import found_in
from bnjax.checkpoints.formats import WRITTEN, format_of, format_to_write
from bnjax.checkpoints.tensors import as_numpy


def load(
    path: str | Path, *, like: Any = None, only: Only | None = None, key: str | None = None
) -> Any:
    """Load the arrays of a checkpoint.

    The format is detected from the content, not the name: safetensors; files by `torch.save`
    (`.pth`, `.pt`, `.bin`, `.ckpt`, `.pth.tar`), which need torch and are read with
    `torch.load(weights_only=True)`; Flax's msgpack; orbax folders; and Hugging Face's sharded files
    with an index. Nothing is written, and no code from the file runs.

    Guide: examples/guides/checkpoints.md

    Args:
        path: the file or folder. A folder may also contain a single checkpoint, the steps of one
            run (the newest is loaded), or a Hugging Face model.
        like: a tree like the one that was saved, with any values, such as a new `TrainState` or
            nnx's `(model, optimizer)`: sets the structure, dtypes and shardings. Arrays may be
            `jax.ShapeDtypeStruct`. It is not changed.
        only: whether to load an array, by its name ("/" between nested names) and shape; from a
            safetensors file, the others are not even read.
        key: the part to load, such as "state_dict_ema" or "model/ema"; `only` gets the names inside
            it.

    Returns:
        A tree like `like`. Without it, a dict of NumPy arrays: a PyTorch state dict keeps its
        names, for `bnjax.from_torch`; nested trees (in a safetensors file: names with "/") stay
        nested, with sequences as dicts with the keys "0", "1" and so on. Random keys are loaded as
        their data. Anything that is not an array, such as a string, is kept.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, truncated, in another format, or would run code; there is
            no such `key`; or names, shapes or kinds of numbers differ from those of `like`.
        ModuleNotFoundError: its format needs a package that is not installed.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"There is no checkpoint at {path}.")
    what = "a checkpoint"
    try:
        path = _located(path)
        what, read, _ = format_of(path)
        wanted = _wanted(key, only)
        tree = as_dicts(read(path, wanted), lambda value, name: _plain(value, name, wanted))
        found = tree if key is None else part_of(tree, key)
        if like is None:
            return found
        from bnjax.checkpoints.nested import filled

        return filled(like, found)
    except (ModuleNotFoundError, PermissionError):
        raise
    except ContentError as error:
        raise ValueError(f"Cannot read {path} as {what}: {error}") from error
    except Exception as error:  # each library raises its own
        reason = (str(error).strip().splitlines() or [""])[0][:200]
        if not reason or isinstance(error, LookupError):
            reason = f"{type(error).__name__} {reason}".strip()
        raise ValueError(
            f"Cannot read {path} as {what}: it is truncated, damaged or another format ({reason}). "
            "Copy or download it again."
        ) from error


def save(path: str | Path, tree: Any) -> None:
    """Save a checkpoint atomically.

    If the process is killed during the save, an existing file at `path` stays as it was; a hidden
    `.tmp` may remain beside it.

    Guide: examples/guides/checkpoints.md

    Args:
        path: where to save. The suffix sets the format: .safetensors, .pth or .pt, .msgpack, or
            none for orbax. An existing file is replaced, a folder is not.
        tree: a state dict, linen variables, a `TrainState`, an nnx model, optimizer or state, or
            any tree of arrays, such as a dict or tuple of these. Random keys are saved as their
            data; functions and other static fields, as in a `TrainState`, are not saved.

    Raises:
        ValueError: the suffix is unknown, a leaf is not an array of numbers, an array is partly on
            another process, or a name or dtype would not survive the round trip.
        FileExistsError: the folder exists.
        FileNotFoundError: the folder to save in does not exist.
        TypeError: `path` is not a path.
        ModuleNotFoundError: the format needs a package that is not installed.

    >>> import tempfile, numpy as np
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(f"{folder}/model.msgpack", {"params": {"bias": np.arange(3)}})
    ...     load(f"{folder}/model.msgpack")
    {'params': {'bias': array([0, 1, 2])}}

    Restore a training state, with its optimizer and random keys, into a new one:

    >>> import bnjax, jax, optax
    >>> from bnjax.training import init_state
    >>> x = jax.numpy.ones((2, 3))
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
    suffix, form = format_to_write(path)
    if suffix:  # orbax creates parent folders
        folder_of(path)
    from bnjax.checkpoints.writable import writable

    form.write(path, writable(path, suffix, tree))


def _located(path: Path) -> Path:
    """The checkpoint that a path leads to."""
    try:
        return found_in(path)
    except ContentError as error:
        raise ContentError(f"{error} {WRITTEN}") from error


def _wanted(key: str | None, only: Only | None) -> Only:
    """Whether to load an array, by its name in the file."""
    start = "" if key is None else f"{key}/"

    def wanted(name: str, shape: tuple[int, ...]) -> bool:
        return name.startswith(start) and (only is None or only(name[len(start) :], shape))

    return wanted


def _plain(value: Any, name: str, wanted: Only) -> Any:
    """An array in NumPy, if it is wanted; anything else unchanged."""
    array = as_numpy(value)
    if array is None:
        return value
    return array if wanted(name, array.shape) else UNWANTED
