"""The benchmarks run, on tiny inputs, and contenders agree. Nothing is said about time."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import typer

from tests.benchmarks import __main__ as benchmarks
from tests.benchmarks import device
from tests.benchmarks.cases import BACKWARD, CENTRED, COLD, STATES, STEADY, Case, around, inputs
from tests.benchmarks.device import exactness, layers, report
from tests.benchmarks.device.clock import Budget, Queue
from tests.benchmarks.device.plan import Plan

KINDS = {"op", "network", "memory", "policies", "banks", "compile", "numerics"}
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
    assert {row["state"] for row in rows} == set(STATES)


def test_a_layer_keeps_less_than_flax(run):
    kept = {(row["contender"], row["dtype"]): row["bytes"] for row in run["memory"]["layer"]}
    assert kept["bnjax", "float32"] < kept["flax.linen", "float32"]
    assert kept["bnjax", "bfloat16"] < kept["flax.linen", "bfloat16"] / 2


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("data", [inputs, lambda case: around(case, 1e3)], ids=["inputs", "around"])
def test_steady_statistics_are_near_those_of_the_batch_and_cold_ones_are_not(data, state):
    given = data(Case((6, 4, 3, 3), 1, state=state))
    x, axes = given.x.astype("float32"), (0, 2, 3)
    apart = jnp.max(jnp.abs(given.values.mean - jnp.mean(x, axes)))
    assert apart > 0.5 if state == COLD else apart < 0.0501
    assert jnp.allclose(given.values.var, jnp.var(x, axes), rtol=1e-3)


def test_channels_have_means_of_their_own_unless_they_are_centred():
    means = {state: jnp.mean(inputs(Case((64, 50), state=state)).x, 0) for state in STATES}
    assert jnp.array_equal(means[STEADY], means[COLD])
    assert jnp.std(means[STEADY]) > 0.7
    assert jnp.std(means[CENTRED]) < 0.3


def test_each_number_is_another_batch_of_the_same_channels():
    one, other = (inputs(Case((500, 3)), number).x for number in (0, 1))
    assert not jnp.any(one == other)
    assert jnp.allclose(jnp.mean(one, 0), jnp.mean(other, 0), atol=0.3)


def test_results_on_the_device_are_compared_to_float64():
    rows = exactness.measure(quick=True)
    assert {row["dtype"] for row in rows} == {"float32", "bfloat16"}
    assert exactness.faults(rows) == []


def test_a_wrong_result_on_the_device_is_named():
    def doubled(*arguments):
        y, moved = exactness.LAYERS["bnjax"](*arguments)
        return y, (moved[0], 2 * moved[1])

    rows = exactness.measure(quick=True, layers={**exactness.LAYERS, "bnjax": doubled})
    assert [row["wrong"] for row in rows] == [["var"], ["var"]]
    assert exactness.faults(rows)[0].startswith("NHWC 8x4x4x8 steady, float32, mean 10: var is off")


def test_a_wrong_result_on_the_device_is_said_loudly_and_is_the_exit_code(monkeypatch, capsys):
    monkeypatch.setattr(device, "measure", lambda options: {"wrong": ["y is off"]})
    monkeypatch.setattr(device, "tables", lambda data: ["a table"])
    with pytest.raises(typer.Exit) as exit:
        benchmarks.main([benchmarks.Kind.device], quick=True)
    assert exit.value.exit_code == 1
    assert "a table\n" in (said := capsys.readouterr().out)
    assert "WRONG: y is off\n" in said


def test_a_run_without_a_choice_leaves_the_device_out_on_a_cpu():
    assert set(benchmarks.everything()) == set(benchmarks.Kind) - {benchmarks.Kind.device}


def test_a_layer_on_the_device_is_measured_in_a_row():
    row = layers.row(Case((4, 8)), BACKWARD, Plan("tiny", footprint=0), Queue(1, 0.0))
    assert row["arrays"] == 2
    assert row["differ"] == row["failed"] == {}
    assert {"bnjax", "flax.linen"} <= row["microseconds"].keys()
    copy = {"bytes/s": 1.0, "cache": 10}
    setting = {"device": "a device", "versions": ["jax"], "sizes": "tiny", "copy": copy}
    text = report.markdown({**setting, "layers": [row], "network": []})
    assert text.startswith("a device, jax; sizes: tiny; ")
    assert f"| 1d 4x8 | float32 |  |  | {row['microseconds']['bnjax']:.1f} (" in text


def test_steps_in_a_row_are_each_a_step():
    from tests.benchmarks.contenders import available
    from tests.benchmarks.steps import step

    apply, case = available(True)["bnjax"], Case((4, 8))
    given = [inputs(case, number) for number in range(3)]
    found = jax.jit(layers.in_a_row(apply, case, BACKWARD))(given)
    for one, result in zip(given, found, strict=True):
        expected = jax.jit(step(apply, case, BACKWARD))(*one)
        assert jax.tree.all(jax.tree.map(jnp.allclose, result, expected))


def test_what_there_is_no_time_for_is_skipped_and_named():
    budget = Budget(0)
    assert list(budget.within(["a", "b"], str.upper)) == []
    assert budget.skipped == ["A", "B"]
    budget = Budget(1000)
    assert list(budget.within(["a", "b"], str.upper)) == ["a", "b"]
    assert budget.skipped == []
