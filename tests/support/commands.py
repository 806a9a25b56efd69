"""Run the examples as processes, and read their output and checkpoints."""

import contextlib
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np

from tests.support.compilers import flags

EXAMPLES = Path(__file__).parents[2] / "examples"
WIDE = {"COLUMNS": "300", "MPLBACKEND": "agg", "JAX_PLATFORMS": "cpu"}


def start(*arguments: str | Path) -> subprocess.Popen[str]:
    command = [sys.executable, *map(str, arguments)]
    pipe = subprocess.PIPE
    env = os.environ | WIDE | {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags()}"}
    return subprocess.Popen(command, stdout=pipe, stderr=subprocess.STDOUT, text=True, env=env)


def run(*arguments: str | Path) -> tuple[int, str]:
    process = start(*arguments)
    output, _ = process.communicate()
    return process.returncode, output


def shell(line: str) -> tuple[int, str]:
    """Run a line in a shell, as a user would."""
    done = subprocess.run(line, shell=True, capture_output=True, text=True, env=os.environ | WIDE)
    return done.returncode, done.stdout + done.stderr


def result(output: str) -> str:
    """The line with the final numbers."""
    found = re.search(r"test accuracy .*", output)
    assert found, output
    return found.group()


def arrays(folder: Path) -> dict[str, np.ndarray]:
    """All arrays in the last checkpoint."""
    import jax
    import orbax.checkpoint as ocp

    last = max((folder / "checkpoints").iterdir(), key=lambda path: int(path.name))
    with ocp.PyTreeCheckpointer() as checkpointer:
        tree = checkpointer.metadata(last / "state").item_metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        state = checkpointer.restore(last / "state", restore_args=as_numpy)
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def wait_for_checkpoint(process: subprocess.Popen[str], folder: Path, number: int) -> None:
    """Wait for a checkpoint with this number, complete or not, or for the end of the process."""
    while process.poll() is None and not any((folder / "checkpoints").glob(f"{number}*")):
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.02)
