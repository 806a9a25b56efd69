"""Compile steps that update an nnx model and its optimizer in place: train_step, eval_step."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from bnjax import globs
from bnjax.masks import held, modules_of
from bnjax.masks import labels as labels_of
from bnjax.models.batches import Batch, Inputs, LossFn, Metrics, Totals, layout
from bnjax.models.freezing import freeze_fitting
from bnjax.models.nnx_copies import Copy
from bnjax.training import checks
from bnjax.training.attempts import attempt, with_extra_args
from bnjax.training.compiled import Compiled
from bnjax.training.gradients import Objective, evaluated
from bnjax.training.state import choose, own_buffers

Step = Callable[[nnx.Module, nnx.Optimizer, Batch], Metrics]


def train_step(
    loss_fn: LossFn,
    *,
    inputs: Inputs = "x",
    per_example: Sequence[str] | None = None,
    apply_kwargs: Mapping[str, Any] | None = None,
    frozen: globs.Paths = (),
    microbatches: int = 1,
    unroll: bool | None = None,
    mask_statistics: bool = True,
    mesh: Mesh | None = None,
    loss_scale: Any = None,
    donate: bool = False,
) -> "TrainStep":
    """Compile a training step for an nnx model, in place: forward, backward, update, commit.

    A step is rejected if its loss or gradients are not finite, or if no example of its batch
    counts. It then leaves parameters, optimizer, running statistics and rng counts unchanged.

    Guides: examples/guides/training.md, examples/guides/recipes.md, examples/guides/devices.md

    Args:
        loss_fn: `loss_fn(outputs, batch)` gives the loss, or `(loss, metrics)` with a dict of
            metrics. Each is an array with one entry for each example, (N,), or a mean, ().
        inputs: which entries of a batch to call the model with, as for
            `bnjax.training.train_step`.
        per_example: names of the entries with one value per example, likewise.
        apply_kwargs: extra arguments for the model's call.
        frozen: globs over module paths, such as `"encoder/**"`. Freezes parameters, running
            statistics and mode of these modules.
        microbatches: split the batch into this many parts, run them in turn, and update once. The
            running statistics are exactly those of the whole batch.
        unroll: unroll the loop over micro-batches, as for `bnjax.training.train_step`.
        mask_statistics: whether `mask` also keeps examples out of the batch statistics.
        mesh: train data-parallel: split the batch over all devices of the mesh and replicate model
            and optimizer.
        loss_scale: scales the loss, for gradients in float16, as for `bnjax.training.init_state`.
            The current one is `step.loss_scale`.
        donate: donate the buffers of model and optimizer. References taken before the step, such
            as `nnx.state(model)`, can't be used afterwards.

    Returns:
        `step(model, optimizer, batch) -> metrics`. The step does not change the mode of the model,
        so call `model.train()` first; the optimizer is an `nnx.Optimizer`. `batch` and the metrics
        are as for `bnjax.training.train_step`. `step.rejected` counts rejected steps.

    Raises:
        TypeError: the model is not an `nnx.Module`, or the optimizer not an `nnx.Optimizer`.
        ValueError: a batch does not divide evenly into micro-batches and devices.

    >>> import optax, bnjax
    >>> model = bnjax.nnx.BatchNorm1d(3, rngs=nnx.Rngs(0))
    >>> optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
    >>> step = train_step(lambda outputs, batch: ((outputs - batch["y"]) ** 2).mean(-1))
    >>> x = jnp.array([[1.0, 2.0, 3.0], [3.0, 4.0, 5.0]])
    >>> metrics = step(model, optimizer, {"x": x, "y": x})
    >>> bool(metrics["accepted"]), (10 * model.mean[...]).round().tolist()
    (True, [2.0, 3.0, 4.0])
    """
    checks.loss_function(loss_fn)
    checks.microbatches(microbatches)
    objective = Objective(
        loss_fn, layout(inputs, per_example), microbatches, mask_statistics, unroll
    )
    update = functools.partial(_update, objective, dict(apply_kwargs or {}), globs.as_tuple(frozen))
    return TrainStep(update, objective, mesh, microbatches, donate, loss_scale)


class TrainStep:
    """A training step, compiled once for each structure of model, optimizer and batch.

    Attributes:
        layout: the layout of its batches.
        met: the batch norms that were called while it was traced, by path.
        loss_scale: the current dynamic loss scale.
        rejected: int32, (): how many steps were rejected.
    """

    def __init__(
        self,
        update: Callable,
        objective: Objective,
        mesh: Mesh | None,
        microbatches: int,
        donate: bool,
        loss_scale: Any,
    ) -> None:
        self.layout, self.met = objective.layout, objective.met
        self.loss_scale, self.rejected = loss_scale, jnp.zeros((), jnp.int32)
        self._donate = donate
        options = {"microbatches": microbatches, "donate": donate}
        self._of = functools.cache(
            lambda *graphs: Compiled(
                functools.partial(update, *graphs), objective.layout, mesh, **options
            )
        )

    def __call__(self, model: nnx.Module, optimizer: nnx.Optimizer, batch: Any) -> Metrics:
        """Update model and optimizer in place, and return the metrics."""
        checks.nnx_training(model, optimizer)
        (graph, variables), (optimizing, opt_state) = nnx.split(model), nnx.split(optimizer)
        state = variables, opt_state, self.loss_scale, self.rejected
        state = own_buffers(state) if self._donate else state
        state, metrics = self._of(graph, optimizing)(state, batch)
        variables, opt_state, self.loss_scale, self.rejected = state
        nnx.update(model, variables)
        nnx.update(optimizer, opt_state)
        return metrics


def _update(
    objective: Objective,
    kwargs: Mapping[str, Any],
    frozen: tuple[str, ...],
    graph: Any,
    optimizing: Any,
    state: tuple[Any, Any, Any, jax.Array],
    batch: Batch,
) -> tuple[tuple[Any, Any, Any, jax.Array], Metrics]:
    """The state after a step: model, optimizer, loss scale and count of rejected steps."""
    variables, opt_state, loss_scale, rejected = state
    old = jax.tree.map(lambda leaf: leaf, opt_state)  # an update changes the optimizer in place
    optimizer = nnx.merge(optimizing, opt_state)
    model = _Model(nnx.merge(graph, variables), optimizer.wrt, frozen, kwargs)
    now = {"collections": model.others, "batch": batch, "key": None, "step": optimizer.step[...]}
    found = attempt(objective, model.apply, model.params, loss_scale, **now)
    globs.check_each(frozen, model.modules | objective.met.keys(), "module")

    def to_model(params: nnx.State) -> dict[Any, Any]:
        single = model.with_params({})
        nnx.update(single, params)
        return model.params_of(single)

    def to_optimizer(grads: Any) -> nnx.State:
        return nnx.as_pure(nnx.state(model.with_params(grads), optimizer.wrt))

    after, tx = model.with_params({}), optimizer.tx
    optimizer.tx = with_extra_args(tx, found, to_model, to_optimizer)
    optimizer.update(after, nnx.state(model.with_params(found.grads), optimizer.wrt))
    optimizer.tx = tx
    variables = model.state(found.accepted, model.params_of(after), found.collections)
    opt_state = choose(found.accepted, nnx.state(optimizer), old)
    rejected = rejected + jnp.where(found.accepted, 0, 1)
    return (variables, opt_state, found.loss_scale, rejected), found.metrics


class _Model:
    """A model in training mode as functions of its arrays, by collection and path.

    Attributes:
        params: the arrays that the optimizer updates.
        others: all other arrays, nested.
        modules: the paths of modules with parameters.
    """

    def __init__(
        self, model: nnx.Module, wrt: Any, frozen: tuple[str, ...], kwargs: Mapping[str, Any]
    ) -> None:
        freeze_fitting(model, frozen)
        self._copy, self._kwargs = Copy(model, training=True), kwargs
        self._before, self._trained = flatten_dict(self._copy.variables), self._copy.keys_of(wrt)
        self.params = self.params_of(self._copy.model)
        self.others = unflatten_dict(self._untrained(self._before))
        labels, tree = dict.fromkeys(self.params), unflatten_dict(self.params).get("params")
        if frozen and tree:
            labels |= flatten_dict({"params": labels_of(tree, frozen)})
        self._labels, self.modules = labels, modules_of(tree or {})

    def apply(self, params: Any, collections: Any, args: tuple, inputs: dict, _key: Any) -> Any:
        """The outputs, and the other arrays after the call."""
        params = held(params, self._labels, jax.lax.stop_gradient)
        variables = unflatten_dict(params | flatten_dict(collections))
        model, names = self._copy.holding(variables), list(variables)
        outputs, moved = model.apply(variables, *args, mutable=names, **inputs, **self._kwargs)
        return outputs, unflatten_dict(self._untrained(flatten_dict(moved)))

    def with_params(self, params: Mapping[Any, Any]) -> nnx.Module:
        """A model with these parameters; others keep their values."""
        return self._copy.model_with(unflatten_dict(self._before | dict(params)))

    def params_of(self, model: nnx.Module) -> dict[Any, Any]:
        """The arrays of a model that the optimizer updates."""
        flat = self._copy.flat(model)
        return {key: leaf for key, leaf in flat.items() if key in self._trained}

    def state(self, accepted: jax.Array, params: Any, others: Any) -> nnx.State:
        """The state of the model, with the new arrays if the step is accepted."""
        params = held(params, self._labels, lambda _, old: old, self.params)
        new = choose(accepted, params | flatten_dict(others), self._before)
        return self._copy.state(unflatten_dict(new))

    def _untrained(self, flat: Mapping[Any, Any]) -> dict[Any, Any]:
        return {key: leaf for key, leaf in flat.items() if key not in self._trained}


def eval_step(
    loss_fn: LossFn,
    *,
    inputs: Inputs = "x",
    per_example: Sequence[str] | None = None,
    apply_kwargs: Mapping[str, Any] | None = None,
    mesh: Mesh | None = None,
) -> Callable[[nnx.Module, Batch], Totals]:
    """Compile an evaluation step for an nnx model, as after `.eval()`; the model does not change.

    Args:
        loss_fn: as for `train_step`.
        inputs: as for `train_step`.
        per_example: as for `train_step`.
        apply_kwargs: extra arguments for the model's call.
        mesh: split the batch over the devices of the mesh. Uneven batches are padded with examples
            that do not count.

    Returns:
        `step(model, batch) -> totals`, for `evaluate(step, model, batches)`: sums by name over the
        examples that count, and their number, `totals.count`.
    """
    checks.loss_function(loss_fn)
    batches = layout(inputs, per_example)

    def totals(graph: Any, variables: Any, batch: Batch) -> Totals:
        copy = Copy(nnx.merge(graph, variables))
        forward = functools.partial(copy.apply, copy.variables, **(apply_kwargs or {}))
        return evaluated(loss_fn, batches, forward, batch)

    @functools.cache
    def compiled(graph: Any) -> Compiled:
        return Compiled(functools.partial(totals, graph), batches, mesh)

    def step(model: nnx.Module, batch: Batch) -> Totals:
        checks.nnx_model(model)
        graph, variables = nnx.split(model)
        return compiled(graph)(variables, batch)

    return step
