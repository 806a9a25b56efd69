"""The command line: tables, JSON, conversions, and exit codes."""

import json
import re
import subprocess
import sys
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx, serialization

import bnjax
from bnjax.checkpoints import inspection

pytest.importorskip("typer", reason="the command line is in the extra `tools`")

from tests.support.command_line import run

pytestmark = pytest.mark.quick_compile

F32 = np.float32


def layer(name: str, **changes: Any) -> dict[str, np.ndarray]:
    """A trained PyTorch batch norm with three channels."""
    values = {
        "weight": np.array([0.5, 1, 1.5], F32),
        "bias": np.zeros(3, F32),
        "running_mean": np.array([-1, 0, 2], F32),
        "running_var": np.array([0.25, 1, 4], F32),
        "num_batches_tracked": np.array(120),
    } | changes
    return {f"{name}.{leaf}": array for leaf, array in values.items()}


NEW = {"running_mean": np.zeros(3, F32), "running_var": np.ones(3, F32)}
FINE = layer("bn1") | {"conv.weight": np.ones((3, 3, 1, 1), F32)}
BAD = (
    layer("bn1", running_mean=np.array([0, np.nan, 1], F32))
    | layer("bn2", **NEW)
    | layer("bn3", weight=np.zeros(3, F32))
    | layer("bn4", running_var=np.array([-1, 0, 1], F32), weight=np.array([1, 1, 1e-4], F32))
)
PROBLEMS = [
    "bn1: 1 value of the running mean is NaN or infinite",
    "bn2: the statistics were never updated: all means are 0 and all variances 1",
    "bn3: all channels are dead: their output does not vary",
    "bn4: 1 running variance is negative",
]


@pytest.fixture(params=[".safetensors", ".pth", ".msgpack", ""])
def suffix(request) -> str:
    if request.param == ".pth":
        pytest.importorskip("torch")
    return request.param


# inspect


def test_inspect_shows_each_batch_norm_in_every_format(tmp_path, suffix):
    bnjax.save(tmp_path / f"model{suffix}", FINE)
    code, output = run("inspect", tmp_path / f"model{suffix}")
    assert code == 0, output
    assert re.search(r"bn1 +3 +0\.5\.\.1\.5 +-1\.\.2 +0\.25\.\.4 +120 +0 +0 +0 ", output), output
    assert output.endswith("verdict: fine (1 batch norm)\n")


def test_inspect_reports_all_problems(tmp_path):
    bnjax.save(tmp_path / "model.safetensors", BAD)
    code, output = run("inspect", tmp_path / "model.safetensors")
    assert code == 1
    assert [line[9:] for line in output.splitlines() if line.startswith("problem")] == PROBLEMS
    assert (
        "note: 5 dead or weak channels, with an output standard deviation below 0.01, could be "
        "pruned\n"
    ) in output
    assert output.endswith("verdict: 4 problems found (4 batch norms)\n")


def test_inspect_prints_json(tmp_path):
    bnjax.save(tmp_path / "model.msgpack", BAD)
    code, output = run("inspect", "--json", tmp_path / "model.msgpack")
    report = json.loads(output, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert (code, report["problems"]) == (1, PROBLEMS)
    first, *_, last = report["layers"]
    assert first == {
        "name": "bn1",
        "channels": 3,
        "scale": [0.5, 1.5],
        "mean": [0.0, 1.0],
        "var": [0.25, 4.0],
        "updates": 120,
        "dead": 0,
        "nearly_dead": 0,
        "not_finite": 1,
        "problems": [PROBLEMS[0].removeprefix("bn1: ")],
        "notes": [],
    }
    assert (last["dead"], last["nearly_dead"]) == (1, 1)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = bnjax.BatchNorm1d(momentum=None, name="bn1")(nn.Dense(3)(x))
        return nn.BatchNorm(True, use_scale=False, name="bn_2")(x)


def moved() -> dict[str, Any]:
    variables = jax.device_get(Net().init(jax.random.key(0), jnp.ones((2, 3))))
    return jax.tree.map(lambda array: array + 1, variables)


@pytest.mark.parametrize("wrap", [lambda tree: tree, lambda tree: {"step": 3, "ema": tree}])
def test_inspect_reads_flax_naming_at_any_depth(tmp_path, suffix, wrap):
    bnjax.save(tmp_path / f"model{suffix}", wrap(moved()))
    code, output = run("inspect", "--json", tmp_path / f"model{suffix}")
    assert code == 0, output
    rows = json.loads(output)["layers"]
    assert sorted(row["name"].rpartition("/")[2] for row in rows) == ["bn1", "bn_2"]
    assert {(row["updates"], row["scale"] is None) for row in rows} == {(1, False), (None, True)}


def test_inspect_reads_an_nnx_state_from_orbax(tmp_path):
    import orbax.checkpoint as ocp

    state = nnx.state(bnjax.nnx.BatchNorm1d(3, rngs=nnx.Rngs(0)))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "model", {"bn": state})
    code, output = run("inspect", tmp_path / "model")
    assert code == 1
    assert "problem  bn: the statistics were never updated" in output


def test_inspect_reports_a_checkpoint_without_statistics(tmp_path):
    bnjax.save(tmp_path / "model.msgpack", {"params": moved()["params"]})
    code, output = run("inspect", tmp_path / "model.msgpack")
    assert code == 1
    assert output.startswith("problem  no batch norm has running statistics: were they saved?")


@pytest.mark.parametrize(
    "arrays",
    [
        layer("bn", running_var=np.ones(2, F32)),
        layer("bn", num_batches_tracked=np.ones(3), running_mean=np.ones((), F32)),
        layer("bn", running_mean=np.zeros(0, F32)),
    ],
)
def test_inspect_reports_mismatched_shapes(arrays):
    problems = inspection.problems(inspection.inspect(arrays))
    assert problems[0].startswith("bn: running mean, variance, scale and bias differ in shape")


def test_inspect_lists_stacked_and_empty_layers():
    stacked = {k: np.stack([v, v]) for k, v in layer("bn").items()}
    (row,) = inspection.inspect(stacked)
    assert (row.channels, row.updates, row.problems) == (3, None, ())
    empty = {k: v[:0] if v.ndim else v for k, v in layer("bn").items()}
    (row,) = inspection.inspect(empty)
    assert (row.channels, row.scale, row.dead) == (0, None, 0)


def test_unreadable_files_exit_with_code_two(tmp_path):
    path = tmp_path / "model.msgpack"
    assert run("inspect", path) == (2, f"There is no checkpoint at {path}.\n")
    path.write_bytes(b"[bold]no[/] checkpoint")
    for command in (("inspect", path), ("convert", path, tmp_path / "other.msgpack")):
        code, output = run(*command)
        assert code == 2
        assert output.startswith(f"Cannot read {path} as Flax's msgpack: it is truncated, damaged")
    assert [found.name for found in tmp_path.iterdir()] == ["model.msgpack"]


# convert


def test_convert_changes_the_format_and_nothing_else(tmp_path, suffix):
    bnjax.save(tmp_path / "model.msgpack", FINE)
    code, output = run("convert", tmp_path / "model.msgpack", tmp_path / f"other{suffix}")
    assert (code, output) == (0, f"wrote {tmp_path / f'other{suffix}'}\n")
    chex.assert_trees_all_equal(bnjax.load(tmp_path / f"other{suffix}"), FINE)


def test_convert_with_like_converts_between_pytorch_and_flax(tmp_path):
    there, like, back = (tmp_path / f"{name}.msgpack" for name in ("there", "like", "back"))
    source = tmp_path / "model.safetensors"
    rng = np.random.default_rng(0)
    state_dict = layer("stem.bn_2") | {"fc.weight": rng.standard_normal((2, 12)).astype(F32)}
    bnjax.save(source, state_dict | layer("head"))
    ones = np.ones(3, F32)
    variables = {
        "params": {"bn_2": {"scale": ones, "bias": ones}, "fc": {"kernel": np.zeros((12, 2), F32)}},
        "batch_stats": {"bn_2": {"mean": ones, "var": ones}},
    }
    bnjax.save(like, variables)
    options = ("--rename", "stem=", "--ignore", "head.*", "--flatten", "fc=3,2,2")
    code, output = run("convert", source, there, "--like", like, *options)
    assert code == 0, output
    expected = bnjax.from_torch(
        state_dict, None, variables, rename={"stem": ""}, flatten={"fc": (3, 2, 2)}
    )
    chex.assert_trees_all_equal(bnjax.load(there), expected)
    code, output = run("convert", there, back, "--like", source, *options)
    assert code == 0, output
    same = state_dict | layer("head")
    chex.assert_trees_all_equal(bnjax.load(back), same)


class Nnx(nnx.Module):
    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.bn = bnjax.nnx.BatchNorm2d(3, momentum=None, rngs=rngs)
        self.convs = nnx.List([nnx.Conv(2, 3, (1, 1), rngs=rngs)])
        self.drop = nnx.Dropout(0.5, rngs=rngs)


@pytest.mark.parametrize("suffix", [".msgpack", ""])
def test_convert_accepts_an_nnx_state_as_source_and_as_like(tmp_path, suffix):
    state, there = tmp_path / f"state{suffix}", tmp_path / f"there{suffix}"
    torch, back = (tmp_path / f"{name}.safetensors" for name in ("torch", "back"))
    state_dict = layer("bn") | {"convs.0.weight": np.ones((3, 2, 1, 1), F32)}
    state_dict |= {"convs.0.bias": np.ones(3, F32), "bn.num_batches_tracked": np.array(7)}
    bnjax.save(torch, state_dict)
    bnjax.save(state, nnx.state(Nnx()))
    code, output = run("convert", torch, there, "--like", state)
    assert code == 0, output
    found, before = bnjax.load(there), bnjax.load(state)
    assert jax.tree.structure(found) == jax.tree.structure(before)
    chex.assert_trees_all_equal(found["drop"], before["drop"])
    code, output = run("convert", there, back, "--like", torch)
    assert code == 0, output
    chex.assert_trees_all_equal(bnjax.load(back), state_dict)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rename", "a=b"], "These options convert names, so they need --like FILE."),
        (
            ["--like", "model.safetensors"],
            "Both files have PyTorch names, so --like changes nothing: leave it out. From a nested "
            "checkpoint, save only the state dict or the variables.\n",
        ),
        (["--like", "flax.msgpack", "--rename", "a"], "Expected NAME=VALUE, got 'a'."),
        (
            ["--like", "flax.msgpack", "--flatten", "fc=3,x"],
            "Expected a shape such as 512,7,7, got '3,x'.",
        ),
        (
            ["--like", "flax.msgpack"],
            "The PyTorch state dict and `variables` do not match, so nothing was converted.",
        ),
    ],
)
def test_a_failed_conversion_writes_nothing(tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    bnjax.save("model.safetensors", FINE)
    bnjax.save("flax.msgpack", moved())
    code, output = run("convert", "model.safetensors", "out.msgpack", *options)
    assert code == 1
    assert output.startswith(message)
    assert not (tmp_path / "out.msgpack").exists()


def test_convert_skips_and_names_everything_but_arrays(tmp_path):
    tree = {
        "state_dict": FINE,
        "step": 3,
        "arch": "resnet",
        "char2idx": {"a": 0, ".": 1},
        "callbacks": {"best": {"/runs/a.ckpt": 0.2}, "seen": 7, "mode": "min"},
    }
    (tmp_path / "m.msgpack").write_bytes(serialization.msgpack_serialize(tree))
    for suffix in ("safetensors", "msgpack"):
        code, output = run("convert", tmp_path / "m.msgpack", tmp_path / f"o.{suffix}")
        assert (code, output) == (
            0,
            "skipped, not arrays: arch, callbacks/best (1 entry), callbacks/mode, "
            f"char2idx (2 entries)\nwrote {tmp_path / f'o.{suffix}'}\n",
        )
        expected = {"state_dict": FINE, "step": np.array(3), "callbacks": {"seen": np.array(7)}}
        chex.assert_trees_all_equal(bnjax.load(tmp_path / f"o.{suffix}"), expected)


def test_convert_finds_the_model_in_a_checkpoint_and_says_so(tmp_path):
    like, there = tmp_path / "like.msgpack", tmp_path / "there.msgpack"
    ones = np.ones(3, F32)
    variables = {
        "params": {"bn1": {"scale": ones, "bias": ones}},
        "batch_stats": {"bn1": {"mean": ones, "var": ones}},
    }
    bnjax.save(like, {"state": variables, "epoch": 3})
    source = tmp_path / "m.msgpack"
    groups = {"param_groups": {"0": {"params": {"0": 0}, "lr": 0.1}}}
    optimizer = {"state": {"0": {"exp_avg": ones}}, **groups}
    bnjax.save(source, {"net": layer("bn1"), "optimizer": optimizer})
    code, output = run("convert", source, there, "--like", like)
    assert (code, output) == (
        0,
        f"using net from {source}\nusing state from {like}\nwrote {there}\n",
    )
    chex.assert_trees_all_equal(bnjax.load(there), bnjax.from_torch(layer("bn1"), None, variables))
    bnjax.save(source, {"net": layer("bn1"), "net_ema": layer("bn1")})
    code, output = run("convert", source, there, "--like", like)
    message = f"In {source}, it holds several models: net, net_ema. Choose one with --key.\n"
    assert (code, output) == (1, message)
    code, output = run("convert", source, there, "--like", like, "--key", "net_ema")
    assert (code, output) == (0, f"using state from {like}\nwrote {there}\n")
    code, output = run("convert", source, there, "--key", "ema")
    assert (code, output) == (
        2,
        f"Cannot read {source} as Flax's msgpack: `key` is 'ema', but it has no part 'ema'. Its "
        "parts are 'net', 'net_ema'.\n",
    )


def test_convert_does_not_overwrite_its_inputs(tmp_path):
    source, link = tmp_path / "m.msgpack", tmp_path / "link.msgpack"
    bnjax.save(source, FINE)
    link.symlink_to(source)
    before = source.read_bytes()
    for arguments in ((source, source), (link, source), (source, link), (tmp_path, source)):
        code, output = run("convert", *arguments)
        read, written = arguments
        message = f"Writing {written} would overwrite the input {read}. Choose another name.\n"
        assert (code, output) == (1, message)
    bnjax.save(tmp_path / "other.msgpack", moved())
    code, output = run("convert", tmp_path / "other.msgpack", source, "--like", source)
    assert code == 1
    assert source.read_bytes() == before


def test_convert_refuses_unsupported_suffixes(tmp_path):
    bnjax.save(tmp_path / "m.msgpack", FINE)
    code, output = run("convert", tmp_path / "m.msgpack", tmp_path / "m.h5")
    message = (
        f"Cannot save to {tmp_path / 'm.h5'}: '.h5' is not a supported suffix. Formats are "
        ".safetensors, .pth and .pt (PyTorch), .msgpack (Flax), and a folder "
        "without a suffix (orbax).\n"
    )
    assert (code, output) == (1, message)


# Processes


@pytest.mark.parametrize(
    ("arguments", "spared"),
    [
        (["--help"], {"jax", "numpy", "torch", "flax"}),
        (["convert", "--help"], {"jax", "numpy", "torch", "flax"}),
        (["--version"], {"jax", "numpy", "torch", "flax"}),
        (["inspect", "m.safetensors"], {"jax", "torch", "flax"}),
        (["inspect", "m.pth"], {"jax", "flax"}),
    ],
)
def test_commands_import_only_what_they_need(tmp_path, monkeypatch, arguments, spared):
    monkeypatch.chdir(tmp_path)
    if arguments[-1].startswith("m."):
        bnjax.save(arguments[-1], FINE)
    script = (
        "import atexit, sys\n"
        f"atexit.register(lambda: print('loaded', sorted({spared!r} & {{*sys.modules}})))\n"
        "from bnjax.__main__ import main\nmain()"
    )
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("loaded []\n"), done.stdout


def test_the_module_runs_as_a_program(tmp_path):
    bnjax.save(tmp_path / "model.safetensors", FINE)
    command = [sys.executable, "-m", "bnjax", "inspect", str(tmp_path / "model.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert "verdict: fine (1 batch norm)" in done.stdout


def test_without_typer_it_says_what_to_install():
    script = "import sys; sys.modules['typer'] = None; from bnjax.__main__ import main; main()"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "The command line of bnjax needs typer: pip install 'bnjax[tools]'\n"


def test_version_prints_the_version_of_the_package():
    assert run("--version") == (0, f"bnjax {bnjax.__version__}\n")
