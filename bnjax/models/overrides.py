"""Settings by module path, for any linen model, whoever wrote it: override, freeze."""

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

            `using`, a policy of `bnjax.policies`, is a field of every batch norm here, Flax's and
            registered ones too: bnjax then computes their call.

    Raises:
        TypeError: no layer has a field of that name.
        ValueError: a pattern fits no batch norm that was called; the paths there are, are listed.
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
    """A context in which the batch norms of an nnx model take other settings.

    It holds for bnjax's layers and for `flax.nnx.BatchNorm`, and subclasses of both, also under
    `nnx.jit` and the other transformations. Contexts nest, and the inner one wins. For the model
    that `bnjax.nnx.train_step` trains, `bnjax.override` does the same.

    Args:
        model: a module; a batch norm itself has the path "".
        paths: a glob over attribute paths or several, such as `"encoder/**"`.
        **fields: as for `bnjax.override`.

    Raises:
        TypeError: no layer has a field of that name.
        ValueError: a pattern fits no batch norm; the paths there are, are listed.

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
    """A context in which the batch norms whose module path fits are frozen, in training too.

    They normalize with their running statistics, and those stay as they are, bit for bit. The same
    patterns keep an optimizer from their parameters: `bnjax.trainable_labels`.

    Guide: examples/guides/freezing.md

    Args:
        paths: a glob over module paths or several, as for `override`.
    """
    return override(paths, **FROZEN)


def _plain(value: Any) -> Hashable:
    """A value by which JAX's caches can tell settings apart, if it keeps nothing alive."""
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
