"""Imports go downward, and `import bnjax` is light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import bnjax

TOOLS = {"training", "recalibration", "folding", "conversion", "files", "inspection", "diagnosis"}
FLOORS = (
    {"_checks", "_globs", "_sharding", "_subtypes", "_words"},
    {"sums"},
    {"moments"},
    {"pooling", "virtual_batches"},
    {"functional", "batches"},
    {"linen", "nnx"},
    {"overrides", "masks"},
    {"accumulation", "bridge", "plotting", "tensors"},
    TOOLS,
    {"cli"},
    {"__main__"},
)
RANK = {room: rank for rank, rooms in enumerate(FLOORS) for room in rooms}
PACKAGE = Path(bnjax.__file__).parent
FILES = {str(path.relative_to(PACKAGE)): path for path in sorted(PACKAGE.rglob("*.py"))}
HEAVY = ("torch", "matplotlib", "safetensors", "sklearn", "typer", "orbax")


def room(path: str) -> str:
    """The room of a file, also where it has become a package."""
    return Path(path).parts[0].removesuffix(".py")


def imported(source: str) -> set[str]:
    """The rooms of bnjax that a file imports, at its top or inside a function."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"line {node.lineno}: write imports from bnjax in full"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.split(".")[1] for name in names if name.startswith("bnjax.")}


def upward(path: str, source: str) -> set[str]:
    """The imports of a file that do not go down."""
    below = {other for other in RANK if RANK[other] < RANK[room(path)]}
    return imported(source) - below - {room(path)}


@pytest.mark.parametrize("path", [path for path in FILES if path != "__init__.py"])
def test_imports_go_downward_and_nothing_goes_sideways(path):
    assert room(path) in RANK, f"give {room(path)} its place in FLOORS"
    assert upward(path, FILES[path].read_text()) == set()


@pytest.mark.parametrize(
    ("path", "source", "expected"),
    [
        ("moments.py", "from bnjax import _checks", set()),
        ("moments.py", "from bnjax.functional import init", {"functional"}),
        ("folding.py", "def f():\n    import bnjax.files", {"files"}),
        ("linen.py", "from bnjax import nnx, moments", {"nnx"}),
        ("diagnosis/report.py", "from bnjax.diagnosis import checks", set()),
        ("files.py", "import jax.numpy as jnp\nfrom bnjax.linen import BatchNorm", set()),
    ],
)
def test_an_import_upward_or_sideways_is_seen(path, source, expected):
    assert upward(path, source) == expected


def test_importing_bnjax_imports_nothing_heavy():
    script = f"import sys, bnjax; print([m for m in {HEAVY} if m in sys.modules])"
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120
    )
    assert run.stdout.strip() == "[]"
