"""Check the arguments and the calls of training steps."""

import contextlib
import inspect
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from bnjax.models.checks import called_with as called_with
from bnjax.models.checks import flax_model, warn_once, where
from bnjax.models.checks import mesh as mesh
from bnjax.models.checks import several_batches as several_batches
from bnjax.models.checks import some_batch as some_batch
from bnjax.models.compat import is_traced


def linen_model(model: Any) -> None:
    """Require a linen model."""
    if isinstance(model, nnx.Module):
        raise TypeError(
            "`model` is an nnx model, which holds its own parameters and statistics. Train it with "
            "optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param); step = "
            "bnjax.nnx.train_step(loss_fn); metrics = step(model, optimizer, batch)."
        )
    flax_model(model)


@contextlib.contextmanager
def input_not_batch(x: Any, inputs: Any) -> Iterator[None]:
    """If the model fails on a whole batch, say to pass its input instead."""
    try:
        yield
    except Exception as error:
        if inputs is not None or not isinstance(x, Mapping) or "x" not in x:
            raise
        raise TypeError(
            "`x` must be an input of the model, got a batch that contains `x`: write "
            'init_state(model, tx, key, batch["x"]), or init_state(model, tx, key, batch, '
            'inputs="x").'
        ) from error


def same_leaves(new: Any, old: Any) -> list[Any]:
    """Require that a step keeps the structure of the state; dict types may differ."""
    new, old = jax.tree.leaves_with_path(new), jax.tree.leaves_with_path(old)
    names = [{jax.tree_util.keystr(path) for path, _ in tree} for tree in (new, old)]
    if names[0] != names[1]:
        raise ValueError(
            "A step must keep the tree structure of the state, but the model added "
            f"{sorted(names[0] - names[1])} and removed {sorted(names[1] - names[0])}."
        )
    return [leaf for _, leaf in new]


def without_mutable(apply_kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
    """The arguments for the model's call; the step itself decides what is mutable."""
    if "mutable" in (apply_kwargs or {}):
        raise TypeError(
            "`apply_kwargs` must not contain `mutable`: a training step keeps the updates of all "
            "collections."
        )
    return dict(apply_kwargs or {})


def loss_function(value: Any) -> None:
    """Require a loss function."""
    if not callable(value):
        raise TypeError(
            f"`loss_fn` must be a function, loss_fn(outputs, batch), got {type(value).__name__}."
        )
    with contextlib.suppress(ValueError):  # some built-in functions have no signature
        signature = inspect.signature(value)
        try:
            signature.bind(None, None)
        except TypeError as error:
            raise TypeError(
                "`loss_fn` must take the outputs of the model and the batch, got "
                f"loss_fn{signature}: {error}. Write def loss_fn(outputs, batch): ..."
            ) from None


def train_state(state: Any) -> None:
    """Require a `TrainState`."""
    if isinstance(state, nnx.Module):
        raise TypeError(
            "`state` must be a TrainState, got an nnx model. Use bnjax.nnx.train_step and "
            "bnjax.nnx.eval_step for nnx models."
        )
    kind = type(state).__name__
    if not hasattr(state, "apply_fn"):
        raise TypeError(
            f"`state` must be a TrainState, got {kind}. Create it with state = "
            "bnjax.training.init_state(model, tx, key, x)."
        )
    if not hasattr(state, "rejected"):
        raise TypeError(
            f"`state` must be a bnjax.training.TrainState, got another {kind}. Create it with "
            "state = bnjax.training.init_state(model, tx, key, x), and add fields of your own in a "
            "subclass of bnjax.training.TrainState."
        )


def optimizer(tx: Any) -> None:
    """Require an optax optimizer, not a function that makes one."""
    if not (hasattr(tx, "init") and hasattr(tx, "update")):
        got = getattr(tx, "__name__", type(tx).__name__)
        raise TypeError(f"`tx` must be an optax optimizer, such as optax.adam(1e-3), got {got}.")


def random_key(key: Any) -> None:
    """Require a JAX random key, typed or raw."""
    dtype = getattr(key, "dtype", None)
    is_key = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    if not is_key and dtype != jnp.uint32:
        raise TypeError(
            f"`key` must be a JAX random key, such as jax.random.key(0), got {type(key).__name__}."
        )


@contextlib.contextmanager
def evaluation_step(step: Any) -> Iterator[None]:
    """If a step fails and is not from `eval_step`, say to pass one that is."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        if getattr(step, "__module__", "").startswith("bnjax."):
            raise
        raise TypeError(
            "`step` must come from eval_step, as in evaluate(eval_step(loss_fn), state, batches), "
            f"got {getattr(step, '__name__', type(step).__name__)}."
        ) from error


def totals(found: Any) -> None:
    """Require that a step for `evaluate` returned totals, not a new state."""
    if not isinstance(found, Mapping):
        raise TypeError(
            "`step` must come from eval_step, as in evaluate(eval_step(loss_fn), state, batches), "
            "got a training step."
        )


def microbatches(value: Any) -> None:
    """Require a positive number of micro-batches."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(
            f"`microbatches` must be an int of 1 or more, got {value!r}. Pass 1 to run the batch "
            "as a whole."
        )


def not_donated(state: Any) -> None:
    """Require a state whose buffers no step has reused."""
    held = (leaf for leaf in jax.tree.leaves(state) if isinstance(leaf, jax.Array))
    if any(leaf.is_deleted() for leaf in held if not is_traced(leaf)):
        raise ValueError(
            "This state was passed to an earlier step, which reused its memory, so its arrays are "
            "deleted. Use the state that the step returned, state, metrics = step(state, batch); "
            "or keep this one with train_step(..., donate=False)."
        )


def divides(size: int, devices: int, microbatches: int) -> None:
    """Require a training batch that splits into equal parts."""
    if size % (devices * microbatches):
        mesh = [f"{devices} (local devices of the mesh)"] if devices > 1 else []
        parts = [f"{microbatches} (micro-batches)"] if microbatches > 1 else []
        raise ValueError(
            "The size of a training batch must be divisible by "
            f"{' times '.join(mesh + parts)}, got {size}. Drop the last partial batch."
        )


def some_moves(moving: Collection[str], still: Collection[str]) -> None:
    """Warn if a training step updates no running statistics, unless they are frozen."""
    left = list(still)
    if left and not moving:
        warn_once(
            "This training step updates no running statistics: the batch norm at "
            f"{where([left[0]])}{f' and {len(left) - 1} more run' if left[1:] else ' runs'} in "
            "evaluation mode. Pass training arguments, such as apply_kwargs={'train': True}, or "
            "call model.train() on an nnx model; to freeze all statistics, pass frozen='**'."
        )


def nnx_model(model: Any) -> None:
    """Require an nnx model."""
    if not isinstance(model, nnx.Module):
        raise TypeError(
            f"`model` must be a flax.nnx.Module, got {type(model).__name__}. For linen models, use "
            "bnjax.training.train_step and eval_step."
        )


def nnx_training(model: Any, optimizer: Any) -> None:
    """Require an nnx model and an nnx optimizer."""
    nnx_model(model)
    if not isinstance(optimizer, nnx.Optimizer):
        raise TypeError(
            "`optimizer` must be an nnx.Optimizer, such as nnx.Optimizer(model, optax.adam(1e-3), "
            f"wrt=nnx.Param), got {type(optimizer).__name__}."
        )


def record_alone(other: Any) -> None:
    """Require no second tree with a record, which already has both statistics."""
    if other is not None:
        raise TypeError(
            "`other` must be None with a record of bnjax.training.history, which already holds the "
            f"statistics of the last batch, got {type(other).__name__}."
        )


def some_statistics(layers: Collection[str]) -> None:
    """Require running statistics to log."""
    if not layers:
        raise ValueError(
            "`trained` must hold running statistics, but has none: pass a TrainState, variables "
            "with `batch_stats`, an nnx model, or a record of bnjax.training.history."
        )


def same_channels(path: str, ours: tuple[int, ...], theirs: tuple[int, ...]) -> None:
    """Require layers with the same channels in both trees."""
    if ours != theirs:
        raise ValueError(
            "`trained` and `other` must be from the same model, but the batch norm at "
            f"{where([path])} has {ours[0]} channels in one and {theirs[0]} in the other."
        )
