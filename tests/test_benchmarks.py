"""The benchmark runs, on tiny inputs, and its contenders agree. Nothing is said about time."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

KINDS = {"op", "network", "memory", "compile", "numerics"}
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """What one quick run of everything wrote."""
    folder = tmp_path_factory.mktemp("benchmarks")
    files = "--json", folder / "run.json", "--picture", folder / "run.png"
    kinds = (f"--only={kind}" for kind in KINDS)  # compiled programs have a test of their own
    subprocess.run(
        [sys.executable, "-m", "tests.benchmarks", "--quick", *kinds, *files],
        cwd=ROOT,
        check=True,
        capture_output=True,
        timeout=300,
        env=os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"},
    )
    assert (folder / "run.png").stat().st_size > 0
    return json.loads((folder / "run.json").read_text())


def test_every_kind_is_measured(run):
    assert KINDS <= run.keys()


def test_no_contender_is_left_out_for_its_results(run):
    rows = run["op"]["rows"]
    assert rows
    assert all(row["differ"] == {} for row in rows)
    assert all({"bnjax", "flax.linen", "floor"} <= row["milliseconds"].keys() for row in rows)


def test_a_layer_keeps_less_than_flax(run):
    kept = {(row["contender"], row["dtype"]): row["bytes"] for row in run["memory"]["layer"]}
    assert kept["bnjax", "float32"] < kept["flax.linen", "float32"]
    assert kept["bnjax", "bfloat16"] < kept["flax.linen", "bfloat16"] / 2
