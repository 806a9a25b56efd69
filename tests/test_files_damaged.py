"""Files that are damaged, something else, or malicious: an error that says so, and no harm."""

import json
import pickle
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bnjax
from tests.support.checkpoints import NEEDS, STATE_DICT, VARIABLES

pytestmark = pytest.mark.quick_compile


def test_a_file_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"^There is no checkpoint at .*/no\.pth\.$"):
        bnjax.load(tmp_path / "no.pth")


def mutations(content: bytes, number: int) -> Any:
    """Truncated, flipped, overwritten, foreign and shifted versions of a file."""
    rng = np.random.default_rng(0)
    for kind in range(number):
        changed = bytearray(content)
        place = rng.integers(len(content) + 1) if content else 0
        junk = rng.bytes(int(rng.integers(1, 48)))
        if kind % 5 == 0:
            changed = changed[:place]
        elif kind % 5 == 1 and place < len(content):
            changed[place] ^= 1 << rng.integers(8)
        elif kind % 5 == 2:
            changed[: len(junk)] = junk
        elif kind % 5 == 3:
            changed = bytearray(junk)
        else:
            changed[place:place] = junk
        yield bytes(changed)


# When one array of several can't be read, tensorstore drops what it had to say of the others.
@pytest.mark.filterwarnings("ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning")
@pytest.mark.parametrize("suffix", NEEDS)
def test_a_damaged_file_gives_arrays_or_an_error_that_names_it(tmp_path, suffix):
    pytest.importorskip(NEEDS[suffix])
    path = tmp_path / f"model{suffix}"
    bnjax.save(path, STATE_DICT if path.suffix else VARIABLES)
    parts = [path] if path.suffix else [part for part in path.rglob("*") if part.is_file()]
    outcomes = {"loaded": 0, "refused": 0}
    for part in parts:
        content = part.read_bytes()
        for changed in mutations(content, 200 // len(parts)):
            part.write_bytes(changed)
            there = sorted(path.parent.rglob("*"))
            try:
                outcome = bnjax.load(path)
            except ValueError as error:
                outcome = str(error)
            if isinstance(outcome, str):
                assert outcome.startswith(f"Cannot read {path} as ")
            outcomes["refused" if isinstance(outcome, str) else "loaded"] += 1
            assert sorted(path.parent.rglob("*")) == there
        part.write_bytes(content)
    assert outcomes["refused"] > 20, outcomes


class Runs:
    """What runs code when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning")
@pytest.mark.parametrize("archived", [True, False])
def test_a_pickle_that_would_run_code_is_refused(tmp_path, archived):
    torch = pytest.importorskip("torch")
    path, target = tmp_path / "evil.pth", tmp_path / "target"
    if archived:
        torch.save({"a": Runs(target)}, path)
    else:
        path.write_bytes(pickle.dumps({"a": Runs(target)}))
    message = (
        f"Cannot read {path} as a PyTorch checkpoint: it is damaged, or holds more than tensors "
        "and plain containers, and to unpickle that could run code. Where you trust it, load it "
        "with torch and save its `state_dict()` alone."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        bnjax.load(path)
    assert not target.exists()


def test_a_flipped_bit_in_a_pytorch_file_is_noticed(tmp_path):
    torch = pytest.importorskip("torch")
    path = tmp_path / "model.pth"
    torch.save({"w": torch.zeros(1000)}, path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"the checksum of its part .*/data/0 is wrong\. Copy it"):
        bnjax.load(path)


def test_a_tensor_that_is_larger_than_its_file_is_refused(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"w": [torch.zeros(1).expand(10**13)]}, tmp_path / "bomb.pth")
    with pytest.raises(ValueError, match=r"a tensor of shape \(10000000000000,\) is larger than"):
        bnjax.load(tmp_path / "bomb.pth")


def safetensors_of(*names: str) -> bytes:
    """A valid file with an empty array under each name."""
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    header = json.dumps({name: entry for name in names}).encode()
    return struct.pack("<Q", len(header)) + header


@pytest.mark.parametrize("name", ["../../evil", "/etc/evil", "a//b", "a/./b", ".."])
def test_a_name_that_is_a_path_elsewhere_is_refused(tmp_path, name):
    pytest.importorskip("safetensors")
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors_of(name))
    message = f"Cannot read {path} as safetensors: it has the name {name!r}, and a name is no such "
    with pytest.raises(ValueError, match=re.escape(message)):
        bnjax.load(path)
    from flax.serialization import msgpack_serialize

    path = tmp_path / "model.msgpack"
    path.write_bytes(msgpack_serialize({"params": {name: np.ones(1)}}))
    with pytest.raises(ValueError, match=r"it has the name .* in params, and a name is no such"):
        bnjax.load(path)


@pytest.mark.parametrize("names", [("a", "a/b"), ("a/b", "a")])
def test_a_name_below_an_array_is_refused(tmp_path, names):
    pytest.importorskip("safetensors")
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors_of(*names))
    with pytest.raises(ValueError, match=f"^Cannot read {re.escape(str(path))} as safetensors: "):
        bnjax.load(path)


def test_a_folder_of_checkpoints_names_those_inside(tmp_path):
    for name in ("a", "b"):
        bnjax.save(tmp_path / "run" / name / "model", VARIABLES)
    message = (
        f"Cannot read {tmp_path / 'run'} as a checkpoint: the folder itself is no checkpoint. "
        f"These are some: {tmp_path / 'run' / 'a'}, {tmp_path / 'run' / 'b'}."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)} Formats are "):
        bnjax.load(tmp_path / "run")


def test_another_suffix_or_contents_are_an_error(tmp_path):
    (tmp_path / "model.bin").touch()
    with pytest.raises(ValueError, match=r"^The suffix of .*model\.bin says of no format"):
        bnjax.load(tmp_path / "model.bin")
    from flax.serialization import msgpack_serialize

    (tmp_path / "model.msgpack").write_bytes(msgpack_serialize(np.ones(2)))
    with pytest.raises(ValueError, match="it holds a ndarray where a dict of names and arrays is"):
        bnjax.load(tmp_path / "model.msgpack")
