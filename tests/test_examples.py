"""The examples, run as processes: killed, resumed, and with a user's own data."""

import re
import signal

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.support.commands import EXAMPLES, arrays, result, run, shell, start, wait_for_checkpoint

TRAIN = EXAMPLES / "train_digits.py"


@pytest.mark.parametrize("library", ["linen", "nnx"])
def test_a_killed_run_resumes_exactly(tmp_path, library):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    settings = ("--epochs", "4", "--batch-size", "256", "--seed", "3", "--library", library)
    code, expected = run(TRAIN, "--out", whole, *settings)
    assert code == 0, expected
    kills = 0
    # Kill it as soon as a checkpoint appears, complete or not; then again after the next one.
    for wanted in (1, 2):
        process = start(TRAIN, "--out", killed, "--resume", *settings)
        wait_for_checkpoint(process, killed, wanted)
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
        process.communicate()
    assert kills
    code, output = run(TRAIN, "--out", killed, "--resume", *settings)
    assert code == 0, output
    assert result(output) == result(expected)
    chex.assert_trees_all_equal(arrays(killed), arrays(whole))


def test_all_checks_pass_and_pictures_are_written(tmp_path):
    code, output = run(TRAIN, "--out", tmp_path / "run", "--epochs", "2")
    assert code == 0, output
    assert output.count("yes  ") == 3
    for picture in ("curves.png", "statistics.png"):
        assert (tmp_path / "run" / picture).stat().st_size > 10_000
    code, output = run(
        EXAMPLES / "running_statistics.py", "--run", tmp_path / "run", "--epochs", "2"
    )
    assert code == 0, output
    assert re.search(r"model\.apply\(\.\.\.\) +│ exactly 0 +│ exactly 0", output)
    assert re.search(r"128 │ +\d\.\d{3} std │ +\d\.\d{3} │ +\d\.\d{3} │ +exactly 0", output)
    assert (tmp_path / "run" / "running_statistics.png").stat().st_size > 10_000


def test_a_second_run_has_its_own_folder_and_suggests_a_command(tmp_path):
    settings = ("--epochs", "1", "--batch-size", "256", "--out", tmp_path / "run")
    for number, library in (("", "linen"), ("-2", "nnx")):
        code, output = run(TRAIN, *settings, "--library", library)
        assert code == 0, output
        assert re.search(r"^epoch 1/1  loss \d\.\d+  validation accuracy", output, re.MULTILINE)
        assert f"pictures and checkpoints: {tmp_path}/run{number}\n" in output
        code, report = shell(output.partition("next: ")[2].strip())
        assert code in (0, 1), report
        assert "batch norms over" in report
        assert "error" not in report.splitlines()[0]
    code, output = run(TRAIN, *settings, "--resume")
    assert code == 2
    assert f"{tmp_path}/run-2/checkpoints holds a run in nnx: add --library nnx" in output


def test_new_runs_get_a_new_folder_and_resumed_runs_the_last_one(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    from runs import folder_of

    out = tmp_path / "digits"
    assert folder_of(out, False) == folder_of(out, True) == out
    out.mkdir()
    assert folder_of(out, False) == out  # it is empty
    for number in ("", "-2"):
        (tmp_path / f"digits{number}" / "checkpoints" / "3").mkdir(parents=True)
    (tmp_path / "digits-3" / "checkpoints" / "1.orbax-checkpoint-tmp").mkdir(parents=True)
    assert folder_of(out, False) == tmp_path / "digits-3"
    assert folder_of(out, True) == tmp_path / "digits-3"  # it was killed before its first epoch


def test_linen_and_nnx_networks_agree(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    from digits import NnxResNet, ResNet, as_linen

    x = np.random.default_rng(0).normal(size=(4, 8, 8, 1)).astype("f")
    variables = ResNet().init(jax.random.key(0), x)
    model = NnxResNet()
    as_linen(model, variables)
    expected, moved = jax.device_get(ResNet().apply(variables, x, mutable=["batch_stats"]))
    np.testing.assert_allclose(model(jnp.array(x)), expected, rtol=1e-4, atol=1e-5)
    stats = moved["batch_stats"]["Block_2"]["BatchNorm2d_1"]
    np.testing.assert_allclose(model.blocks[2].norms[1].mean[...], stats["mean"], atol=1e-6)


def test_averaged_weights_need_recalibrated_statistics():
    code, output = run(EXAMPLES / "averaged_weights.py", "--epochs", "2")
    assert code == 0, output
    rows = re.findall(r"│ (.+?) +│ (.+?) +│ (0\.\d{3}|1\.000) +│ ([\d.]+|nan) +│", output)
    weights = ("Adam, last step", "Adam, EMA", "Adam, SWA", "schedule-free")
    kinds = ("from training", "recalibrated")
    assert [row[:2] for row in rows] == [(name, kind) for name in weights for kind in kinds]
    accuracy = {row[:2]: float(row[2]) for row in rows}
    assert accuracy["Adam, EMA", "recalibrated"] > accuracy["Adam, EMA", "from training"] + 0.1


def test_small_batches_compares_all_ways(tmp_path):
    settings = ("--epochs", "1", "--seeds", "1", "--size", "2")
    code, output = run(EXAMPLES / "small_batches.py", *settings, "--out", tmp_path)
    assert code == 0, output
    cell = r" +0\.\d{3} ± 0\.000, \d\.\d{3} +"
    for size in (2, 64):
        assert re.search(rf"│ {size} +│({cell}│){{4}}", output), output
    assert (tmp_path / "small_batches.png").stat().st_size > 10_000


def test_shifted_data_compares_all_policies(tmp_path):
    settings = ("--epochs", "2", "--seeds", "1", "--size", "4", "--size", "64")
    code, output = run(EXAMPLES / "shifted_data.py", *settings, "--out", tmp_path)
    assert code == 0, output
    rows = re.findall(r"│ (\w+) +│ (.+)│", output)
    found = {name: [float(n) for n in re.findall(r"[01]\.\d{3}", row)] for name, row in rows}
    assert [*found] == ["none", "noise", "blur", "contrast", "inversion"]
    source, by_batch, *_ = found["contrast"]  # from the last table, batches of 64
    assert by_batch > source + 0.1
    assert (tmp_path / "shifted_data.png").stat().st_size > 10_000


def test_domains_compares_banks_with_one_batch_norm(tmp_path):
    code, output = run(EXAMPLES / "domains.py", "--epochs", "2", "--seeds", "1", "--out", tmp_path)
    assert code == 0, output
    rows = re.findall(r"│ (.+?) +│ +(0\.\d{3}) +│ +(0\.\d{3}) +│", output)
    accuracy = {name: float(digits) for name, digits, _ in rows}
    wrong = ", wrong domain"
    banks = ("banks", "banks, own scale and bias")
    assert set(accuracy) == {"one batch norm", *banks, *(name + wrong for name in banks)}
    for name in banks:
        assert accuracy[name] > accuracy[name + wrong] + 0.1
    assert (tmp_path / "domains.png").stat().st_size > 10_000


def test_training_on_a_users_images(tmp_path):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 120)
    images = rng.integers(0, 100, (120, 9, 7, 3)) + 50 * labels[:, None, None, None]
    np.savez(tmp_path / "own.npz", images=images, labels=labels)
    settings = ("--epochs", "1", "--batch-size", "16", "--out", tmp_path / "run")
    code, output = run(TRAIN, "--data", tmp_path / "own.npz", *settings)
    assert code == 0, output
    assert "(24 images, 0 steps rejected)" in output


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no archive", "Cannot read "),
        ({"images": np.ones((30, 8, 8))}, r"lacks \['labels'\]"),
        ({"images": np.ones((30, 8)), "labels": np.ones(30, int)}, r"got images float64\(30, 8\)"),
        ({"images": np.ones((30, 8, 8)), "labels": np.ones(30)}, "and labels float64"),
        ({"images": np.ones((9, 8, 8)), "labels": np.ones(9, int)}, "at least 20 images"),
        ({"images": np.ones((30, 8, 8)), "labels": np.ones(30, int)}, "at least two classes"),
        ({"images": np.ones((30, 8, 8)), "labels": 10**9 * np.arange(30)}, "fewer classes than"),
        ({"images": np.ones((30, 8, 8)), "labels": np.arange(30) - 1}, "labels from 0 up, got -1"),
        ({"images": np.full((30, 8, 8), np.nan), "labels": np.arange(30) % 2}, "finite pixels"),
        ({"images": np.ones((30, 8, 8)), "labels": np.full(30, None)}, "Cannot read "),
    ],
)
def test_invalid_data_files_are_errors(tmp_path, monkeypatch, content, message):
    monkeypatch.syspath_prepend(EXAMPLES)
    from digits import load

    path = tmp_path / "data.npz"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.savez(path, **content)
    start = r"^(Cannot read |Cannot train on )?"
    with pytest.raises(ValueError, match=start + re.escape(str(path))) as error:
        load(path)
    assert re.search(message, str(error.value))
