"""Damaged, foreign and malicious files are refused, with an error that says why."""

import argparse
import io
import json
import os
import pickle
import re
import struct
import tarfile
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bnjax
from tests.support import damaged
from tests.support.checkpoints import NEEDS, VARIABLES

pytestmark = pytest.mark.quick_compile


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"^There is no checkpoint at .*/no\.pth\.$"):
        bnjax.load(tmp_path / "no.pth")


# When one of several arrays can't be read, tensorstore drops the errors of the others.
@pytest.mark.filterwarnings("ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning")
@pytest.mark.parametrize("name", [*damaged.FORMATS, "pickles"])
def test_a_damaged_file_loads_or_is_an_error_that_names_it(tmp_path, name):
    pytest.importorskip(NEEDS[damaged.SUFFIXES[name]])
    found = damaged.outcomes(tmp_path, name, 240)
    assert found["refused"] > (50 if name == "orbax" else 100), found
    assert found["loaded"] > 5, found


class Runs:
    """An object that runs code when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


TRUSTED = "load it with torch and save only its `state_dict()`."


@pytest.mark.parametrize("archived", [True, False])
def test_a_pickle_that_would_run_code_is_refused(tmp_path, archived):
    torch = pytest.importorskip("torch")
    path, target = tmp_path / "evil.pth", tmp_path / "target"
    torch.save({"a": Runs(target)}, path, _use_new_zipfile_serialization=archived)
    held = "builtins.getattr, pathlib.Path, pathlib.PosixPath" if archived else "getattr"
    message = (
        f"Cannot read {path} as a PyTorch checkpoint: besides tensors and plain containers it "
        f"holds {held}, and unpickling that could run code.\nIf you trust it, {TRUSTED}"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        bnjax.load(path)
    assert not target.exists()


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_pickle_not_by_torch_is_refused_with_the_names_it_calls(tmp_path, protocol):
    pytest.importorskip("torch")
    path, target = tmp_path / "evil.pkl", tmp_path / "target"
    path.write_bytes(pickle.dumps({"a": Runs(target), "b": "text"}, protocol=protocol))
    held = {2: "__builtin__.getattr, pathlib.Path", 4: "pathlib.Path.touch"}[protocol]
    message = (
        f"Cannot read {path} as a PyTorch checkpoint: it is a pickle that `torch.save` did not "
        f"write (it calls {held}, pathlib.PosixPath), or damaged at its start, and unpickling it "
        "could run code.\nIf you trust it, load it with pickle and save its arrays with "
        "`bnjax.save`."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        bnjax.load(path)
    assert not target.exists()


class Blocked:
    def __reduce__(self):
        return os.system, ("true",)


@pytest.mark.parametrize(
    ("held", "names"),
    [
        (argparse.Namespace(lr=0.1), ["argparse.Namespace"]),
        (np.float64(0.9), ["numpy._core.multiarray.scalar", "numpy.dtype"]),
        (Blocked(), ["posix.system"]),
    ],
)
def test_a_refused_pickle_by_torch_says_how_to_allow_it(tmp_path, held, names):
    torch = pytest.importorskip("torch")
    path = tmp_path / "best.pth"
    torch.save({"model": {"w": torch.ones(2)}, "other": held}, path)
    listed = ", ".join(names)
    allow = f"first allow it with `torch.serialization.add_safe_globals([{listed}])`,\nor "
    message = (
        f"Cannot read {path} as a PyTorch checkpoint: besides tensors and plain containers it "
        f"holds {', '.join(names)}, and unpickling that could run code.\nIf you trust it, "
        f"{'' if 'posix.system' in names else allow}{TRUSTED}"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        bnjax.load(path)


def test_a_pickled_module_is_refused_and_allowed_classes_load(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"model": torch.nn.Sequential(torch.nn.Linear(1, 1))}, tmp_path / "module.pth")
    held = "torch.nn.modules.container.Sequential, torch.nn.modules.linear.Linear"
    with pytest.raises(ValueError, match=re.escape(f"it holds {held}, and unpickling that")):
        bnjax.load(tmp_path / "module.pth")
    torch.save({"args": argparse.Namespace(lr=0.1), "w": torch.ones(2)}, tmp_path / "args.pth")
    with torch.serialization.safe_globals([argparse.Namespace]):
        loaded = bnjax.load(tmp_path / "args.pth")
    assert loaded["args"] == argparse.Namespace(lr=0.1)
    np.testing.assert_array_equal(loaded["w"], np.ones(2, np.float32))


def test_torchscript_is_refused_by_name(tmp_path):
    torch = pytest.importorskip("torch")
    path = tmp_path / "traced.pt"
    with warnings.catch_warnings(action="ignore"):  # torch.jit is deprecated
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)
    message = (
        f"Cannot read {path} as a PyTorch checkpoint: it is a TorchScript archive, which is code "
        "with its weights. Load it with `torch.jit.load` and save its `state_dict()` with "
        "`torch.save`."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        bnjax.load(path)


def test_the_oldest_pytorch_format_is_refused_by_name(tmp_path):
    path = tmp_path / "resnet18.pth"
    with tarfile.open(path, "w") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            member = tarfile.TarInfo(name)
            member.size = 3
            archive.addfile(member, io.BytesIO(b"abc"))
    message = (
        f"Cannot read {path} as a PyTorch checkpoint: it is in the tar format that `torch.save` "
        "wrote before PyTorch 0.1.10, which can't be read without running code. If you trust it, "
        "load it with `torch.load(path, weights_only=False)` and save its `state_dict()`."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        bnjax.load(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.pth", b"", "a checkpoint: it is empty. Copy or download it again."),
        (
            "a.h5",
            b"\x89HDF\r\n\x1a\n" + bytes(99),
            "a checkpoint: it is an HDF5 file, as Keras writes it. Load it with Keras or h5py.",
        ),
        (
            "a.safetensors",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 1\n",
            "a checkpoint: it is a Git LFS pointer, not the file itself: run `git lfs pull`.",
        ),
        (
            "a.pth",
            b"\n<!DOCTYPE html><html></html>",
            "a checkpoint: it is a web page or XML. Did the link lead to a page about the file? "
            "Download it again.",
        ),
        (
            "a.xyz",
            b"something",
            "a checkpoint: it is in no known format, or damaged.",
        ),
        (
            "a.pth",
            b"PK\x03\x04 and no more",
            "a PyTorch checkpoint: the end of its archive is missing. Copy or download it again.",
        ),
    ],
)
def test_other_files_are_refused_by_kind(tmp_path, name, content, message):
    if "PyTorch" in message:
        pytest.importorskip("torch")
    (tmp_path / name).write_bytes(content)
    message = f"Cannot read {tmp_path / name} as {message}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        bnjax.load(tmp_path / name)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a.npy", "b.npy"], "it is a NumPy .npz archive. Load it with `numpy.load`."),
        (
            ["config.json", "model.weights.h5"],
            "it is a Keras archive. Load it with Keras and save its arrays.",
        ),
        (
            ["readme.txt"],
            "it is a zip archive of other files, such as ['readme.txt']. Unpack it first.",
        ),
    ],
)
def test_other_archives_are_refused_by_kind(tmp_path, names, message):
    with zipfile.ZipFile(tmp_path / "a.pth", "w") as archive:
        for name in names:
            archive.writestr(name, b"abc")
    message = f"Cannot read {tmp_path / 'a.pth'} as a PyTorch checkpoint: {message}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        bnjax.load(tmp_path / "a.pth")


def test_a_compressed_archive_is_refused(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"w": torch.zeros(1000)}, tmp_path / "model.pth")
    with (
        zipfile.ZipFile(tmp_path / "model.pth") as archive,
        zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for name in archive.namelist():
            bomb.writestr(name, archive.read(name))
    message = "its parts are larger than the file, which `torch.save` never writes."
    with pytest.raises(ValueError, match=f"{re.escape(message)}$"):
        bnjax.load(tmp_path / "bomb.pth")


def test_exponentially_repeated_containers_are_refused(tmp_path):
    torch = pytest.importorskip("torch")
    tree: Any = [1]
    for _ in range(30):
        tree = [tree, tree]
    torch.save({"tree": tree}, tmp_path / "bomb.pth")
    message = "its containers repeat more often than the file has bytes."
    with pytest.raises(ValueError, match=f"{re.escape(message)}$"):
        bnjax.load(tmp_path / "bomb.pth")


def test_a_flipped_bit_in_a_pytorch_file_is_detected(tmp_path):
    torch = pytest.importorskip("torch")
    path = tmp_path / "model.pth"
    torch.save({"w": torch.zeros(1000)}, path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"the checksum of its part .*/data/0 is wrong\. Copy it"):
        bnjax.load(path)


def test_a_tensor_larger_than_its_file_is_refused(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"w": [torch.zeros(1).expand(10**13)]}, tmp_path / "bomb.pth")
    with pytest.raises(ValueError, match=r"a tensor of shape \(10000000000000,\) is larger than"):
        bnjax.load(tmp_path / "bomb.pth")


def safetensors_of(*names: str) -> bytes:
    """The content of a valid file with an empty array under each name."""
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    header = json.dumps({name: entry for name in names}).encode()
    return struct.pack("<Q", len(header)) + header


@pytest.mark.parametrize("name", ["../../evil", "/etc/evil", "a//b", "a/./b", ".."])
def test_a_name_with_an_unsafe_path_is_refused(tmp_path, name):
    pytest.importorskip("safetensors")
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors_of(name))
    message = f"Cannot read {path} as safetensors: the name {name!r} is not a valid path."
    with pytest.raises(ValueError, match=re.escape(message)):
        bnjax.load(path)
    from flax.serialization import msgpack_serialize

    path = tmp_path / "model.msgpack"
    path.write_bytes(msgpack_serialize({"params": {name: np.ones(1)}}))
    with pytest.raises(ValueError, match=r"the name .* in params is not a valid path"):
        bnjax.load(path)


@pytest.mark.parametrize("names", [("a", "a/b"), ("a/b", "a")])
def test_a_name_below_an_array_is_refused(tmp_path, names):
    pytest.importorskip("safetensors")
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors_of(*names))
    with pytest.raises(ValueError, match=f"^Cannot read {re.escape(str(path))} as safetensors: "):
        bnjax.load(path)


def test_a_folder_of_several_checkpoints_is_an_error_that_lists_them(tmp_path):
    for name in ("a", "b"):
        bnjax.save(tmp_path / "run" / name / "model", VARIABLES)
    message = (
        f"Cannot read {tmp_path / 'run'} as a checkpoint: the folder is not a checkpoint itself. "
        f"It holds {tmp_path / 'run' / 'a'}, {tmp_path / 'run' / 'b'}."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)} Formats are "):
        bnjax.load(tmp_path / "run")


def test_a_checkpoint_that_is_not_a_tree_is_an_error(tmp_path):
    from flax.serialization import msgpack_serialize

    (tmp_path / "model.msgpack").write_bytes(msgpack_serialize(np.ones(2)))
    with pytest.raises(ValueError, match="it must hold a dict of arrays by name, got ndarray"):
        bnjax.load(tmp_path / "model.msgpack")


def test_special_files_and_denied_permissions_are_errors(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    message = f"Cannot read {tmp_path / 'pipe'} as a checkpoint: it is neither a file nor a folder."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        bnjax.load(tmp_path / "pipe")

    def refused(*_, **__):
        raise PermissionError("not for you")

    bnjax.save(tmp_path / "m.msgpack", {"w": np.ones(2)})
    monkeypatch.setattr(Path, "read_bytes", refused)
    with pytest.raises(PermissionError, match=r"^not for you$"):
        bnjax.load(tmp_path / "m.msgpack")
