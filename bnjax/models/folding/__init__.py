"""Batch norm folded into the conv or dense layer before it, for evaluation: fold."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx, traverse_util
from flax.core import meta, unfreeze
from rich.table import Table
from rich.text import Text

from bnjax._tables import Name, Shown
from bnjax._words import number_of
from bnjax.models import checks
from bnjax.models.batches import Inputs, Layout, layout
from bnjax.models.folding.program import Call, Program, pair
from bnjax.models.frames import Settings, settings
from bnjax.models.nnx_copies import Copy
from bnjax.models.saved import variables_of_model
from bnjax.models.visits import Path, Visit, applying, path_of, setting, visiting


class Row(NamedTuple):
    """One line of a report: a layer, the batch norm after it, and why they were not folded."""

    layer: str
    batch_norm: str
    reason: str | None


@dataclasses.dataclass(frozen=True, repr=False)
class Report(Shown):
    """What was folded, what was not and why: `print(report)` shows a table, so does a notebook.

    Attributes:
        rows: each conv or dense layer and each batch norm, by path; `reason` is None where folded.
        max_difference: largest difference that folding made to an output on `example_x`, computed
            with the highest matmul precision.
        scale: the largest magnitude in that output.
        tolerance: how large `max_difference / scale` may be.
    """

    rows: tuple[Row, ...]
    max_difference: float
    scale: float
    tolerance: float

    def __repr__(self) -> str:
        """What came of it, in a line."""
        return f"Report({self._folded} folded; {self._difference})"

    @property
    def _folded(self) -> str:
        return number_of(sum(row.reason is None for row in self.rows), "layer")

    @property
    def _difference(self) -> str:
        largest = f"largest output difference {self.max_difference:.2g}"
        return f"{largest}, of outputs up to {self.scale:.3g}"

    def __rich__(self) -> Table:
        """The table, for rich."""
        table = Table(title=f"{self._folded} folded", caption=self._difference)
        for column in ("layer", "batch norm", "result"):
            table.add_column(column)
        for row in self.rows:
            result = "folded" if row.reason is None else f"not folded: {row.reason}"
            table.add_row(Name(row.layer or "-"), Name(row.batch_norm or "-"), Text(result))
        return table


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Folded:
    """A model in evaluation, without the batch norms that were folded.

    Attributes:
        variables: its variables: folded kernels and biases, and nothing of those batch norms. Of
            an nnx model they are a dict as linen has it: of collections, by path.
        report: what was folded, what was not and why, and what it changed in the outputs.
    """

    variables: dict[str, Any]
    report: Report
    _model: nn.Module | Copy
    _form: "_Form"
    _layers: frozenset[Path]
    # For each path of a folded batch norm, the dtypes of its input and output.
    _norms: Mapping[Path, tuple[Any, Any]]
    _settings: tuple[Settings, ...]
    _key: Any = dataclasses.field(default_factory=object)

    def __repr__(self) -> str:
        """What came of it, in a line."""
        return f"Folded({self.report!r})"

    def __rich__(self) -> Report:
        """The report, for rich and notebooks."""
        return self.report

    def _repr_mimebundle_(self, **which: Any) -> dict[str, str]:
        return self.report._repr_mimebundle_(**which)

    @property
    def max_difference(self) -> float:
        """Largest difference that folding made to an output on `example_x`."""
        return self.report.max_difference

    def apply(self, variables: Mapping[str, Any], x: Any) -> Any:
        """The output of the model: pure, and for `jax.jit`, `jax.grad` and `jax.export`.

        Args:
            variables: those of this object, or others of the same tree.
            x: an input like `example_x`, of any batch size.

        Raises:
            ValueError: the variables still hold a batch norm that was folded.
        """
        held = {key[1:-1] for key in _flat(variables)}
        if unfolded := ["/".join(path) for path in self._norms if path in held]:
            raise ValueError(
                f"`variables` must be those of the folded model, but hold the batch norms "
                f"{unfolded}, which are folded. Pass `folded.variables`."
            )
        again = [each.again() for each in self._settings]
        with applying(*again, outermost=True), visiting(self._norm, self._linear, key=self._key):
            return self._form(self._model, variables, x)

    def _norm(self, visit: Visit) -> Any:
        if visit.path not in self._norms:
            return visit.run()
        before, after = self._norms[visit.path]
        return visit.x.astype(after) if visit.x.dtype == before else visit.x

    def _linear(self, layer: Any, call: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        fields = {"use_bias": True} if path_of(layer) in self._layers else {}
        with setting(layer, **fields):
            return call(*args, **kwargs)


def fold(
    model: nn.Module | nnx.Module,
    variables: Mapping[str, Any] | nnx.State | None,
    example_x: Any,
    *,
    inputs: Inputs | None = None,
    apply_kwargs: Mapping[str, Any] | None = None,
) -> Folded:
    """The model with its batch norms folded into the conv or dense layers before them.

    In evaluation `(conv(x) + b - mean) * s + bias`, with `s = scale / sqrt(var + eps)`, is a conv
    with the kernel `kernel * s` and the bias `(b - mean) * s + bias` (Jacob et al. 2018, section
    3.2). It is done, in float64, to each `nn.Conv`, `ConvLocal`, `ConvTranspose`, `Dense` and
    `DenseGeneral` (of nnx: `Conv`, `ConvTranspose`, `Linear` and `LinearGeneral`) whose output goes
    into one batch norm and nowhere else, over its channels. That is read off the program of the
    forward pass (its jaxpr), whatever the nesting; what stands in a loop (`nn.scan`) or under
    `vmap` stays as it is. The result is compared with the model.

    Args:
        model: a linen or nnx model with batch norms, bnjax's or Flax's own. An nnx model is taken
            as it is after `.eval()`. Where `override` or `freeze` holds here, it holds in `apply`.
        variables: its variables. They are not touched. Of an nnx model an `nnx.State`, or None for
            its own.
        example_x: an input of the model. What was folded is right for inputs that take the same
            way through the model's Python code: of another batch size, say.
        inputs: which entries of a batch to call the model with, as for `training.train_step`, such
            as `("obs", "action")`. Then `example_x` and what `apply` gets are batches, dicts.
        apply_kwargs: passed to the model's call, such as `{"train": False}`.

    Returns:
        The folded model: `variables`, `apply` and `report`.

    Raises:
        ValueError: variables of another model, no batch norm, one in training mode, nothing to
            fold, or an output that folding changed by more than the tolerance: the square root of
            the machine epsilon of the coarsest dtype in the model (3.5e-4 in float32), times the
            largest output. Integers, such as classes, are not compared.
        TypeError: the model is no Flax model, or the variables of an nnx model no `nnx.State`.

    >>> model = nn.Sequential([nn.Dense(2), nn.BatchNorm(use_running_average=True)])
    >>> x = jnp.ones((1, 3))
    >>> folded = fold(model, model.init(jax.random.key(0), x), x)
    >>> [tuple(row) for row in folded.report.rows]
    [('layers_0', 'layers_1', None)]
    >>> jax.tree.map(jnp.shape, folded.variables)
    {'params': {'layers_0': {'bias': (2,), 'kernel': (3, 2)}}}
    """
    checks.flax_model(model)
    variables = variables_of_model(model, variables)
    form = _Form(None if inputs is None else layout(inputs), dict(apply_kwargs or {}))
    if isinstance(model, nnx.Module):
        copy = Copy(model, variables)
        return _fold(copy, copy.variables, example_x, form)
    return _fold(model, variables, example_x, form)


@dataclasses.dataclass(frozen=True)
class _Form:
    """How a model is called with an input, or with the entries of a batch."""

    layout: Layout | None
    kwargs: Mapping[str, Any]

    def __call__(self, model: Any, variables: Any, x: Any) -> Any:
        args, kwargs = ((x,), {}) if self.layout is None else self.layout.call(x)
        y = model.apply(variables, *args, **kwargs, **self.kwargs)
        return y[0] if self.kwargs.get("mutable") else y


def _fold(model: nn.Module | Copy, variables: Any, x: Any, form: _Form) -> Folded:
    program = Program(functools.partial(form, model), variables, x)
    unknown = program.strangers | getattr(model, "strangers", {})
    checks.some_batch_norm(any(call.norm for call in program.calls), unknown)
    pairs, reasons = pair(program)
    rows = tuple(Row("/".join(layer), "/".join(norm), why) for layer, norm, why in reasons)
    why = "bnjax.register({0}, ...) tells what it does; {0} is not known".format
    rows += tuple(Row("", path, why(kind)) for path, kind in sorted(unknown.items()))
    if all(reason for *_, reason in rows):
        lines = [f"\n  {layer or '-'}, {norm or '-'}: {reason}." for layer, norm, reason in rows]
        raise ValueError(f"`model` must have a batch norm that can be folded.{''.join(lines)}")
    flat = _flat(variables)
    for layer, norm in pairs:
        _absorb(flat, layer, norm)
    norms, layers = {n.path: n.dtypes for _, n in pairs}, frozenset(p.path for p, _ in pairs)
    new = traverse_util.unflatten_dict(
        {key: leaf for key, leaf in flat.items() if key[1:-1] not in norms}
    )
    held = (meta.unbox(v).dtype for k, v in flat.items() if k[1:-1] in norms or k[1:-1] in layers)
    numbers = [d for d in (*program.dtypes, *held) if jnp.issubdtype(d, jnp.inexact)]
    tolerance = max(float(jnp.finfo(dtype).eps) for dtype in numbers) ** 0.5
    folded = Folded(
        new,
        Report(rows, 0, 0, tolerance),
        model.holding(new) if isinstance(model, Copy) else model,
        form,
        layers,
        norms,
        settings(),
    )
    difference, scale = _difference(folded, model, variables, x)
    if not difference <= tolerance * scale:
        raise ValueError(
            f"The outputs on `example_x` must stay the same, to {tolerance:.1e} of their scale "
            f"{scale:.3g}, but folding changed them by {difference:.3g}. Is there NaN or inf in "
            "them, or does a layer change its kernel before using it, or a registered batch norm "
            "its scale?"
        )
    report = Report(rows, difference, scale, tolerance)
    return dataclasses.replace(folded, report=report)


def _flat(variables: Any) -> dict[Path, Any]:
    return traverse_util.flatten_dict(unfreeze(variables))


def _absorb(flat: dict[Path, Any], layer: Call, norm: Call) -> None:
    """Fold the batch norm into the kernel and bias of the layer."""

    def read(collection: str, path: Path, name: str, default: float) -> np.ndarray:
        value = np.asarray(meta.unbox(flat.get((collection, *path, name), default)))
        return value.astype(np.complex128 if np.iscomplexobj(value) else np.float64)

    def write(name: str, value: np.ndarray, like: Any) -> None:
        old = meta.unbox(like)
        new = jnp.asarray(value.astype(old.dtype))
        # What is tied to no device stays so: a committed array compiles as a sharded program.
        if isinstance(old, jax.Array) and old.committed and old.shape == new.shape:
            new = jax.device_put(new, old.sharding)
        key = ("params", *layer.path, name)
        flat[key] = meta.replace_boxed(flat[key], new) if key in flat else new

    mean, var = (read("batch_stats", norm.path, name, 0) for name in ("mean", "var"))
    scale = read("params", norm.path, "scale", 1) if "scale" in norm.affine else 1
    shift = read("params", norm.path, "bias", 0) if "bias" in norm.affine else 0
    factor = scale / np.sqrt(var + norm.eps)
    bias = read("params", layer.path, "bias", 0) if layer.affine else 0
    kernel = flat[("params", *layer.path, "kernel")]
    like = flat[("params", *layer.path, "bias")] if layer.affine else kernel
    write("bias", np.broadcast_to((bias - mean) * factor + shift, layer.bias_shape), like)
    factor = factor[:, None] if layer.transposed else factor
    write("kernel", read("params", layer.path, "kernel", 0) * factor, kernel)


def _difference(folded: Folded, model: Any, variables: Any, x: Any) -> tuple[float, float]:
    """The largest difference to the outputs of the model, and the scale of that output."""

    @jax.jit
    def both(variables: Any, new: Any, x: Any) -> Any:
        expected = folded._form(model, variables, x)
        return expected, folded.apply(new, x)

    # On accelerators the default precision rounds inputs of a conv, which folding has scaled.
    with jax.default_matmul_precision("highest"):
        outputs = both(variables, folded.variables, x)
    found = []
    for expected, actual in zip(*map(jax.tree.leaves, outputs), strict=True):
        if not jnp.issubdtype(expected.dtype, jnp.inexact):
            continue  # rounding decides between two that are next to each other
        a, b = (np.asarray(leaf).astype(np.complex128) for leaf in (actual, expected))
        with np.errstate(invalid="ignore"):
            difference = np.max(np.where(a == b, 0, np.abs(a - b)), initial=0)
        found.append((difference, np.max(np.abs(b[np.isfinite(b)]), initial=0)))
    lost = [pair for pair in found if np.isnan(pair[0])]
    worst = max(lost or found, key=lambda pair: pair[0] / (pair[1] or 1), default=(0, 0))
    return float(worst[0]), float(worst[1])
