"""Checkpoints on disk, read and written safely: load, save."""

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
    """The arrays of a checkpoint, whoever wrote it.

    The content says what it is, whatever the name: safetensors; what `torch.save` wrote (`.pth`,
    `.pt`, `.bin`, `.ckpt`, `.pth.tar`), which needs torch and is read by
    `torch.load(weights_only=True)`; Flax's msgpack; a folder that orbax wrote; or several files
    with an index, as Hugging Face has them. No code of a file is run and nothing is written.

    Guide: examples/guides/checkpoints.md

    Args:
        path: the file or folder; or a folder around the only checkpoint, or around the steps of a
            training, of which it is the newest, or with a model of Hugging Face.
        like: what was saved, with any values, such as a new `TrainState`, or `(model, optimizer)`
            of nnx: gives the structure, dtypes and shardings. `jax.ShapeDtypeStruct` will do for
            arrays. It is not touched.
        only: whether an array is wanted, by its name ("/" between nested names) and shape; from a
            safetensors file the others are not even read.
        key: the part to take, such as "state_dict_ema" or "model/ema"; `only` is given the names
            inside.

    Returns:
        A tree like `like`. Without it, a dict of NumPy arrays: a state dict of PyTorch has its
        names, for `bnjax.from_torch`; what was nested (in a safetensors file: has "/" in its names)
        is nested, with sequences as dicts by "0", "1" and so on. Random keys are their data. What
        is no array, such as a string, stays as it is.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, truncated, something else, or would run code; there is no
            such `key`; or names, shapes or kinds of numbers are not those of `like`.
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
    except Exception as error:  # Each library has its own.
        reason = (str(error).strip().splitlines() or [""])[0][:200]
        if not reason or isinstance(error, LookupError):
            reason = f"{type(error).__name__} {reason}".strip()
        raise ValueError(
            f"Cannot read {path} as {what}: it is truncated, damaged or something else ({reason}). "
            "Copy or download it again."
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

    >>> import tempfile, numpy as np
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(f"{folder}/model.msgpack", {"params": {"bias": np.arange(3)}})
    ...     load(f"{folder}/model.msgpack")
    {'params': {'bias': array([0, 1, 2])}}

    A training, with its optimizer and random keys, comes back into a state like it:

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
    if suffix:  # orbax makes its folders
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
    """Whether an array is wanted, by its name in the file."""
    start = "" if key is None else f"{key}/"

    def wanted(name: str, shape: tuple[int, ...]) -> bool:
        return name.startswith(start) and (only is None or only(name[len(start) :], shape))

    return wanted


def _plain(value: Any, name: str, wanted: Only) -> Any:
    """An array as NumPy has it, if it is wanted; anything else as it is."""
    array = as_numpy(value)
    if array is None:
        return value
    return array if wanted(name, array.shape) else UNWANTED
