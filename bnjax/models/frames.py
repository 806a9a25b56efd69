"""Frames around a running model: settings of its batch norms, and visitors of their calls."""

import contextlib
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any, NamedTuple

import chex

from bnjax import globs
from bnjax.layers.conventions import as_written
from bnjax.models.compat import is_tracing
from bnjax.models.contexts import Frame, active
from bnjax.models.conventions import Facts

# Patterns and field names that matched a batch norm while a program was traced. Later calls of the
# program trace and meet nothing. The set stays small, since users write these by hand.
_fitted: set[tuple[str, frozenset[str]]] = set()


class Settings(Frame):
    """Fields for the batch norms whose path matches, while it is active.

    Attributes:
        of_nnx: whether it applies only to the layers of an nnx model.
        met: the paths of the batch norms that were called.
        traced: those that were called while tracing, and may run compiled without a call.
    """

    def __init__(
        self,
        key: Hashable,
        patterns: tuple[str, ...],
        fields: Mapping[str, Any],
        of_nnx: bool = False,
    ) -> None:
        super().__init__(key)
        self.fields, self.of_nnx = fields, of_nnx
        self.matchers = {pattern: globs.matcher(pattern) for pattern in patterns}
        self.met: set[str] = set()
        self.traced: set[str] = set()

    def again(self) -> "Settings":
        """A copy, to activate elsewhere."""
        return Settings(self.key, tuple(self.matchers), self.fields, self.of_nnx)

    @contextlib.contextmanager
    def each_fits(self) -> Iterator[None]:
        """A context after which each pattern must have matched a batch norm that was called."""
        failed = True
        try:
            yield
            failed = False
        finally:
            for pattern, fits in self.matchers.items():
                words = pattern, frozenset(self.fields)
                if any(map(fits, self.traced)):
                    _fitted.add(words)
                if not failed:
                    fitting = any(map(fits, self.met)) or words in _fitted
                    globs.check_fits(pattern, fitting, self.met, unknown=self.strangers)

    def meet(self, path: str) -> Mapping[str, Any]:
        """The fields for a batch norm that is being called."""
        self.met.add(path)
        if is_tracing():
            self.traced.add(path)
        return self.fields if any(fits(path) for fits in self.matchers.values()) else {}


class Visitor(Frame):
    """A function that handles each call of a batch norm, and one for linear layers."""

    def __init__(self, norm: Callable, linear: Callable | None, key: Hashable) -> None:
        super().__init__(key)
        self.norm, self.linear = norm, linear


class Examples(Frame):
    """Mask and banks of the examples, while it is active.

    Attributes:
        mask: which examples count, bool (N,); None for all.
        bank: the bank of each example, int32 (N,), or of all; None if unspecified.
    """

    def __init__(self, mask: chex.Array | None, bank: chex.Array | None) -> None:
        super().__init__(object())
        self.mask, self.bank = mask, bank


class Met(NamedTuple):
    """How a batch norm that keeps statistics ran in a call."""

    facts: Facts
    moves: bool  # whether its statistics are updated
    frozen: bool  # by a context rather than by the model


class Watch(Frame):
    """A training step, which records the batch norms that are called while it is active.

    It is compiled as one program, where batch norms see all devices without a mapped axis.

    Attributes:
        step: the number of the step, int32, ().
        met: how the batch norms that keep statistics ran, by path.
    """

    def __init__(self, step: chex.Array) -> None:
        super().__init__(object())
        self.step = step
        # Evaluated out here: inside a loop over micro-batches they would be tracers of that loop.
        momenta = [each.fields.get("momentum") for each in settings()]
        momenta = [as_written(each, torch=torch) for each in momenta for torch in (True, False)]
        self._momenta = {each: each(step) for each in momenta if callable(each)}
        self.met: dict[str, Met] = {}

    def momentum(self, schedule: Callable) -> Any:
        """The value of a schedule at this step."""
        return self._momenta[schedule] if schedule in self._momenta else schedule(self.step)

    def meet(self, visit: Any) -> None:
        """Record a visit."""
        if visit.facts.tracked:
            self.met["/".join(visit.path)] = Met(
                visit.facts, not visit.running, visit.mode_is_forced
            )


def settings() -> tuple[Settings, ...]:
    """The active settings, innermost last."""
    return tuple(frame for frame in active() if isinstance(frame, Settings))


def settings_key() -> Hashable:
    """A key of the active settings, for caches."""
    return tuple(frame.key for frame in settings())
