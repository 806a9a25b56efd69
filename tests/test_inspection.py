"""`inspect` on unusual checkpoints: odd counters, frozen layers, negative and missing variances."""

import re
from typing import Any

import numpy as np
import pytest

import bnjax
from bnjax.checkpoints import inspection
from bnjax.checkpoints.inspection import inspect

pytest.importorskip("typer", reason="the command line is in the extra `tools`")

from tests.support.command_line import run

pytestmark = pytest.mark.quick_compile

ZEROS, ONES, TRAINED = np.zeros(4, "f"), np.ones(4, "f"), np.array([0.5, 1, 2, 3], "f")
NEVER = "the statistics were never updated: all means are 0 and all variances 1"


def layer(**changes: Any) -> dict[str, Any]:
    """A trained PyTorch batch norm; None leaves out an array."""
    held = {
        "weight": TRAINED,
        "bias": TRAINED,
        "running_mean": TRAINED,
        "running_var": TRAINED,
        "num_batches_tracked": np.array(70_000),
    } | changes
    return {f"bn.{name}": array for name, array in held.items() if array is not None}


@pytest.mark.parametrize(
    ("counter", "updates"),
    [
        (np.array(70_000.25), 70_000),
        (np.array(np.inf, "f2"), None),
        (np.array(np.nan, "f"), None),
        (np.array([7]), 7),
        (np.array(-np.inf), None),
        (np.ones(3), None),
        (None, None),
    ],
)
def test_counters_may_be_averaged_non_finite_or_missing(counter, updates):
    (row,) = inspect(layer(num_batches_tracked=counter))
    assert (row.updates, row.problems, row.notes) == (updates, (), ())


def test_counters_may_be_bfloat16(tmp_path):
    torch = pytest.importorskip("torch")
    tree = {k: torch.from_numpy(np.array(v)).bfloat16() for k, v in layer().items()}
    torch.save(tree, tmp_path / "m.pth")
    (row,) = inspect(bnjax.load(tmp_path / "m.pth"))
    assert (row.updates, row.problems) == (70_144, ())


FROZEN = (
    "the statistics are 0 and 1, but scale and bias are trained and no batches were counted. This "
    "is right for a frozen batch norm whose statistics are folded into scale and bias (the "
    "FrozenBatchNorm2d of a Caffe2 backbone), and wrong if the statistics were lost"
)


@pytest.mark.parametrize(
    ("changes", "problems", "notes"),
    [
        ({"num_batches_tracked": None}, (), (FROZEN,)),
        ({"num_batches_tracked": None, "bias": ZEROS}, (), (FROZEN,)),
        ({"num_batches_tracked": None, "weight": ONES}, (), (FROZEN,)),
        ({}, (NEVER,), ()),
        ({"num_batches_tracked": np.array(0)}, (NEVER,), ()),
        ({"num_batches_tracked": None, "weight": ONES, "bias": ZEROS}, (NEVER,), ()),
        ({"num_batches_tracked": None, "weight": None, "bias": None}, (NEVER,), ()),
    ],
)
def test_a_layer_frozen_by_design_gets_a_note_instead_of_a_problem(changes, problems, notes):
    (row,) = inspect(layer(running_mean=ZEROS, running_var=ONES, **changes))
    assert (row.problems, row.notes) == (problems, notes)


def test_initial_statistics_in_flax_may_be_frozen_or_lost():
    params = {"bn": {"scale": TRAINED, "bias": TRAINED}}
    tree = {"params": params, "batch_stats": {"bn": {"mean": ZEROS, "var": ONES}}}
    hint = ". Scale and bias are trained: were `batch_stats` lost, or is the layer frozen?"
    assert inspect(tree)[0].problems == (NEVER + hint,)


@pytest.mark.parametrize(("number", "names"), [(1, "0.bn"), (2, "0.bn and 1 other")])
def test_frozen_layers_share_one_note_and_are_no_problem(tmp_path, number, names):
    frozen = layer(running_mean=ZEROS, running_var=ONES, num_batches_tracked=None)
    tree = {f"{i}.{name}": array for i in range(number) for name, array in frozen.items()}
    bnjax.save(tmp_path / "m.safetensors", tree)
    code, output = run("inspect", tmp_path / "m.safetensors")
    assert code == 0
    assert f"note: {names}: {FROZEN}\n" in output
    assert "verdict: fine" in output


@pytest.mark.parametrize(
    ("lowest", "problem"),
    [
        (
            -5e-6,
            "2 running variances are negative, down to -5e-06, as if an eps was subtracted at "
            "loading: add it back, or clip at 0",
        ),
        (-0.5, "2 running variances are negative"),
    ],
)
def test_negative_variances_are_reported_with_the_repair(lowest, problem):
    (row,) = inspect(layer(running_var=np.array([lowest, lowest / 2, 1, 2], "f")))
    assert row.problems == (problem,)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"running_var": None}, "the running variance is missing"),
        ({"running_mean": None}, "the running mean is missing"),
    ],
)
def test_a_missing_statistic_is_reported(changes, problem):
    (row,) = inspect(layer(**changes))
    assert row.problems == (problem,)
    (row,) = inspect({"params": {}, "batch_stats": {"bn": {"mean": TRAINED}}})
    assert (row.name, row.problems) == ("bn", ("the running variance is missing",))


def test_names_with_slashes_are_split_into_modules():
    tree = {name.replace(".", "/"): array for name, array in layer().items()}
    (row,) = inspect({"net": tree})
    assert (row.name, row.updates, row.problems) == ("net/bn", 70_000, ())


def test_a_single_shard_gets_a_note(tmp_path):
    path = tmp_path / "model-00001-of-00002.safetensors"
    bnjax.save(path, {"bn.running_mean": TRAINED})
    code, output = run("inspect", path)
    assert code == 1
    assert "problem  bn: the running variance is missing\n" in output
    assert "note: this is shard 1 of 2; pass the folder or the index to inspect all\n" in output


def test_key_selects_the_part_to_inspect(tmp_path):
    torch = pytest.importorskip("torch")
    tree = {k: torch.from_numpy(np.array(v)) for k, v in layer().items()}
    torch.save({"state_dict": tree, "state_dict_ema": tree}, tmp_path / "m.pth.tar")
    code, output = run("inspect", tmp_path / "m.pth.tar")
    assert (code, re.findall(r"^ (\S+bn)", output, re.MULTILINE)) == (
        0,
        ["state_dict/bn", "state_dict_ema/bn"],
    )
    code, output = run("inspect", tmp_path / "m.pth.tar", "--key", "state_dict_ema")
    assert (code, re.findall(r"^ (bn)", output, re.MULTILINE)) == (0, ["bn"])


def test_the_parameter_groups_of_an_optimizer_are_not_a_model(tmp_path):
    torch = pytest.importorskip("torch")
    model = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.BatchNorm1d(4))
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(3, 2)).sum().backward()
    optimizer.step()
    states = {"optimizer_states": [optimizer.state_dict()], "state_dict": model.state_dict()}
    torch.save(states, tmp_path / "epoch=3.ckpt")
    layers = inspect(bnjax.load(tmp_path / "epoch=3.ckpt"))
    assert [row.name for row in layers] == ["state_dict/1"]
    assert inspection.notes(layers) == []
