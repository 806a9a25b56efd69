"""Jitted steps over a `TrainState`: train_step, eval_step, and evaluate over many batches."""

import contextlib
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from bnjax import globs
from bnjax.masks import held, modules_of
from bnjax.masks import labels as labels_of
from bnjax.models.batches import Batch, Inputs, LossFn, Metrics, Totals, layout, tracked
from bnjax.models.frames import Settings
from bnjax.models.visits import applying
from bnjax.training import checks
from bnjax.training.attempts import attempt, with_extra_args
from bnjax.training.compiled import Compiled
from bnjax.training.gradients import Objective, evaluated
from bnjax.training.state import TrainState, commit

Step = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


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
    donate: bool = True,
) -> Step:
    """Compile a training step: forward with mutable statistics, backward, update, commit.

    Guides: examples/guides/training.md, examples/guides/recipes.md, examples/guides/devices.md

    Args:
        loss_fn: `loss_fn(outputs, batch)` gives the loss, or `(loss, metrics)` with a dict of
            metrics. Each is an array with one entry for each example, (N,), or a mean, ().
        inputs: which entries of a batch to call the model with: one name; several names, as
            positional arguments; a dict of names by keyword; or a function of the batch that
            returns a tuple of arguments, a dict of keyword arguments, or a single argument.
        per_example: names of the entries with one value per example, besides the inputs and the
            mask. By default, all arrays whose leading axis is as long as that of the first input.
            Pass it if something else, such as class weights, can have that length. Micro-batches
            and meshes do not split other entries.
        apply_kwargs: extra arguments for the model's call, such as `{"train": True}`. Keys under
            `"rngs"` seed random streams by name, and each step folds in its number; all other
            streams derive from the key in the state.
        frozen: globs over module paths, such as `"encoder/**"`. Freezes parameters, running
            statistics and mode of these modules.
        microbatches: split the batch into this many parts, run them in turn, and update once. The
            running statistics are exactly those of the whole batch, since moments are pooled (also
            with a virtual batch size). The gradients are not: each part is normalized with its own
            statistics, so they are noisier with few examples per part. They are summed in float32
            or wider.
        unroll: unroll the loop over micro-batches. By default up to 8 are unrolled on CPUs, where
            XLA's convolutions are several times slower inside a loop; False saves more memory.
        mask_statistics: whether `mask` also keeps examples out of the batch statistics. Pass False
            for models that reshape their examples before a batch norm.
        mesh: train data-parallel: split the batch over all devices of the mesh and replicate the
            state. Results match one device: batch norms see the whole batch and need no
            `axis_name`. With several processes, each passes its own part of the batch.
        donate: donate the buffers of the state that is passed in; it can't be used afterwards.

    Returns:
        `step(state, batch) -> (state, metrics)`. `batch` is a dict: `"x"` is the input of the
        model; `"mask"`, if present, is a bool array (N,) of the examples that count in the loss,
        the metrics and the statistics; the rest is for `loss_fn`. The metrics are means over the
        batch. They include `loss` and `accepted`: whether loss and gradients were finite and any
        example counted (see `commit`). A metric of your own with such a name replaces it.

    Raises:
        ValueError: a batch does not divide evenly into micro-batches and devices.
    """
    checks.loss_function(loss_fn)
    checks.microbatches(microbatches)
    batches = layout(inputs, per_example)
    objective = Objective(loss_fn, batches, microbatches, mask_statistics, unroll)
    step = functools.partial(
        _step, objective, globs.as_tuple(frozen), checks.without_mutable(apply_kwargs)
    )
    options = {"microbatches": microbatches, "donate": donate, "met": objective.met}
    return Compiled(step, batches, mesh, check=checks.train_state, **options)


def _step(
    objective: Objective,
    frozen: tuple[str, ...],
    apply_kwargs: Mapping[str, Any],
    state: TrainState,
    batch: Batch,
) -> tuple[TrainState, Metrics]:
    """The state after a step, and its metrics."""
    kwargs = dict(apply_kwargs)
    streams = kwargs.pop("rngs", {})
    collections = {"batch_stats": state.batch_stats, **state.collections}
    collections = {name: tree for name, tree in collections.items() if tree}
    fast = getattr(state.params, "fast", state.params)
    labels = labels_of(fast, frozen) if frozen else None

    def apply(params: Any, collections: Any, args: tuple, inputs: dict, key: Any) -> Any:
        variables = {"params": held(params, labels, jax.lax.stop_gradient), **collections}
        options = {"mutable": list(collections), "rngs": _keys(key, streams), **inputs, **kwargs}
        with _freezing(frozen):
            outputs, moved = state.apply_fn(variables, *args, **options)
        return outputs, {**collections, **moved}

    key = None if state.rng is None else jax.random.fold_in(state.rng, state.step)
    now = {"collections": collections, "batch": batch, "key": key, "step": state.step}
    found = attempt(objective, apply, fast, state.loss_scale, **now)
    globs.check_each(frozen, modules_of(fast) | objective.met.keys(), "module")
    moved = dict(found.collections)
    proposed = state.replace(tx=with_extra_args(state.tx, found)).apply_gradients(
        grads=found.grads,
        batch_stats=moved.pop("batch_stats", state.batch_stats),
        collections=moved,
        loss_scale=found.loss_scale,
    )
    # Lookahead has fast and slow parameters.
    each = labels if fast is state.params else type(state.params)(labels, labels)
    params = held(proposed.params, each, lambda _, old: old, state.params)
    proposed = proposed.replace(tx=state.tx, params=params)
    return commit(found.accepted, proposed, state), found.metrics


def eval_step(
    loss_fn: LossFn,
    *,
    inputs: Inputs = "x",
    per_example: Sequence[str] | None = None,
    apply_kwargs: Mapping[str, Any] | None = None,
    mesh: Mesh | None = None,
) -> Callable[[TrainState, Batch], Totals]:
    """Compile an evaluation step, which uses running statistics and updates nothing.

    Args:
        loss_fn: as for `train_step`.
        inputs: as for `train_step`.
        per_example: as for `train_step`.
        apply_kwargs: extra arguments for the model's call, such as `{"train": False}`. Collections
            listed as `"mutable"` may change during the call; the changes are discarded.
        mesh: split the batch over the devices of the mesh. Uneven batches are padded with examples
            that do not count.

    Returns:
        `step(state, batch) -> totals`: sums by name over the examples that count, and their number,
        `totals.count`. `evaluate` adds up the totals of many batches.
    """
    checks.loss_function(loss_fn)
    batches, options = layout(inputs, per_example), dict(apply_kwargs or {})

    def step(state: TrainState, batch: Batch) -> Totals:
        def forward(*args: Any, **kwargs: Any) -> Any:
            outputs = state.apply_fn(state.variables, *args, **kwargs, **options)
            return outputs[0] if options.get("mutable") else outputs

        return evaluated(loss_fn, batches, forward, batch)

    return Compiled(step, batches, mesh, check=checks.train_state)


def evaluate(
    step: Callable[[Any, Batch], Totals],
    state: Any,
    batches: Iterable[Batch],
    *,
    progress: bool = False,
) -> dict[str, float]:
    """Average the loss and metrics over all examples of all batches, each counted once.

    Sums stay on the device, so the next batch can load while the device computes.

    Args:
        step: a step from `eval_step`.
        state: the state to evaluate; for nnx, the model.
        batches: dicts as for `train_step`; their sizes may differ.
        progress: show a progress bar.

    Raises:
        ValueError: there is no batch, or no example that counts.
    """
    checks.several_batches(batches)
    totals: Any = None
    for batch in tracked(batches, progress, "evaluating"):
        with checks.evaluation_step(step):
            new: Any = step(state, batch)
            checks.totals(new)
            if not isinstance(new, Totals):  # from a user's own step
                new = Totals({k: v for k, v in new.items() if k != "count"}, new["count"])
        totals = new if totals is None else _add(totals, new)
    found = Totals({}, 0.0) if totals is None else jax.device_get(totals)
    checks.some_batch(float(found.count), "example that counts")
    return {name: float(total) / float(found.count) for name, total in found.items()}


@jax.jit
def _add(totals: Totals, new: Totals) -> Totals:
    return jax.tree.map(jnp.add, totals, new)


def _freezing(patterns: tuple[str, ...]) -> contextlib.AbstractContextManager:
    """A context that freezes all matching batch norms; patterns may match only other modules."""
    if not patterns:
        return contextlib.nullcontext()
    return applying(Settings(("frozen", patterns), patterns, {"use_running_average": True}))


def _keys(key: Any, streams: Mapping[str, Any]) -> dict[str, Any] | None:
    """A key for each random stream; Flax falls back to `params` for streams without one."""
    if key is None:
        return dict(streams) or None
    number = jax.random.bits(key)
    own = {name: jax.random.fold_in(stream, number) for name, stream in streams.items()}
    return {"dropout": key, "params": jax.random.fold_in(key, 1), **own}
