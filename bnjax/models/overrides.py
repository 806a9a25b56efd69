"""Override the settings of batch norms by module path, in any model: override, freeze."""

import contextlib
import dataclasses
import weakref
from collections.abc import Hashable, Iterator
from typing import Any

import numpy as np
from flax import nnx

from bnjax import globs
from bnjax.core.policies import Policy
from bnjax.models import checks
from bnjax.models.contexts import Reentrant
from bnjax.models.conventions import FROZEN, OWN_LINEN
from bnjax.models.frames import Settings
from bnjax.models.freezing import batch_norms, fitting
from bnjax.models.visits import applying, is_marked, mark, unmark


class override(Reentrant):  # noqa: N801 - used as a function is
    """A context that overrides the settings of every batch norm whose module path matches.

    It works for bnjax's linen layers, `flax.linen.BatchNorm` and subclasses of both, in any model,
    without changing its code, under `jit` (a function compiled before is recompiled), `nn.remat`
    and `nn.scan`. Contexts nest, and the innermost wins. Each applies only to the thread and
    asyncio task that entered it, and can be entered again.

    Guide: examples/guides/freezing.md

    Args:
        paths: a glob over module paths or several, such as `"encoder/**"` or `"**/bn1"`; `*`
            matches within one name, `**` any number of names.
        **fields: settings, by the names of the layers' fields and in each layer's convention: a
            PyTorch momentum of 0.01 is 0.99 in a Flax layer. `use_running_average` takes precedence
            over what the model passes to the call. A momentum may be traced, if the context is
            entered where it is traced. It may also be an optax schedule or another function of the
            step number: that of the step if a bnjax training step runs the model, linen or nnx, and
            the layer's own `count` otherwise. Neither recompiles when its value changes.

            `using`, a policy from `bnjax.policies`, works on every batch norm, including Flax's and
            registered ones: bnjax then computes their call.

    Raises:
        TypeError: no layer has a field with that name.
        ValueError: a pattern matches no batch norm that was called; the error lists their paths.
    """

    def __init__(self, paths: globs.Paths, **fields: Any) -> None:
        known = {field.name for layer in OWN_LINEN for field in dataclasses.fields(layer)}
        checks.known_fields(fields, known - {"parent", "name"})
        checks.policy(fields.get("using"), Policy)
        self._patterns, self._fields = globs.as_tuple(paths), fields
        self._key = (self._patterns, _plain(tuple(sorted(fields.items(), key=lambda f: f[0]))))

    @contextlib.contextmanager
    def _entered(self) -> Iterator[None]:
        frame = Settings(self._key, self._patterns, self._fields)
        with applying(frame), frame.each_fits():
            yield


class override_nnx(override):  # noqa: N801
    """A context that overrides the settings of the batch norms of an nnx model.

    It works for bnjax's layers, `flax.nnx.BatchNorm` and subclasses of both, also under `nnx.jit`
    and the other transformations. Contexts nest, and the innermost wins. For a model trained by
    `bnjax.nnx.train_step`, `bnjax.override` does the same.

    Args:
        model: a module; a batch norm itself has the path "".
        paths: a glob over attribute paths or several, such as `"encoder/**"`.
        **fields: as for `bnjax.override`.

    Raises:
        TypeError: no layer has a field with that name.
        ValueError: a pattern matches no batch norm; the error lists their paths.

    >>> import bnjax, jax.numpy as jnp
    >>> from flax import nnx
    >>> layer = nnx.BatchNorm(1, use_running_average=True, rngs=nnx.Rngs(0))
    >>> with bnjax.nnx.override(layer, using=bnjax.policies.Batch()):
    ...     y = layer(jnp.array([[1.0], [3.0]]))
    >>> y[:, 0].round(2).tolist()
    [-1.0, 1.0]
    """

    def __init__(self, model: nnx.Module, paths: globs.Paths = "**", **fields: Any) -> None:
        checks.flax_model(model)
        super().__init__(paths, **fields)
        fitting(model, paths)
        self._model = model

    @contextlib.contextmanager
    def _entered(self) -> Iterator[None]:
        frame = Settings(self._key, self._patterns, self._fields, of_nnx=True)
        new = [(path, layer) for path, layer in batch_norms(self._model) if not is_marked(layer)]
        for path, layer in new:
            mark(layer, tuple(path.split("/")) if path else ())
        try:
            with applying(frame):
                yield
        finally:
            for _, layer in new:
                unmark(layer)


def freeze(paths: globs.Paths) -> override:
    """A context that freezes the batch norms whose module path matches, even in training.

    They normalize with their running statistics and leave them unchanged, bit for bit. To keep an
    optimizer from their parameters, pass the same patterns to `bnjax.trainable_labels`.

    Guide: examples/guides/freezing.md

    Args:
        paths: a glob over module paths or several, as for `override`.
    """
    return override(paths, **FROZEN)


def _plain(value: Any) -> Hashable:
    """A cache key for a setting that keeps nothing alive; unique if there is no such key."""
    if isinstance(value, list | tuple):
        return tuple(map(_plain, value))
    if callable(value):
        with contextlib.suppress(TypeError):
            return weakref.ref(value)
    if isinstance(value, Policy):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return type(value), _plain(tuple(fields.values()))
    plain = value is None or isinstance(value, bool | int | float | str | np.number)
    return (type(value), value) if plain else object()
