"""`bnjax diagnose`: models and data by name, output, and exit codes."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx, serialization, traverse_util

import bnjax
from bnjax.checkpoints import files

pytest.importorskip("typer", reason="the command line is in the extra `tools`")

from tests.support.command_line import run

F32 = np.float32


def trained_dense() -> nn.Module:
    return nn.Sequential([nn.Dense(4), bnjax.BatchNorm1d(4)])


@pytest.mark.parametrize("healthy", [True, False])
def test_diagnose_prints_a_report_and_exits_with_one_if_there_are_problems(tmp_path, healthy):
    x = np.random.default_rng(0).normal(3, 1, (256, 3)).astype(F32)
    model = trained_dense()
    variables = model.init(jax.random.key(0), x)
    if healthy:
        variables = bnjax.recalibrate(model, variables, [x])
    files.save(tmp_path / "model.msgpack", variables)
    np.savez(tmp_path / "x.npz", x=x)
    arguments = ("diagnose", f"{__name__}:trained_dense", "--variables", tmp_path / "model.msgpack")
    arguments = (*arguments, "--data", tmp_path / "x.npz")
    code, output = run(*arguments, "--plot", tmp_path / "report.png")
    assert code == (0 if healthy else 1)
    assert ("All is well: 1 batch norm fits" if healthy else "never updated, error") in output
    assert (tmp_path / "report.png").stat().st_size > 10_000
    code, output = run(*arguments, "--json")
    assert json.loads(output)["healthy"] is healthy


def test_diagnose_selects_one_of_several_models_by_key(tmp_path):
    x = np.random.default_rng(0).normal(3, 1, (256, 3)).astype(F32)
    model = trained_dense()
    variables = bnjax.recalibrate(model, model.init(jax.random.key(0), x), [x])
    files.save(tmp_path / "model.msgpack", {"ema": variables, "net": variables})
    np.save(tmp_path / "x.npy", x)
    arguments = ("diagnose", f"{__name__}:trained_dense", "--variables", tmp_path / "model.msgpack")
    arguments = (*arguments, "--data", tmp_path / "x.npy")
    message = "`variables` must be those of one model, but hold several, at ['ema', 'net']. "
    message += "Pass one of them.\n"
    assert run(*arguments) == (2, message)
    code, output = run(*arguments, "--key", "ema")
    assert (code, "All is well: 1 batch norm fits" in output) == (0, True)


def trained_nnx() -> nnx.Module:
    rngs = nnx.Rngs(0)
    return nnx.Sequential(nnx.Linear(3, 4, rngs=rngs), bnjax.nnx.BatchNorm1d(4, rngs=rngs))


@pytest.mark.parametrize("name", ["model.msgpack", "model.safetensors", "model"])
@pytest.mark.parametrize("healthy", [True, False])
def test_diagnose_reads_the_checkpoint_of_an_nnx_model(tmp_path, name, healthy):
    x = np.random.default_rng(0).normal(3, 1, (256, 3)).astype(F32)
    model = trained_nnx()
    state = bnjax.recalibrate(model, None, [x]) if healthy else nnx.state(model)
    files.save(tmp_path / name, state)
    np.savez(tmp_path / "x.npz", x=x)
    paths = ("--variables", tmp_path / name, "--data", tmp_path / "x.npz")
    code, output = run("diagnose", f"{__name__}:trained_nnx", *paths)
    assert code == (0 if healthy else 1)
    assert ("All is well: 1 batch norm fits" if healthy else "never updated, error") in output


def test_diagnose_refuses_a_checkpoint_of_another_nnx_model(tmp_path):
    state = nnx.state(nnx.Sequential(nnx.Linear(3, 5, rngs=nnx.Rngs(0))))
    files.save(tmp_path / "model.msgpack", state)
    np.savez(tmp_path / "x.npz", x=np.ones((4, 3), F32))
    paths = ("--variables", tmp_path / "model.msgpack", "--data", tmp_path / "x.npz")
    code, output = run("diagnose", f"{__name__}:trained_nnx", *paths)
    assert (code, output.strip()) == (
        2,
        "`variables` do not fit the model: missing ['layers/1/bias', 'layers/1/mean', "
        "'layers/1/scale', 'layers/1/var'], of another shape ['layers/0/bias (5,) not (4,)', "
        "'layers/0/kernel (3, 5) not (3, 4)']. Are they another model's?",
    )


def test_diagnose_reads_nnx_variables_saved_by_orbax(tmp_path):
    x = np.random.default_rng(0).normal(3, 1, (256, 3)).astype(F32)
    state = nnx.to_pure_dict(bnjax.recalibrate(trained_nnx(), None, [x]))
    files.save(tmp_path / "model", jax.tree.map(lambda array: {"value": array}, state))
    np.savez(tmp_path / "x.npz", x=x)
    paths = ("--variables", tmp_path / "model", "--data", tmp_path / "x.npz")
    code, output = run("diagnose", f"{__name__}:trained_nnx", *paths)
    assert code == 0, output


def test_diagnose_explains_what_it_cannot_find(tmp_path):
    np.savez(tmp_path / "x.npz", a=np.ones(2), b=np.ones(2))
    paths = ("--variables", tmp_path / "no.msgpack", "--data", tmp_path / "x.npz")
    dotted = "Expected package.module:make_model, with dots as in an import, got"
    for target, message in (
        ("tests.test_cli", f"{dotted} 'tests.test_cli'."),
        ("tests/test_cli.py:trained_dense", f"{dotted} 'tests/test_cli.py:trained_dense'."),
        (f"{__name__}:absent", f"The module {__name__} has no 'absent'.\n"),
        (f"{__name__}:trained_dens", f"Did you mean {__name__}:trained_dense?"),
        ("nowhere:make_model", f"There is no module 'nowhere' in {Path.cwd()} or among the"),
        ("nowhere.at.all:make_model", "There is no module 'nowhere' in"),
        (f"{__name__}:trained_dense", "There is no checkpoint at"),
    ):
        code, output = run("diagnose", target, *paths)
        assert code == 2
        assert message in output


def test_diagnose_refuses_data_without_a_single_array(tmp_path):
    np.savez(tmp_path / "x.npz", a=np.ones(2), b=np.ones(2))
    variables = trained_dense().init(jax.random.key(0), np.ones((2, 3), F32))
    files.save(tmp_path / "m.msgpack", variables)
    paths = ("--variables", tmp_path / "m.msgpack", "--data", tmp_path / "x.npz")
    message = f"{tmp_path / 'x.npz'} must hold a single array or one named `x`, got ['a', 'b'].\n"
    assert run("diagnose", f"{__name__}:trained_dense", *paths) == (2, message)


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        ("asking", (), "must make the model without arguments, but missing a required argument"),
        ("trained_dense", ("--apply", "{train"), "--apply must be JSON, got '{train':"),
        ("trained_dense", ("--apply", "[1]"), "--apply must name arguments, as in"),
        ("trained_dense", ("--apply", '{"train": true}'), "apply_kwargs"),
    ],
)
def test_diagnose_explains_how_to_make_and_call_a_model(tmp_path, target, options, message):
    x = np.ones((8, 3), F32)
    np.savez(tmp_path / "x.npz", x=x)
    files.save(tmp_path / "m.msgpack", trained_dense().init(jax.random.key(0), x))
    paths = ("--variables", tmp_path / "m.msgpack", "--data", tmp_path / "x.npz")
    code, output = run("diagnose", f"{__name__}:{target}", *paths, *options)
    assert code == 2
    assert message in output


def asking(features: int) -> nn.Module:
    return nn.Dense(features)


def crashing() -> nn.Module:
    raise RuntimeError("no config")


def leaving() -> nn.Module:
    sys.exit(1)


class Crashing(nn.Module):
    @nn.compact
    def __call__(self, x):
        return {"y": x}[f"{bnjax.BatchNorm1d()(x).ndim}"]


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("crashing", "RuntimeError: no config"),
        ("leaving", "in leaving"),
        ("Crashing", "KeyError: '2'"),
    ],
)
def test_a_crash_of_the_model_shows_its_traceback_and_exits_with_two(tmp_path, target, message):
    np.savez(tmp_path / "x.npz", x=np.ones((8, 3), F32))
    variables = bnjax.BatchNorm1d().init(jax.random.key(0), jnp.ones((8, 3)))
    tree = {name: {"BatchNorm1d_0": part} for name, part in variables.items()}
    files.save(tmp_path / "m.msgpack", tree)
    paths = ("--variables", tmp_path / "m.msgpack", "--data", tmp_path / "x.npz")
    code, output = run("diagnose", f"{__name__}:{target}", *paths)
    assert code == 2
    assert "Traceback (most recent call last)" in output
    assert message in output
    assert output.endswith(": this is a crash, not a problem found in the model.\n")


def test_an_error_in_a_layer_names_the_layer(tmp_path):
    np.savez(tmp_path / "x.npz", x=np.ones((8, 5), F32))
    variables = trained_dense().init(jax.random.key(0), jnp.ones((8, 5)))
    variables["batch_stats"]["layers_1"].pop("var")
    files.save(tmp_path / "m.msgpack", variables)
    paths = ("--variables", tmp_path / "m.msgpack", "--data", tmp_path / "x.npz")
    code, output = run("diagnose", f"{__name__}:trained_dense", *paths)
    assert code == 2
    assert "The batch norm at 'layers_1' misses ['var'] in `batch_stats`" in output
    assert "In BatchNorm1d at 'layers_1'." in output


@pytest.mark.parametrize("folder", ["run", "run/checkpoints", "run/checkpoints/2"])
@pytest.mark.parametrize("kind", ["dense", "nnx"])
def test_commands_read_the_folder_of_a_training_run(tmp_path, folder, kind):
    import orbax.checkpoint as ocp

    x = np.random.default_rng(0).normal(3, 1, (256, 3)).astype(F32)
    np.save(tmp_path / "x.npy", x)
    for number in (1, 2):  # only the newest has the right statistics
        tree = saved_by_training(kind, x) if number == 2 else {"nothing": np.ones(2)}
        with ocp.CheckpointManager(tmp_path / "run" / "checkpoints") as manager:
            items = ocp.args.Composite(
                state=ocp.args.StandardSave(tree), records=ocp.args.JsonSave({"loss": [1.0]})
            )
            manager.save(number, args=items)
            manager.wait_until_finished()
    command = [sys.executable, "-m", "bnjax", "inspect", tmp_path / folder]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert done.stdout.endswith("verdict: fine (1 batch norm)\n")
    paths = ("--variables", tmp_path / folder, "--data", tmp_path / "x.npy")
    code, output = run("diagnose", f"{__name__}:trained_{kind}", *paths)
    assert code == 0, output
    assert output.endswith("All is well: 1 batch norm fits these data.\n")


def saved_by_training(kind: str, x: np.ndarray) -> Any:
    """A tree as the examples save it: a state, or a model and its optimizer."""
    if kind == "nnx":
        model = trained_nnx()
        nnx.update(model, bnjax.recalibrate(model, None, [x]))
        optimizer = nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param)
        return {"model": nnx.state(model), "optimizer": nnx.state(optimizer)}
    model = trained_dense()
    state = bnjax.training.init_state(model, optax.adam(0.1), jax.random.key(0), x)
    stats = bnjax.recalibrate(model, state, [x])["batch_stats"]
    return serialization.to_state_dict(state.replace(batch_stats=stats, loss_scale=0))


def test_long_paths_are_not_broken_in_a_pipe(tmp_path):
    names = "resnet/encoder/stages/0/layers/0/layer/2/normalization/of/the/last/block"
    leaves = {"mean": np.linspace(-1, 1, 3), "var": np.linspace(1, 2, 3)}
    tree = {f"{names}/{leaf}": array for leaf, array in leaves.items()}
    files.save(tmp_path / "m.msgpack", {"batch_stats": traverse_util.unflatten_dict(tree, sep="/")})
    command = [sys.executable, "-m", "bnjax", "inspect", tmp_path / "m.msgpack"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert re.search(rf"^ {names} +3 ", done.stdout, re.MULTILINE), done.stdout
    assert max(map(len, done.stdout.splitlines())) < 200
