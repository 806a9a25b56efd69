"""A model with folded batch norms."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx, traverse_util
from flax.core import unfreeze

from bnjax.models.attributes import path_of, setting, variables_of
from bnjax.models.batches import Layout
from bnjax.models.folding.edits import Edits
from bnjax.models.folding.numbers import PAD, Merge
from bnjax.models.folding.report import Report
from bnjax.models.folding.windows import Window, taps
from bnjax.models.frames import Settings
from bnjax.models.nnx_copies import Copy, arrays_of, with_arrays
from bnjax.models.statistics import Path
from bnjax.models.visit import Visit
from bnjax.models.visits import applying, visiting


@dataclasses.dataclass(frozen=True)
class Form:
    """How to call a model with an input or with the entries of a batch."""

    layout: Layout | None
    kwargs: Mapping[str, Any]

    def __call__(self, model: Any, variables: Any, x: Any) -> Any:
        """The output of the model."""
        args, kwargs = ((x,), {}) if self.layout is None else self.layout.call(x)
        y = model.apply(variables, *args, **kwargs, **self.kwargs)
        return y[0] if self.kwargs.get("mutable") else y


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Folded:
    """A model in evaluation, without the batch norms that were folded.

    Attributes:
        variables: its variables, with folded kernels and biases, and without folded batch norms and
            merged branches. For an nnx model, a dict of collections, by path, as in linen.
        report: what was folded, what was not, why, and how much the outputs changed.
    """

    variables: dict[str, Any]
    report: Report
    _model: nn.Module | Copy
    _form: Form
    _edits: Edits
    _settings: tuple[Settings, ...]
    _key: Any = dataclasses.field(default_factory=object)

    def __repr__(self) -> str:
        """The result on one line."""
        return f"Folded({self.report!r})"

    def __rich__(self) -> Report:
        """The report, for rich and notebooks."""
        return self.report

    def _repr_mimebundle_(self, **which: Any) -> dict[str, str]:
        return self.report._repr_mimebundle_(**which)

    @property
    def max_difference(self) -> float:
        """The largest change of an output on `example_x`."""
        return self.report.max_difference

    def apply(self, variables: Mapping[str, Any], x: Any) -> Any:
        """The output of the model: a pure function, for `jax.jit`, `jax.grad` and `jax.export`.

        Args:
            variables: those of this object, or others with the same structure. Their folded kernels
                are quantized, if there is a `quantize`.
            x: an input like `example_x`, of any batch size.

        Raises:
            ValueError: the variables still hold a folded batch norm, or merged branches would be
                aligned differently for an input of this size.
        """
        flat = flat_of(variables)
        held = {key[1:-1] for key in flat}
        if unfolded := ["/".join(path) for path in self._edits.norms if path in held]:
            raise ValueError(
                f"`variables` must be those of the folded model, but still hold the batch norms "
                f"{unfolded}. Pass `folded.variables`."
            )
        if self._edits.quantize is not None:
            variables = traverse_util.unflatten_dict(self._edits.quantized(flat))
        again = [each.again() for each in self._settings]
        with applying(*again, outermost=True), visiting(self._norm, self._linear, key=self._key):
            return self._form(self._model, variables, x)

    def refold(self, variables: Any) -> dict[str, Any]:
        """Fold other variables of the model: a pure function, for `jax.jit` and `jax.grad`.

        Args:
            variables: variables of the unfolded model, such as after more training; for an nnx
                model, an `nnx.State` or the model itself.

        Returns:
            Variables for `apply`, computed in the precision of the parameters, float32 at least.
        """
        return traverse_util.unflatten_dict(self._edits.fold(self._unfolded(variables), jnp))

    def fake_quantize(self, variables: Any) -> Any:
        """Variables for quantization-aware training of the unfolded model.

        Each kernel W that folds to `W * s`, with `s = scale / sqrt(var + eps)` from the running
        variance, becomes `quantize(W * s) / s`. With these, the model trains as
        `torch.ao.nn.intrinsic.qat.ConvBn2d` does, for any layer that folds: batch norms normalize
        by the batch and update their statistics; gradients reach W and scale through `quantize`,
        but not the running variance. In evaluation, the model computes the same as `fold` with the
        same `quantize`.

        Where s is 0, W is unchanged. When branches are merged into a kernel K, the largest one, W,
        carries the whole error: it becomes `W + (quantize(K) - K) / s`, or stays W where s is 0.

        Args:
            variables: variables of the unfolded model. For an nnx model, its `nnx.State`, or the
                model itself: the returned model then shares everything but those kernels with it,
                so calling one updates the running statistics of both.

        Raises:
            ValueError: the model was folded without `quantize`, or the variables do not fit it.

        >>> import bnjax
        >>> step = 0.25
        >>> model = nn.Sequential([nn.Dense(2), nn.BatchNorm(use_running_average=True)])
        >>> x = jnp.ones((1, 3))
        >>> variables = model.init(jax.random.key(0), x)
        >>> quantize = lambda kernel: step * jnp.round(kernel / step)
        >>> folded = bnjax.fold(model, variables, x, quantize=quantize)
        >>> y = model.apply(folded.fake_quantize(variables), x)
        >>> bool(jnp.allclose(y, folded.apply(folded.variables, x)))
        True
        """
        if self._edits.quantize is None:
            raise ValueError(
                "The model must be folded with `quantize` to train for it, got None. Write "
                "fold(model, variables, example_x, quantize=...)."
            )
        flat = self._unfolded(variables)
        new = self._edits.fake_quantize(flat)
        if isinstance(variables, nnx.Module):
            graph, state = nnx.split(variables)
            return nnx.merge(graph, with_arrays(state, new))
        if isinstance(variables, nnx.State):
            return with_arrays(variables, new)
        return traverse_util.unflatten_dict({**flat, **new})

    def _unfolded(self, variables: Any) -> dict[Path, Any]:
        """Variables of the unfolded model, by collection and path."""
        if isinstance(variables, nnx.Module):
            variables = nnx.state(variables)
        flat = arrays_of(variables) if isinstance(variables, nnx.State) else flat_of(variables)
        wanted = [("params", *path, "kernel") for path in (*self._edits.layers, *self._edits.gone)]
        norms = {*self._edits.norms, *self._edits.gone}
        wanted = [key for key in wanted if key[1:-1] not in norms]
        wanted += [("batch_stats", *path, "var") for path in self._edits.norms]
        if missing := sorted("/".join(key) for key in wanted if key not in flat):
            raise ValueError(
                "`variables` must be those of the unfolded model, but these are missing: "
                f"{missing}."
            )
        return flat

    def _norm(self, visit: Visit) -> Any:
        if visit.path in self._edits.gone:
            dtypes = self._edits.gone[visit.path].branch.dtypes
            return jnp.zeros(jnp.shape(visit.x), _result(visit.x, dtypes))
        if visit.path not in self._edits.norms:
            return visit.run()
        dtype = _result(visit.x, self._edits.norms[visit.path])
        return jnp.asarray(visit.x, dtype)

    def _linear(self, layer: Any, call: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        path = path_of(layer)
        if path not in self._edits.layers and path not in self._edits.gone:
            return call(*args, **kwargs)
        rest = {name: value for name, value in kwargs.items() if args or name != "inputs"}
        x = jnp.asarray(args[0] if args else kwargs["inputs"])
        if path in self._edits.gone:
            return _zeros(self._edits.gone[path], x)
        for merge in self._edits.merges.get(path, ()):
            _aligned(merge, x)
        fields: dict[str, Any] = {"use_bias": True}
        if path in self._edits.padded:
            fields["padding"] = "VALID"
            x = _padded(x, variables_of(layer)["params"][PAD], self._edits.padded[path])
        with setting(layer, **fields):
            return call(x, *args[1:], **rest)


def _result(x: Any, dtypes: tuple[Any, Any]) -> Any:
    """The output dtype of a layer that returned the second dtype for the first."""
    return dtypes[1] if x.dtype == dtypes[0] else x.dtype


def _zeros(merge: Merge, x: jax.Array) -> jax.Array:
    """The output of a merged branch: zeros, which XLA does not have to add."""
    linear = merge.branch.linear
    shape = merge.window.output(x.shape, linear.bias_shape[-1])
    return jnp.zeros(shape, _result(x, merge.branch.dtypes))


def _aligned(merge: Merge, x: jax.Array) -> None:
    """Check that a branch reads the same values of the input as when it was merged."""
    window = merge.host.linear.window
    if window is not None and taps(window, merge.window, x.shape) != merge.taps:
        branch, host = ("/".join(call.path) for call in (merge.branch, merge.host))
        raise ValueError(
            f"`x` must be padded at '{host}' as `example_x` was, because '{branch}' was merged "
            f"into it, but its shape there is {x.shape}, not {merge.host.input}. Fold the model "
            "with an input of this size."
        )


def _padded(x: jax.Array, value: jax.Array, window: Window) -> jax.Array:
    """Pad an input with a value per channel."""
    pads = window.pads(x.shape)
    if not any(map(any, pads)):
        return x
    widths = [(0, 0)] * (x.ndim - len(pads) - 1) + [*pads, (0, 0)]
    inside = jnp.pad(
        jnp.ones([1] * (x.ndim - len(pads) - 1) + [*x.shape[-len(pads) - 1 : -1], 1], bool), widths
    )
    return jnp.where(inside, jnp.pad(x, widths), value.astype(x.dtype))


def flat_of(variables: Any) -> dict[Path, Any]:
    """Variables by collection and path."""
    return traverse_util.flatten_dict(unfreeze(variables))
