"""Flax's msgpack, which holds nested dicts."""

from pathlib import Path
from typing import Any

from bnjax._files import appearing
from bnjax.checkpoints.contents import Only


def read(path: Path, _: Only) -> Any:
    """Everything that was saved."""
    from flax import serialization

    return serialization.msgpack_restore(path.read_bytes())


def write(path: Path, tree: dict[str, Any]) -> None:
    """Save nested dicts of arrays."""
    from flax import serialization

    with appearing(path) as temporary:
        temporary.write_bytes(serialization.msgpack_serialize(tree))
