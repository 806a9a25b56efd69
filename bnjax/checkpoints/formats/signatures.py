"""Identify a file by its first bytes; suffixes such as `.bin` and `.pt` are ambiguous."""

from pathlib import Path

_HEAD = 512
_ZIP, _TAR = b"PK", b"ustar"
_STRINGS = {*range(0xA0, 0xC0), 0xD9, 0xDA, 0xDB}  # the first byte of a string in msgpack
_LONGEST_HEADER = 100_000_000  # of safetensors
# Other files that people mistake for checkpoints: first bytes, kind, and what to do.
_OTHERS = (
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file, as Keras writes it. Load it with Keras or h5py"),
    (b"\x93NUMPY", "a single NumPy array. Load it with `numpy.load`"),
    (b"GGUF", "a GGUF file. Load it with the gguf package"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself: run `git lfs pull`"),
    (b"<", "a web page or XML. Did the link lead to a page about the file? Download it again"),
    (b"\x1f\x8b", "compressed with gzip. Unpack it first"),
    (b"BZh", "compressed with bzip2. Unpack it first"),
    (b"\xfd7zXZ\x00", "compressed with xz. Unpack it first"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd. Unpack it first"),
)


def signature(path: Path) -> str | None:
    """The readable format that a file's first bytes indicate; None for any other."""
    head = _head(path)
    if _is_safetensors(head):  # first, because its leading length may look like another format
        return "safetensors"
    if head.startswith(_ZIP) or head[257:262] == _TAR or _is_pickle(head):
        return "pytorch"
    if _is_msgpack(head):
        return "msgpack"
    return "shards" if _is_index(path, head) else None


def is_zip(path: Path) -> bool:
    """Whether a file begins like a zip archive, complete or not."""
    return _head(path).startswith(_ZIP)


def foreign(path: Path) -> str | None:
    """What a file is that can't be read, and what to do about it; None if unknown."""
    head = _head(path).lstrip(b"\r\n ")
    if not path.stat().st_size:
        return "empty. Copy or download it again"
    return next((text for start, text in _OTHERS if head.startswith(start)), None)


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(_HEAD)


def _is_pickle(head: bytes) -> bool:
    return head[:1] == b"\x80" and head[1:2] in (b"\2", b"\3", b"\4", b"\5")


def _is_safetensors(head: bytes) -> bool:
    length = int.from_bytes(head[:8], "little")
    return head[8:9] == b"{" and 2 <= length <= _LONGEST_HEADER


def _is_msgpack(head: bytes) -> bool:
    """Whether it is a dict whose first key is a string, or an empty one."""
    first = head[0] if head else 0
    if first == 0x80:
        return head == b"\x80"
    skipped = 1 if 0x81 <= first <= 0x8F else {0xDE: 3, 0xDF: 5}.get(first)
    return skipped is not None and len(head) > skipped and head[skipped] in _STRINGS


def _is_index(path: Path, head: bytes) -> bool:
    return path.suffix == ".json" and head.lstrip()[:1] == b"{" and b'"weight_map"' in _all(path)


def _all(path: Path) -> bytes:
    return path.read_bytes() if path.stat().st_size < _LONGEST_HEADER else b""
