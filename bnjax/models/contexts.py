"""State that is active inside a `with` block, for the thread and task that entered it only.

JAX caches traces, so it must retrace when the active state changes. A JAX user context makes it do
so, but is local to a thread, whereas a `ContextVar` is local to a task. So the variable is the
source of truth, and JAX gets a key of it at each entry and exit.
"""

import asyncio
import collections
import contextlib
import threading
from collections.abc import Hashable, Iterator
from contextvars import ContextVar
from typing import Any

from bnjax.core.compat import context
from bnjax.models.conventions import knowledge


class Reentrant(contextlib.ContextDecorator):
    """A context that can be entered repeatedly, also by several threads and tasks at once."""

    def _entered(self) -> contextlib.AbstractContextManager[None]:
        """The context of a single `with` block."""
        raise NotImplementedError

    def __enter__(self) -> None:
        """Activate it."""
        context = self._entered()
        context.__enter__()
        _inside.set((*_inside.get(), (self, context)))

    def __exit__(self, *error: Any) -> bool | None:
        """Deactivate it."""
        mine = [each for each in _inside.get() if each[0] is self][-1]
        _inside.set(tuple(each for each in _inside.get() if each is not mine))
        return mine[1].__exit__(*error)


_inside: ContextVar[tuple[tuple[Any, Any], ...]] = ContextVar("bnjax.inside", default=())


class Frame:
    """Something that is active inside one `with` block.

    Args:
        key: represents it in JAX's caches, which keep it alive. Equal keys mean equal programs.

    Attributes:
        strangers: classes, by path, of modules that were called and keep a mean and a variance, but
            are not known batch norms.
        known: paths of the batch norms that were called.
    """

    def __init__(self, key: Hashable) -> None:
        self.key = key
        self.thread: int | None = None
        self.strangers: dict[str, str] = {}
        self.known: set[str] = set()


_frames: ContextVar[tuple[Frame, ...]] = ContextVar("bnjax.frames", default=())
_open: collections.Counter[int] = collections.Counter()  # frames by thread
_turns: collections.Counter[int] = collections.Counter()  # exits of blocks that awaited
_key = context(())


def active() -> tuple[Frame, ...]:
    """The active frames, innermost last."""
    here = threading.get_ident()
    return tuple(frame for frame in _frames.get() if frame.thread == here)


@contextlib.contextmanager
def holding(*frames: Frame, outermost: bool = False) -> Iterator[None]:
    """A context in which frames are active, inside or outside those that already are.

    Tasks inherit them. While the block awaits, other tasks run under this frame's key. Their traces
    are not reused after the block, but are inside it, so two tasks must not call the same jitted
    function under different frames.
    """
    thread, around = threading.get_ident(), _frames.get()
    for frame in frames:
        frame.thread = thread
    _open[thread] += len(frames)
    _frames.set((*frames, *around) if outermost else (*around, *frames))
    _tell_jax(thread)
    awaited = _others_run()
    try:
        yield
    finally:
        for frame in frames:
            frame.thread = None
        _open[thread] -= len(frames)
        if awaited:
            _turns[thread] += 1
        _frames.set(tuple(each for each in _frames.get() if each not in frames))
        _tell_jax(thread)


def _others_run() -> list[None]:
    """A list that stays empty until the next turn of this thread's event loop, if there is one."""
    turns: list[None] = []
    with contextlib.suppress(RuntimeError):
        asyncio.get_running_loop().call_soon(turns.append, None)
    return turns


def _tell_jax(thread: int) -> None:
    frames = active()
    seen = _turns[thread], knowledge()
    key: Hashable = (*seen, *(frame.key for frame in frames)) if frames else ()
    # While other tasks of this thread have frames of their own, no cached trace is reused.
    _key(key if _open[thread] == len(frames) else object()).__enter__()
