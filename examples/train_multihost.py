"""Train the digits network data-parallel in several processes, on one or more machines.

On one machine, start all processes at once:

    python examples/train_multihost.py --processes 2

On several machines, run the same command on each, with its own --process-id:

    python examples/train_multihost.py --coordinator HOST:PORT --processes 4 --process-id 0

Under Slurm or on a TPU pod, JAX detects all of this: srun python examples/train_multihost.py
"""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import jax
import numpy as np
import orbax.checkpoint as ocp
import typer
from digits import batches, load
from jax.experimental import multihost_utils
from rich.console import Console
from runs import Library, folder_of, restore, start
from train_digits import train

console = Console()
LOST = "This run lost a process. Start the run again with --resume to continue from the last epoch."


def launch(processes: int) -> int:
    """Start all processes on this machine; if one is lost, stop the others."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        coordinator = f"localhost:{probe.getsockname()[1]}"
    command = [sys.executable, *sys.argv, "--coordinator", coordinator, "--process-id"]
    children = [subprocess.Popen([*command, str(number)]) for number in range(processes)]
    while any(child.poll() is None for child in children):
        if any(child.poll() not in (None, 0) for child in children):
            time.sleep(2)  # let the others print their errors
            for child in children:
                child.kill()
            console.print(f"[red]{LOST}[/]")
            return 1
        time.sleep(0.1)
    return max(abs(child.returncode) for child in children)


def work(
    out: Path, library: Library, epochs: int, batch_size: int, lr: float, seed: int, resume: bool
) -> None:
    """Train in one process."""
    mesh = jax.make_mesh((jax.device_count(),), ("data",))
    first = jax.process_index() == 0
    if first:
        console.print(f"{jax.process_count()} processes, {jax.device_count()} devices")
    splits, out = load(seed=seed), agreed(folder_of(out.resolve(), resume))
    options = ocp.CheckpointManagerOptions(max_to_keep=2, create=True)
    with ocp.CheckpointManager(out / "checkpoints", options=options) as manager:
        run = start(splits, lr, epochs, batch_size, seed, library, mesh)
        if manager.latest_step() is not None:
            run = restore(manager, run)
        train(run, manager, splits, epochs, batch_size, seed)
    part = jax.process_index(), jax.process_count()
    result = run.evaluate(batches(splits.test, 256, part=part))
    if first:
        console.print(
            f"test accuracy {result['accuracy']:.4f} in eval mode, loss {result['loss']:.6f}"
        )
        console.print(f"checkpoints: {out}", soft_wrap=True)


def agreed(out: Path) -> Path:
    """The folder chosen by process 0, so that all processes use the same one."""
    name = np.zeros(4096, np.uint8)
    given = np.frombuffer(str(out).encode(), np.uint8)
    name[: len(given)] = given
    first = np.asarray(multihost_utils.broadcast_one_to_all(name))
    return Path(first.tobytes().rstrip(b"\0").decode())


def main(
    processes: Annotated[
        int | None, typer.Option(min=1, help="How many; without other options, all run here.")
    ] = None,
    coordinator: Annotated[str | None, typer.Option(help="HOST:PORT of process 0.")] = None,
    process_id: Annotated[int | None, typer.Option(help="Which process this is.")] = None,
    out: Annotated[
        Path, typer.Option(help="The run's shared folder; OUT-2 and so on if OUT holds a run.")
    ] = Path("runs/multihost"),
    library: Annotated[Library, typer.Option(help="Flax's linen or nnx.")] = "linen",
    epochs: Annotated[int, typer.Option(min=1)] = 40,
    batch_size: Annotated[
        int, typer.Option(min=2, help="The global batch size, over all processes.")
    ] = 64,
    lr: Annotated[float, typer.Option(min=0, help="The peak learning rate.")] = 3e-3,
    seed: Annotated[int, typer.Option(help="Seed for splits, weights and data order.")] = 0,
    resume: Annotated[
        bool, typer.Option(help="Continue from the last checkpoint of the last run.")
    ] = False,
    timeout: Annotated[
        int, typer.Option(help="Seconds until a silent process counts as lost.")
    ] = 60,
) -> None:
    """Train the digits network data-parallel in several processes."""
    if processes is not None and coordinator is None:
        raise typer.Exit(launch(processes))
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(
            coordinator, processes, process_id, heartbeat_timeout_seconds=timeout
        )
    except (LookupError, TypeError, ValueError, jax.errors.JaxRuntimeError) as error:
        message = (
            f"cannot find the processes ({str(error).splitlines()[0]}): pass --processes N to "
            "start all here, --processes N --coordinator HOST:PORT --process-id I to start one, "
            "or none of these under Slurm"
        )
        raise typer.BadParameter(message, param_hint="--coordinator") from error
    try:
        work(out, library, epochs, batch_size, lr, seed, resume)
    except jax.errors.JaxRuntimeError as error:
        console.print(
            f"process {jax.process_index()}: {str(error).splitlines()[0]}\n[red]{LOST}[/]"
        )
        sys.stdout.flush()
        os._exit(1)  # a clean exit would wait for the lost process
    jax.distributed.shutdown()


if __name__ == "__main__":
    typer.run(main)
