"""PyTorch's batch norm (cuDNN's, where torch takes it) on the device that jax uses."""

import functools
from collections.abc import Callable
from typing import Any

import jax

from tests.benchmarks import torch_layers
from tests.benchmarks.cases import Case, Inputs


@functools.cache
def device() -> str | None:
    """Torch's name of jax's device, if both have it."""
    backend = jax.default_backend()
    if backend not in ("cpu", "gpu"):
        return None
    try:
        import torch
    except (ImportError, OSError):  # of a CUDA that does not go with jax's
        return None
    if backend == "cpu":
        return "cpu"
    return "cuda" if torch.cuda.is_available() else None


def cache_size() -> int | None:
    """Bytes in the last cache before memory, if torch knows."""
    if device() != "cuda":
        return None
    import torch

    return getattr(torch.cuda.get_device_properties(0), "L2_cache_size", None)


def version() -> str | None:
    """Of torch and of cuDNN."""
    where = device()
    if where is None:
        return None
    import torch

    cudnn = f" with cuDNN {torch.backends.cudnn.version()}" if where == "cuda" else ""
    return f"torch {torch.__version__}{cudnn}"


def makers(case: Case, which: str, given: list[Inputs]) -> dict[str, Callable[[], Any]]:
    """For each memory format, what makes a launch, and makes its first result one of jax's."""
    where = device()
    if where is None:
        return {}
    known = torch_layers.steps(case, given, which, where)

    def maker(step: Callable[[], Any]) -> Callable[[], Any]:
        def first(results: Any) -> Any:
            return torch_layers.as_jax(results[0], case)

        return lambda: (recorded(step()) if where == "cuda" else step(), first)

    return {name: maker(step) for name, step in known.items()}


def recorded(run: Callable[[], Any]) -> Callable[[], Any]:
    """The same kernels without Python between them, as jax launches them: a CUDA graph."""
    import torch

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            results = run()
    except RuntimeError:  # of a kernel that cannot be recorded
        torch.cuda.synchronize()
        return run

    def replay() -> Any:
        graph.replay()
        return results

    return replay


def wait(results: Any) -> None:
    """Until all that was launched is done, by either library."""
    if device() == "cuda":
        import torch

        torch.cuda.synchronize()
    jax.block_until_ready(
        [each for each in jax.tree.leaves(results) if isinstance(each, jax.Array)]
    )
