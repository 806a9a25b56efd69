"""Fold batch norms into the conv and dense layers around them, for evaluation."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx, traverse_util
from flax.core import meta

from bnjax import globs
from bnjax.models import checks
from bnjax.models.batches import Inputs, layout
from bnjax.models.folding.edits import Edits, Quantize
from bnjax.models.folding.folded import Folded, Form, flat_of
from bnjax.models.folding.numbers import Numbers
from bnjax.models.folding.plan import plan
from bnjax.models.folding.program import Program
from bnjax.models.folding.report import Branch, Report, Row
from bnjax.models.frames import settings
from bnjax.models.nnx_copies import Copy
from bnjax.models.saved import variables_of_model

__all__ = ["Branch", "Folded", "Report", "Row", "fold"]


def fold(
    model: nn.Module | nnx.Module,
    variables: Mapping[str, Any] | nnx.State | None,
    example_x: Any,
    *,
    inputs: Inputs | None = None,
    apply_kwargs: Mapping[str, Any] | None = None,
    quantize: Quantize | None = None,
) -> Folded:
    """Fold the batch norms of a model into the conv and dense layers around them.

    In evaluation, `(conv(x) + b - mean) * s + bias` with `s = scale / sqrt(var + eps)` is a conv
    with kernel `kernel * s` and bias `(b - mean) * s + bias` (Jacob et al. 2018, section 3.2). This
    applies to each `nn.Conv`, `ConvLocal`, `ConvTranspose`, `Dense` and `DenseGeneral` (in nnx,
    `Conv`, `ConvTranspose`, `Linear` and `LinearGeneral`) whose output is used only by a batch norm
    over its channels. The new kernels are computed in float64.

    A remaining batch norm whose output is used only by conv and dense layers is folded into each of
    them: the kernel becomes `kernel * s`, scaled over its inputs, and the bias gains the sum of
    `kernel * (bias - mean * s)`. A conv that pads with zeros then pads with the value that the
    batch norm maps to zero. Branches of one input that are added, convs of different sizes or a
    batch norm alone, become one conv (Ding et al. 2021, RepVGG).

    The traced forward pass (its jaxpr) shows what goes where, however the model nests its modules:
    through reshapes, transposes, slices and means, but not through nonlinearities. Layers in a loop
    (`nn.scan`) or under `vmap` stay as they are. The outputs are compared with the model's.

    Guide: examples/guides/folding.md

    Args:
        model: a linen or nnx model with bnjax's or Flax's batch norms. An nnx model is folded as in
            eval mode. An `override` or `freeze` that is active here is also active in `apply`.
        variables: its variables, which are not modified. For an nnx model, an `nnx.State`, or None
            for its own.
        example_x: an input of the model. The result is valid for all inputs that take the same path
            through the model's Python code, such as those of another batch size.
        inputs: which entries of a batch to call the model with, as for `training.train_step`, such
            as `("obs", "action")`. Then `example_x` and the input of `apply` are batches (dicts).
        apply_kwargs: extra arguments for the model's call, such as `{"train": False}`.
        quantize: a function of an array, which `apply` calls on each folded kernel, such as fake
            quantization with a straight-through gradient; `variables` hold unquantized kernels. To
            train with it, see `Folded.fake_quantize`.

    Returns:
        The folded model: `variables`, `apply`, `report`, `refold` and `fake_quantize`.

    Raises:
        ValueError: the variables do not fit the model; it has no batch norm, or one in training
            mode; nothing can be folded; or folding changed an output by more than the tolerance:
            the square root of the machine epsilon of the coarsest dtype in the model (3.5e-4 in
            float32) times the largest output. Integers, such as classes, are not compared.
        TypeError: the model is not a Flax model, the variables of an nnx model are not an
            `nnx.State`, or `quantize` is not a function.

    >>> model = nn.Sequential([nn.Dense(2), nn.BatchNorm(use_running_average=True)])
    >>> x = jnp.ones((1, 3))
    >>> folded = fold(model, model.init(jax.random.key(0), x), x)
    >>> [tuple(row) for row in folded.report.rows]
    [('layers_0', 'layers_1', None)]
    >>> jax.tree.map(jnp.shape, folded.variables)
    {'params': {'layers_0': {'bias': (2,), 'kernel': (3, 2)}}}
    """
    checks.flax_model(model)
    if not (quantize is None or callable(quantize)):
        raise TypeError(
            f"`quantize` must be a function of a kernel, got {type(quantize).__name__}."
        )
    variables = variables_of_model(model, variables)
    form = Form(None if inputs is None else layout(inputs), dict(apply_kwargs or {}))
    if isinstance(model, nnx.Module):
        copy = Copy(model, variables)
        return _fold(copy, copy.variables, example_x, form, quantize)
    return _fold(model, variables, example_x, form, quantize)


def _fold(
    model: nn.Module | Copy, variables: Any, x: Any, form: Form, quantize: Quantize | None
) -> Folded:
    program = Program(functools.partial(form, model), variables, x)
    unknown = program.strangers | getattr(model, "strangers", {})
    checks.some_batch_norm(any(call.norm for call in program.calls), unknown)
    flat = flat_of(variables)
    edits, rows, branches = plan(program, Numbers(flat, np))
    rows += [Row("", path, _why(kind)) for path, kind in sorted(unknown.items())]
    if not edits:
        lines = [f"\n  {row.layer or '-'}, {row.batch_norm or '-'}: {row.reason}." for row in rows]
        lines += [f"\n  {each.branch} + {each.into}: {each.reason}." for each in branches]
        raise ValueError(f"`model` must have a batch norm that can be folded.{''.join(lines)}")
    exact = Edits(tuple(edits))
    new = exact.fold(flat, np)
    report = Report(tuple(rows), 0, 0, _tolerance(program, exact, flat), tuple(branches))
    holding = model.holding if isinstance(model, Copy) else lambda _: model
    nested = traverse_util.unflatten_dict(new)
    folded = Folded(nested, report, holding(nested), form, exact, settings())
    difference, scale = _difference(folded, model, variables, x)
    if not difference <= report.tolerance * scale:
        raise ValueError(
            f"Folding must preserve the outputs on `example_x` to {report.tolerance:.1e} of their "
            f"scale {scale:.3g}, but changed them by {difference:.3g}. Do they hold NaN or inf, or "
            "does a layer change its kernel, or a registered batch norm its scale, before use?"
        )
    report = dataclasses.replace(report, max_difference=difference, scale=scale)
    folded = dataclasses.replace(folded, report=report)
    if quantize is None:
        return folded
    edits = dataclasses.replace(exact, quantize=quantize)
    nested = traverse_util.unflatten_dict(edits.fold(flat, np))
    return dataclasses.replace(folded, variables=nested, _edits=edits, _key=object())


def _why(kind: str) -> str:
    if kind in globs.BRIDGES:
        return f"{kind} of flax.nnx.bridge hides it: {globs.REPAIR}"
    return f"{kind} is not a known batch norm class: register it with bnjax.register({kind}, ...)"


def _tolerance(program: Program, edits: Edits, flat: Mapping[Any, Any]) -> float:
    """The change allowed in outputs, relative to their scale, for the model's coarsest dtype."""
    changed = {*edits.norms, *edits.gone, *edits.layers}
    held = (meta.unbox(leaf).dtype for key, leaf in flat.items() if key[1:-1] in changed)
    numbers = [d for d in (*program.dtypes, *held) if jnp.issubdtype(d, jnp.inexact)]
    return max(float(jnp.finfo(dtype).eps) for dtype in numbers) ** 0.5


def _difference(folded: Folded, model: Any, variables: Any, x: Any) -> tuple[float, float]:
    """The largest difference from an output of the model, and the scale of that output."""

    @jax.jit
    def both(variables: Any, new: Any, x: Any) -> Any:
        expected = folded._form(model, variables, x)
        return expected, folded.apply(new, x)

    # On accelerators, the default precision rounds the inputs of a conv, which folding rescales.
    with jax.default_matmul_precision("highest"):
        outputs = both(variables, folded.variables, x)
    found = []
    for expected, actual in zip(*map(jax.tree.leaves, outputs), strict=True):
        if not jnp.issubdtype(expected.dtype, jnp.inexact):
            continue  # rounding may move an integer to its neighbour
        a, b = (np.asarray(leaf).astype(np.complex128) for leaf in (actual, expected))
        with np.errstate(invalid="ignore"):
            difference = np.max(np.where(a == b, 0, np.abs(a - b)), initial=0)
        found.append((difference, np.max(np.abs(b[np.isfinite(b)]), initial=0)))
    lost = [pair for pair in found if np.isnan(pair[0])]
    worst = max(lost or found, key=lambda pair: pair[0] / (pair[1] or 1), default=(0, 0))
    return float(worst[0]), float(worst[1])
