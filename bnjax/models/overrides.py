"""Settings by module path, for any linen model, whoever wrote it: override, freeze."""

import contextlib
import dataclasses
import weakref
from collections.abc import Hashable
from contextvars import ContextVar
from types import TracebackType
from typing import Any

import numpy as np

from bnjax import globs
from bnjax.models import checks
from bnjax.models.conventions import OWN_LINEN
from bnjax.models.frames import Settings
from bnjax.models.visits import applying

# Patterns, and names of fields, that fitted a batch norm while a program was traced. Called again,
# it is not traced, and nothing is met. They are the user's own words, so they are few.
_fitted: set[tuple[str, frozenset[str]]] = set()
_entered: ContextVar[tuple[tuple[Any, Settings, Any], ...]] = ContextVar(
    "bnjax.entered", default=()
)


class override(contextlib.ContextDecorator):  # noqa: N801 - used as a function is
    """A context in which every batch norm whose module path fits takes other settings.

    It holds for bnjax's linen layers and for `flax.linen.BatchNorm`, and subclasses of both, in any
    model, without touching its code, under `jit` (a function that was compiled before is compiled
    anew), `nn.remat` and `nn.scan`. Contexts nest, and the inner one wins. Each belongs to the
    thread and to the asyncio task that entered it, and can be entered again.

    Guide: examples/guides/freezing.md

    Args:
        paths: a glob over module paths or several, such as `"encoder/**"` or `"**/bn1"`; `*` is a
            part of one name, `**` any number of names.
        **fields: the settings, by the names of the layers' fields and in their convention: a
            momentum of 0.01 means 0.99 in a layer of Flax's. `use_running_average` wins over what
            the model passes to the call. A momentum may be traced: then the context must be entered
            where it is traced. It may be a schedule of optax, or another function of the number of
            the step, where a step of bnjax runs the model, linen or nnx; else of the layer's own
            count. Neither compiles anew when it changes.

    Raises:
        TypeError: no layer has a field of that name.
        ValueError: a pattern fits no batch norm that was called; the paths there are, are listed.
    """

    def __init__(self, paths: globs.Paths, **fields: Any) -> None:
        known = {field.name for layer in OWN_LINEN for field in dataclasses.fields(layer)}
        checks.known_fields(fields, known - {"parent", "name"})
        self._patterns, self._fields = globs.as_tuple(paths), fields
        self._key = (self._patterns, _plain(tuple(sorted(fields.items(), key=lambda f: f[0]))))

    def __enter__(self) -> None:
        """Let the settings hold."""
        frame = Settings(self._key, self._patterns, self._fields)
        context = applying(frame)
        context.__enter__()
        _entered.set((*_entered.get(), (self, frame, context)))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End them, and look whether each pattern has fitted."""
        ours = [each for each in _entered.get() if each[0] is self][-1]
        _entered.set(tuple(each for each in _entered.get() if each is not ours))
        _, frame, context = ours
        context.__exit__(kind, error, trace)
        for pattern, fits in frame.matchers.items():
            words = pattern, frozenset(frame.fields)
            if any(map(fits, frame.traced)):
                _fitted.add(words)
            if error is None:
                fitting = any(map(fits, frame.met)) or words in _fitted
                globs.check_fits(pattern, fitting, frame.met, unknown=frame.strangers)


def freeze(paths: globs.Paths) -> override:
    """A context in which the batch norms whose module path fits are frozen, in training too.

    They normalize with their running statistics, and those stay as they are, bit for bit. The same
    patterns keep an optimizer from their parameters: `bnjax.trainable_labels`.

    Guide: examples/guides/freezing.md

    Args:
        paths: a glob over module paths or several, as for `override`.
    """
    return override(paths, use_running_average=True)


def _plain(value: Any) -> Hashable:
    """A value by which JAX's caches can tell settings apart, if it keeps nothing alive."""
    if isinstance(value, list | tuple):
        return tuple(map(_plain, value))
    if callable(value):
        with contextlib.suppress(TypeError):
            return weakref.ref(value)
    plain = value is None or isinstance(value, bool | int | float | str | np.number)
    return (type(value), value) if plain else object()
