"""Imports go downward, the core knows arrays alone, and `import bnjax` is light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import bnjax

# A room imports from the floors above it in these lists, which are those below it in the house.
FLOORS = {
    "bnjax": (
        {"core", "globs", "plotting", "_files", "_names", "_tables", "_words"},
        {"layers", "masks"},
        {"models"},
        {"training", "checkpoints"},
        {"linen", "nnx", "diagnosis", "policies"},
        {"_public"},
        {"cli"},
        {"__main__"},
    ),
    "bnjax.core": (
        {"compat", "repairs"},
        {"checks"},
        {"moments", "sharding"},
        {"devices", "policies", "sums"},
        {"banks"},
        {"settings"},
        {"partition"},
        {"affine", "origins"},
        {"measuring", "running"},
        {"choosing"},
        {"batch_norm"},
    ),
    "bnjax.layers": (
        {"conventions", "modes"},
        {"arguments"},
        {"linen", "nnx"},
        {"conditional"},
    ),
    "bnjax.models": (
        {"checks", "compat", "conventions", "statistics", "variables"},
        {"batches", "contexts", "programs", "registered"},
        {"attributes", "banks", "frames"},
        {"visit"},
        {"visits"},
        {"accumulation", "freezing"},
        {"overrides"},
        {"nnx_copies"},
        {"saved"},
        {"recalibration", "folding", "diagnosis"},
    ),
    "bnjax.training": (
        {"checks", "scaling"},
        {"compiled", "gradients", "state"},
        {"attempts"},
        {"averaging", "history", "nnx_steps", "steps"},
        {"logging"},
    ),
    "bnjax.checkpoints": (
        {"contents", "tensors"},
        {"nested"},
        {"formats", "writable"},
        {"folders", "parts"},
        {"files", "inspection", "conversion"},
        {"frameworks"},
    ),
    "bnjax.checkpoints.formats": (
        {"needs", "pickles", "signatures"},
        {"msgpack", "orbax", "pytorch", "safetensors"},
        {"shards"},
    ),
}
CORE = {"jax", "chex", "numpy"}
PACKAGE = Path(bnjax.__file__).parent
FILES = {
    ".".join(("bnjax", *path.relative_to(PACKAGE).with_suffix("").parts)): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path != PACKAGE / "__init__.py"
}
TESTS = sorted(Path(__file__).parent.rglob("*.py"))
HEAVY = ("torch", "matplotlib", "safetensors", "sklearn", "typer", "orbax")


def imported(source: str) -> set[str]:
    """The modules and names that a file imports, at its top or inside a function."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"line {node.lineno}: write imports from bnjax in full"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def upward(module: str, source: str) -> set[str]:
    """The imports of a module that do not go down, in any of the rooms around it."""
    found = set()
    for room, floors in FLOORS.items():
        if not module.startswith(f"{room}."):
            continue
        rank = {name: number for number, names in enumerate(floors) for name in names}
        here = module.removeprefix(f"{room}.").split(".")[0]
        if here == "__init__":  # of a package: it shows what is inside
            continue
        assert here in rank, f"give {here} its place in {room}"
        for name in imported(source):
            if name.startswith(f"{room}."):
                there = name.removeprefix(f"{room}.").split(".")[0]
                if there != here and not rank.get(there, len(floors)) < rank[here]:
                    found.add(name)
    return found


@pytest.mark.parametrize("module", FILES)
def test_imports_go_downward_and_nothing_goes_sideways(module):
    assert upward(module, FILES[module].read_text()) == set()


@pytest.mark.parametrize(
    ("module", "source", "expected"),
    [
        ("bnjax.core.moments", "from bnjax.core import checks", set()),
        ("bnjax.core.moments", "from bnjax.layers.linen import x", {"bnjax.layers.linen.x"}),
        ("bnjax.core.sums", "from bnjax.core.origins import x", {"bnjax.core.origins.x"}),
        (
            "bnjax.models.folding",
            "def f():\n    import bnjax.training.steps",
            {"bnjax.training.steps"},
        ),
        ("bnjax.layers.linen", "from bnjax.layers import nnx", {"bnjax.layers.nnx"}),
        ("bnjax.models.diagnosis.report", "from bnjax.models.diagnosis import checks", set()),
        (
            "bnjax.models.folding.program",
            "from bnjax.models.diagnosis import diagnose",
            {"bnjax.models.diagnosis.diagnose"},
        ),
        ("bnjax.checkpoints.files", "import jax\nfrom bnjax.core.moments import merge", set()),
    ],
)
def test_an_import_upward_or_sideways_is_seen(module, source, expected):
    assert upward(module, source) == expected


@pytest.mark.parametrize("module", [name for name in FILES if name.startswith("bnjax.core.")])
def test_the_core_imports_jax_and_chex_alone(module):
    roots = {name.split(".")[0] for name in imported(FILES[module].read_text())}
    assert roots - set(sys.stdlib_module_names) - {"bnjax"} <= CORE
    inner = {name for name in imported(FILES[module].read_text()) if name.startswith("bnjax")}
    assert {".".join(name.split(".")[:2]) for name in inner} <= {"bnjax.core"}


def test_what_tests_share_is_in_support_and_no_file_imports_from_a_test_file():
    names = {(path.name, name) for path in TESTS for name in imported(path.read_text())}
    assert ("test_devices.py", "tests.support.oracle.assert_close") in names
    assert not {each for each in names if each[1].startswith("tests.test_")}


def test_importing_bnjax_imports_nothing_heavy():
    script = f"import sys, bnjax; print([m for m in {HEAVY} if m in sys.modules])"
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120
    )
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize("name", ["", "linen", "nnx", "training", "masks", "diagnosis"])
def test_a_public_module_shows_what_it_is_for_and_nothing_else(name):
    module = getattr(bnjax, name) if name else bnjax
    for public in module.__all__:
        assert public == "Step" or getattr(module, public).__doc__, f"{public} has no docstring"
    shown = {each for each in dir(module) if not each.startswith("_")}
    assert not name or shown >= set(module.__all__)
    assert name or dir(bnjax) == bnjax.__all__
