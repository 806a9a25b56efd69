"""Files by `torch.save`: zip archives, or pickles in old versions. Runs no code from them."""

import pickle
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bnjax._files import appearing
from bnjax.checkpoints.contents import ContentError, Only, as_dicts, plain
from bnjax.checkpoints.formats import pickles, signatures
from bnjax.checkpoints.formats.needs import needed
from bnjax.checkpoints.tensors import as_tensor


def is_saved(path: Path) -> bool:
    """Whether `torch.save` wrote a file, judging by its names or its first bytes."""
    if not signatures.is_zip(path):
        return pickles.is_by_torch(path)
    try:
        with zipfile.ZipFile(path) as archive:
            return _other_archive(archive.namelist()) is None
    except zipfile.BadZipFile:
        return False


def read(path: Path, _: Only) -> Any:
    """Everything that was saved, with tensors on the CPU."""
    _check_archive(path)
    torch = needed("torch", "torch")
    try:
        with path.open("rb") as file:  # given a path, torch would look at its suffix
            tree = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ContentError(pickles.refusal(torch, path, str(error))) from error
    _check_sizes(torch, tree, path.stat().st_size)
    return tree


def write(path: Path, tree: dict[str, Any]) -> None:
    """Save nested dicts of arrays as tensors."""
    torch = needed("torch", "torch")
    tensors = as_dicts(tree, lambda value, _: None if value is None else as_tensor(value))
    # A file object: given a path, torch would write its name into the file.
    with appearing(path) as temporary, temporary.open("wb") as file:
        torch.save(tensors, file)


def _check_archive(path: Path) -> None:
    """Refuse other archives, damaged ones, and those larger once unpacked."""
    if not zipfile.is_zipfile(path):
        if path.stat().st_size > 512 and tarfile.is_tarfile(path):
            raise ContentError(_tar(path))
        if signatures.is_zip(path):
            raise ContentError("the end of its archive is missing. Copy or download it again.")
        pickles.check_writer(path)
        return
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        if what := _other_archive(names):
            raise ContentError(what)
        if sum(each.file_size for each in archive.infolist()) > path.stat().st_size:
            raise ContentError(
                "its parts are larger than the file, which `torch.save` never writes."
            )
        if (damaged := archive.testzip()) is not None:
            raise ContentError(f"the checksum of its part {damaged} is wrong. Copy it again.")


def _other_archive(names: list[str]) -> str | None:
    inner = {name.partition("/")[2] for name in names}
    if "constants.pkl" in inner:
        return (
            "it is a TorchScript archive, which is code with its weights. Load it with "
            "`torch.jit.load` and save its `state_dict()` with `torch.save`."
        )
    if "data.pkl" in inner:
        return None
    if names and all(name.endswith(".npy") for name in names):
        return "it is a NumPy .npz archive. Load it with `numpy.load`."
    if "model.weights.h5" in names:
        return "it is a Keras archive. Load it with Keras and save its arrays."
    return f"it is a zip archive of other files, such as {names[:3]}. Unpack it first."


def _tar(path: Path) -> str:
    with tarfile.open(path) as archive:
        names = archive.getnames()[:9]
    if {"pickle", "storages", "tensors"} <= {*names}:
        return (
            "it is in the tar format that `torch.save` wrote before PyTorch 0.1.10, which can't be "
            "read without running code. If you trust it, load it with `torch.load(path, "
            "weights_only=False)` and save its `state_dict()`."
        )
    return f"it is a tar archive of other files, such as {names[:3]}. Unpack it first."


def _check_sizes(torch: Any, tree: Any, size: int) -> None:
    """Refuse anything larger in memory than in the file, such as a view that repeats a number."""
    copied = 0
    for number, value in enumerate(_leaves(tree)):
        if number > size:
            raise ContentError("its containers repeat more often than the file has bytes.")
        if not isinstance(value, torch.Tensor):
            continue
        bytes_ = value.numel() * value.element_size()
        copied += 0 if value.layout is not torch.strided or value.is_contiguous() else bytes_
        if bytes_ > size or copied > 2 * size:
            raise ContentError(f"a tensor of shape {tuple(value.shape)} is larger than the file.")


def _leaves(tree: Any) -> Iterator[Any]:
    """Each leaf and container, as often as it occurs."""
    yield tree
    node = plain(tree)
    for part in node.parts.values() if node else ():
        yield from _leaves(part)
