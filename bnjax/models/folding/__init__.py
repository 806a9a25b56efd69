"""Batch norm folded into the conv and dense layers around it, for evaluation: fold."""

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
    """The model with its batch norms folded into the conv or dense layers around them.

    In evaluation `(conv(x) + b - mean) * s + bias`, with `s = scale / sqrt(var + eps)`, is a conv
    with the kernel `kernel * s` and the bias `(b - mean) * s + bias` (Jacob et al. 2018, section
    3.2). It is done, in float64, to each `nn.Conv`, `ConvLocal`, `ConvTranspose`, `Dense` and
    `DenseGeneral` (of nnx: `Conv`, `ConvTranspose`, `Linear` and `LinearGeneral`) whose output goes
    into one batch norm and nowhere else, over its channels.

    A batch norm that is left, and whose output goes into conv and dense layers alone, is folded
    into each of these: `kernel * s` over its inputs, and a bias of `kernel * (bias - mean * s)`,
    summed. A conv that pads with zeros then pads with what the batch norm would have made zero.
    Branches of one input that are added, convs of other sizes or a batch norm alone, become one
    conv (Ding et al. 2021, RepVGG).

    What goes where is read off the program of the forward pass (its jaxpr), whatever the nesting:
    through reshapes, transposes, slices and means, and through no nonlinearity. What stands in a
    loop (`nn.scan`) or under `vmap` stays as it is. The result is compared with the model.

    Guide: examples/guides/folding.md

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
        quantize: a function of an array that is put around each folded kernel in `apply`, such as a
            fake quantization with a straight-through gradient; `variables` hold the kernels
            without. To train with it see `Folded.fake_quantize`.

    Returns:
        The folded model: `variables`, `apply`, `report`, `refold` and `fake_quantize`.

    Raises:
        ValueError: variables of another model, no batch norm, one in training mode, nothing to
            fold, or an output that folding changed by more than the tolerance: the square root of
            the machine epsilon of the coarsest dtype in the model (3.5e-4 in float32), times the
            largest output. Integers, such as classes, are not compared.
        TypeError: the model is no Flax model, the variables of an nnx model are no `nnx.State`, or
            `quantize` is no function.

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
    why = "bnjax.register({0}, ...) tells what it does; {0} is not known".format
    rows += [Row("", path, why(kind)) for path, kind in sorted(unknown.items())]
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
            f"The outputs on `example_x` must stay the same, to {report.tolerance:.1e} of their "
            f"scale {scale:.3g}, but folding changed them by {difference:.3g}. Is there NaN or inf "
            "in them, or does a layer change its kernel before using it, or a registered batch "
            "norm its scale?"
        )
    report = dataclasses.replace(report, max_difference=difference, scale=scale)
    folded = dataclasses.replace(folded, report=report)
    if quantize is None:
        return folded
    edits = dataclasses.replace(exact, quantize=quantize)
    nested = traverse_util.unflatten_dict(edits.fold(flat, np))
    return dataclasses.replace(folded, variables=nested, _edits=edits, _key=object())


def _tolerance(program: Program, edits: Edits, flat: Mapping[Any, Any]) -> float:
    """How much of their scale outputs may change, by the coarsest dtype in the model."""
    changed = {*edits.norms, *edits.gone, *edits.layers}
    held = (meta.unbox(leaf).dtype for key, leaf in flat.items() if key[1:-1] in changed)
    numbers = [d for d in (*program.dtypes, *held) if jnp.issubdtype(d, jnp.inexact)]
    return max(float(jnp.finfo(dtype).eps) for dtype in numbers) ** 0.5


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
