"""Training in several processes: results match one process, and lost processes are handled."""

import os
import signal
import time
from pathlib import Path

import chex
import pytest

from tests.support.commands import EXAMPLES, arrays, result, run, start, wait_for_checkpoint

TRAIN = EXAMPLES / "train_multihost.py"
SETTINGS = ("--epochs", "3", "--batch-size", "256", "--timeout", "20")


@pytest.mark.parametrize("library", ["linen", "nnx"])
def test_a_lost_process_stops_the_run_which_resumes_exactly(tmp_path, monkeypatch, library):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    settings = (*SETTINGS, "--library", library)
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=1")
    process = start(TRAIN, "--processes", "2", "--out", broken, *settings)
    wait_for_checkpoint(process, broken, 1)
    os.kill(children(process.pid)[-1], signal.SIGKILL)
    killed = time.monotonic()
    output, _ = process.communicate()
    assert process.returncode == 1, output
    assert "This run lost a process. Start the run again with --resume" in output
    assert time.monotonic() - killed < 60  # it stops, where a collective could wait for ever
    code, output = run(TRAIN, "--processes", "2", "--out", broken, "--resume", *settings)
    assert code == 0, output
    assert "2 processes, 2 devices" in output
    # One process with two devices does the same sums.
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
    code, expected = run(TRAIN, "--processes", "1", "--out", whole, *settings)
    assert code == 0, expected
    assert "1 processes, 2 devices" in expected
    assert result(output) == result(expected)
    chex.assert_trees_all_equal(arrays(broken), arrays(whole))


def children(pid: int) -> list[int]:
    """The child processes of a process."""
    listed = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in listed]
