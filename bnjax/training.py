"""Training and evaluation of linen models with batch statistics: one state, two steps."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax.training import train_state
from jax.sharding import Mesh

from bnjax import _checks, _globs
from bnjax.accumulation import Path, accumulating, begin, finish, map_layers, next_pass, rehearse
from bnjax.batches import (
    Batch,
    LossFn,
    Metrics,
    counted,
    named,
    on_all,
    pad_batch,
    shardings,
    size_of,
    split_over,
    totals_of,
)

Step = Callable[["TrainState", Batch], tuple["TrainState", Metrics]]


class TrainState(train_state.TrainState):
    """Flax's `TrainState` with the batch statistics that belong to its parameters.

    Attributes:
        batch_stats: the running statistics, `{}` for a model without any.
        rng: the key from which each step derives its own, by its number; None without dropout.
        rejected: how many steps were not committed.
    """

    batch_stats: Any
    rng: jax.Array | None
    rejected: jax.Array

    @property
    def variables(self) -> dict[str, Any]:
        """The variables to evaluate the model with."""
        return _variables(self.params, self.batch_stats)


def init_state(
    model: nn.Module,
    tx: optax.GradientTransformation,
    key: jax.Array,
    x: Any,
    **apply_kwargs: Any,
) -> TrainState:
    """A new `TrainState` for a linen model and an optax optimizer.

    Args:
        model: any linen model; without batch norm it has no statistics, and that is fine.
        tx: the optimizer.
        key: seeds the parameters, and the random numbers of the steps.
        x: an input, or its `jax.ShapeDtypeStruct`, to initialize the model with.
        **apply_kwargs: what else the model's call needs, such as `train=False`.
    """
    key, rng = jax.random.split(key)
    init_key, dropout_key = jax.random.split(key)
    variables = model.lazy_init({"params": init_key, "dropout": dropout_key}, x, **apply_kwargs)
    return TrainState.create(
        apply_fn=model.apply,
        params=variables["params"],
        tx=tx,
        batch_stats=variables.get("batch_stats", {}),
        rng=rng,
        rejected=jnp.zeros((), jnp.int32),
    )


def train_step(
    loss_fn: LossFn,
    *,
    apply_kwargs: Mapping[str, Any] | None = None,
    microbatches: int = 1,
    mesh: Mesh | None = None,
    donate: bool = True,
) -> Step:
    """A jitted step: forward with mutable statistics, backward, update, commit.

    Args:
        loss_fn: `loss_fn(outputs, batch)` gives the loss, or `(loss, metrics)` with a dict of
            metrics. Each is an array with one entry for each example, (N,), or a mean, ().
        apply_kwargs: passed to the model's call, such as `{"train": True}`.
        microbatches: cut the batch into this many, one after another, and update once. The running
            statistics are exactly those of the whole batch: moments are pooled, those of a virtual
            batch size too. The gradients are not, since each micro-batch normalizes by its own
            statistics; with few examples in each they are noisier.
        mesh: train data-parallel: the batch is split over all devices of the mesh, the state is on
            each. The result is that of one device. With several processes each passes its own part
            of the batch.
        donate: reuse the memory of the state that is passed in, which is then gone.

    Returns:
        `step(state, batch) -> (state, metrics)`. `batch` is a dict: `"x"` is the input of the
        model, `"mask"`, if there is one, a bool (N,) that says which examples count in loss and
        metrics, and the rest is for `loss_fn`. The metrics are means over the batch, with `loss`,
        and `accepted`, which says whether loss and gradients were finite; see `commit`.

    Raises:
        ValueError: a batch that does not divide by `microbatches` and the devices.
    """
    kwargs = dict(apply_kwargs or {})

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = None if state.rng is None else jax.random.fold_in(state.rng, state.step)
        count = jnp.maximum(counted(batch), 1)

        def gradients(batch_stats: Any, part: Batch, key: Any) -> tuple[Any, Any, Metrics]:
            def objective(params: Any) -> tuple[jax.Array, tuple[Any, Metrics]]:
                outputs, updates = state.apply_fn(
                    _variables(params, batch_stats),
                    part["x"],
                    mutable=["batch_stats"],
                    rngs=None if key is None else {"dropout": key},
                    **kwargs,
                )
                totals = totals_of(loss_fn, outputs, part)
                means = {name: total / count for name, total in totals.items()}
                return means["loss"], (updates.get("batch_stats", {}), means)

            grads, (moved, means) = jax.grad(objective, has_aux=True)(state.params)
            return grads, moved, means

        if microbatches == 1:
            grads, batch_stats, means = gradients(state.batch_stats, batch, key)
        else:
            grads, batch_stats, means = _accumulate(gradients, state, batch, key, microbatches)
        accepted = _all_finite((means["loss"], grads))
        proposed = state.apply_gradients(grads=grads, batch_stats=batch_stats)
        return commit(accepted, proposed, state), means | {"accepted": accepted}

    return _jit(step, mesh, microbatches, donate)


def eval_step(
    loss_fn: LossFn, *, apply_kwargs: Mapping[str, Any] | None = None, mesh: Mesh | None = None
) -> Callable[[TrainState, Batch], Metrics]:
    """A jitted step in evaluation mode: running statistics, nothing moves.

    Args:
        loss_fn: as for `train_step`.
        apply_kwargs: passed to the model's call, such as `{"train": False}`.
        mesh: split the batch over the devices of the mesh. It need not divide by them: it is
            filled up with examples that do not count.

    Returns:
        `step(state, batch) -> totals`: sums over the examples of the batch that count, and their
        number, `count`. `evaluate` adds the totals of many batches up.
    """

    def step(state: TrainState, batch: Batch) -> Metrics:
        outputs = state.apply_fn(state.variables, batch["x"], **(apply_kwargs or {}))
        return totals_of(loss_fn, outputs, batch) | {"count": counted(batch)}

    sharded = _jit(step, mesh, 1, donate=False)
    if mesh is None:
        return sharded
    devices = len(mesh.local_devices)
    return lambda state, batch: sharded(state, pad_batch(batch, devices))


def evaluate(
    step: Callable[[TrainState, Batch], Metrics], state: TrainState, batches: Iterable[Batch]
) -> dict[str, float]:
    """Means over all examples of all batches, each example counted once.

    Args:
        step: what `eval_step` returned.
        state: the state to evaluate.
        batches: dicts as for `train_step`; they need not be of one size.

    Raises:
        ValueError: there is no batch, or no example that counts.
    """
    sums: dict[str, float] = {}
    for batch in batches:
        for name, value in step(state, batch).items():
            sums[name] = sums.get(name, 0.0) + float(value)
    count = sums.pop("count", 0.0)
    _checks.some_example(count)
    return {name: total / count for name, total in sums.items()}


def history(
    step: Step,
    record: dict[str, Any],
    *,
    momentum: float | None = 0.1,
    every: int = 1,
    paths: _globs.Paths = "**",
    channels: int | None = None,
) -> Step:
    """The step, which also keeps a record of the running statistics, for `diagnose` and pictures.

    A logged step costs O(C) numbers for each layer and waits for the step to end. The record is a
    dict of lists of plain numbers, so a checkpoint can hold it, and a resumed run goes on with it.

    Args:
        step: what `train_step` returned.
        record: `{}`, or the record of the steps before. To it are appended, for each logged step,
            `"step"`, `"examples"` (the batch size) and `"params_norm"`; and in `"layers"`, for each
            path, the running `"mean"` and `"var"` after the step and those of the batch alone,
            `"batch_mean"` and `"batch_var"`, each a list of C numbers.
        momentum: weight of a new batch in the running statistics (PyTorch's convention), by which
            the statistics of the batch are told from the running ones; None leaves them out.
        every: log each so many-th step.
        paths: which layers, as globs over module paths.
        channels: how many channels of each, the first ones; all by default.

    Returns:
        A step to use in the place of the one given.
    """
    fits = [_globs.matcher(pattern) for pattern in _globs.as_tuple(paths)]
    calls = 0

    def statistics(batch_stats: Any) -> dict[str, dict[str, np.ndarray]]:
        found: dict[str, dict[str, np.ndarray]] = {}

        def look(path: Path, stats: Mapping[str, Any]) -> None:
            name = "/".join(path)
            if any(fit(name) for fit in fits):
                arrays = ((key, np.ravel(stats[key])) for key in ("mean", "var"))
                # A copy: the step may reuse the memory of its argument.
                found[name] = {key: np.array(a[:channels], np.float64) for key, a in arrays}

        map_layers(look, batch_stats)
        return found

    def recorded(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        nonlocal calls
        calls += 1
        if calls % every:
            return step(state, batch)
        before = statistics(state.batch_stats)
        state, metrics = step(state, batch)
        for name, value in (
            ("step", int(state.step)),
            ("examples", size_of(batch)),
            ("params_norm", float(_norm(state.params))),
        ):
            record.setdefault(name, []).append(value)
        for name, after in statistics(state.batch_stats).items():
            lines = record.setdefault("layers", {}).setdefault(name, {})
            for key, value in after.items():
                lines.setdefault(key, []).append(value.tolist())
                if momentum:
                    # running = (1 - momentum) * old + momentum * batch, solved for the batch
                    alone = before[name][key] + (value - before[name][key]) / momentum
                    lines.setdefault(f"batch_{key}", []).append(alone.tolist())
        return state, metrics

    return recorded


_norm = jax.jit(optax.tree.norm)


def commit(accepted: jax.Array, proposed: TrainState, current: TrainState) -> TrainState:
    """The proposed state if the step is accepted; otherwise the current one, with one more reject.

    Parameters, optimizer state and batch statistics go together: statistics that a rejected step
    has seen would poison every later evaluation. `step` counts the attempts, so the order of the
    data and the random numbers go on.

    Args:
        accepted: bool, ().
        proposed: the state after the step.
        current: the state before it.
    """

    def choose(new: Any, old: Any) -> Any:
        return jax.tree.map(lambda n, o: jnp.where(accepted, n, o), new, old)

    return proposed.replace(
        params=choose(proposed.params, current.params),
        opt_state=choose(proposed.opt_state, current.opt_state),
        batch_stats=choose(proposed.batch_stats, current.batch_stats),
        rejected=current.rejected + jnp.where(accepted, 0, 1),
    )


def _variables(params: Any, batch_stats: Any) -> dict[str, Any]:
    return {"params": params} | ({"batch_stats": batch_stats} if batch_stats else {})


def _accumulate(
    gradients: Callable, state: TrainState, batch: Batch, key: Any, microbatches: int
) -> tuple[Any, Any, Metrics]:
    """Gradients and means summed, and moments pooled, over the micro-batches."""

    def cut(x: jax.Array) -> jax.Array:
        # Each part takes every so many-th example, and so the same number from each device.
        return jnp.swapaxes(x.reshape(-1, microbatches, *x.shape[1:]), 0, 1)

    def one(carry: tuple[Any, Any], part: tuple[jax.Array, Batch]) -> tuple[Any, None]:
        sums, batch_stats = carry
        part_key = None if key is None else jax.random.fold_in(key, part[0])
        grads, batch_stats, means = gradients(next_pass(batch_stats), part[1], part_key)
        return (jax.tree.map(jnp.add, sums, (grads, means)), batch_stats), None

    parts = jax.tree.map(cut, dict(batch))
    with accumulating() as conventions:
        first = jax.tree.map(lambda x: x[0], parts)

        def rehearsed(batch_stats: Any) -> tuple[Any, Any]:
            grads, batch_stats, means = gradients(batch_stats, first, key)
            return batch_stats, (grads, means)

        calls, (grads, means) = rehearse(rehearsed, begin(state.batch_stats))
        begun = begin(state.batch_stats, calls)
        zeros = jax.tree.map(jnp.zeros_like, (grads, means))
        numbered = (jnp.arange(microbatches), parts)
        ((grads, means), batch_stats), _ = jax.lax.scan(one, (zeros, begun), numbered)
    return grads, finish(batch_stats, conventions), means


def _jit(step: Callable, mesh: Mesh | None, microbatches: int, donate: bool) -> Callable:
    """The step compiled, over the devices of a mesh if there is one."""
    donated = 0 if donate else ()
    if mesh is None:
        compiled = jax.jit(step, donate_argnums=donated)

        def run(state: TrainState, batch: Batch) -> Any:
            batch = named(batch)
            _checks.divides(size_of(batch), 1, microbatches)
            return compiled(state, batch)

        return run
    auto, alike, split = shardings(mesh)
    distributed = jax.jit(
        step, in_shardings=(alike, split), out_shardings=alike, donate_argnums=donated
    )

    def run_distributed(state: TrainState, batch: Batch) -> Any:
        batch = named(batch)
        _checks.divides(size_of(batch), len(mesh.local_devices), microbatches)
        with jax.set_mesh(auto):  # not the user's, whose axes may be explicit
            return distributed(on_all(state, alike), split_over(split, batch))

    return run_distributed


def _all_finite(tree: Any) -> jax.Array:
    leaves = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]
    return jnp.all(jnp.stack(leaves))
