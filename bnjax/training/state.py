"""The training state: parameters, optimizer state and batch statistics, kept together."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import serialization, struct
from flax.core import FrozenDict
from flax.core.scope import DenyList
from flax.training import train_state

from bnjax.models.batches import layout
from bnjax.models.compat import is_traced
from bnjax.training import checks

# These advance even when a step is rejected.
_GO_ON = ("step", "rejected", "rng", "loss_scale")


class TrainState(train_state.TrainState):
    """Flax's `TrainState` with the batch statistics that belong to its parameters.

    Guide: examples/guides/training.md

    Attributes:
        batch_stats: the running statistics, `{}` for a model without any.
        rng: the key that each step folds its number into; None without dropout.
        rejected: how many steps were rejected.
        collections: the model's other collections, such as a codebook.
        loss_scale: a dynamic loss scale, such as `flax.training.dynamic_scale.DynamicScale()`.
    """

    batch_stats: Any
    rng: jax.Array | None
    rejected: jax.Array
    # Keyword-only, so that a subclass may add fields without defaults.
    collections: Any = struct.field(default_factory=dict, kw_only=True)
    loss_scale: Any = struct.field(default=None, kw_only=True)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Register the subclass for Flax's serialization, too."""
        super().__init_subclass__(**kwargs)
        _register(cls)

    @property
    def variables(self) -> dict[str, Any]:
        """The variables to evaluate the model with; with lookahead, its slow parameters.

        They are copies, because a step that donates the state invalidates its arrays.
        """
        checks.not_donated(self)
        params = getattr(self.params, "slow", self.params)
        held = variables_of(params, self.batch_stats, self.collections)
        is_concrete = lambda leaf: isinstance(leaf, jax.Array) and not is_traced(leaf)  # noqa: E731
        return jax.tree.map(lambda leaf: leaf.copy() if is_concrete(leaf) else leaf, held)


def _to_dict(state: Any) -> dict[str, Any]:
    """The state as Flax serializes it, with typed random keys, which it can't save, as raw data."""
    held = {name: serialization.to_state_dict(part) for name, part in _data(state).items()}
    return jax.tree.map(lambda leaf: jax.random.key_data(leaf) if _is_key(leaf) else leaf, held)


def _from_dict(state: Any, found: dict[str, Any]) -> Any:
    """The state with the values that Flax restored."""
    held = _data(state)
    bare = jax.tree.map(lambda leaf: jax.random.key_data(leaf) if _is_key(leaf) else leaf, held)
    new = serialization.from_state_dict(bare, found)

    def wrapped(leaf: Any, old: Any) -> Any:
        return (
            jax.random.wrap_key_data(leaf, impl=jax.random.key_impl(old)) if _is_key(old) else leaf
        )

    return state.replace(**jax.tree.map(wrapped, new, held))


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _data(state: Any) -> dict[str, Any]:
    names = (each.name for each in dataclasses.fields(state) if _is_data(state, each.name))
    return {name: getattr(state, name) for name in names}


def _register(kind: type) -> None:
    """Register these functions with `flax.serialization`."""
    serialization.register_serialization_state(kind, _to_dict, _from_dict, override=True)


_register(TrainState)


def init_state(
    model: nn.Module,
    tx: optax.GradientTransformation,
    key: chex.PRNGKey,
    x: Any,
    *,
    inputs: Any = None,
    loss_scale: Any = None,
    **apply_kwargs: Any,
) -> TrainState:
    """A new `TrainState` for a linen model and an optax optimizer.

    Args:
        model: any linen model, with or without batch norm.
        tx: the optimizer.
        key: seeds the parameters and the random streams of the steps.
        x: an input, or its `jax.ShapeDtypeStruct`, to initialize the model with.
        inputs: as for `train_step`, if `x` is a batch (a dict): the entries to call the model with.
        loss_scale: scales the loss of each step, for gradients in float16: Flax's `DynamicScale`,
            or another object with `scale`, `unscale` and `adjust`, such as jmp's.
        **apply_kwargs: extra arguments for the model's call, such as `train=False`.

    Returns:
        The state. It has all collections except sown ones, such as `intermediates`.

    Raises:
        TypeError: the model is not a linen model.
    """
    checks.linen_model(model)
    checks.optimizer(tx)
    checks.random_key(key)
    args, kwargs = ((x,), {}) if inputs is None else layout(inputs).call(x)
    key, rng = jax.random.split(key)
    init_key, dropout_key = jax.random.split(key)
    keys = {"params": init_key, "dropout": dropout_key}
    mutable = DenyList("intermediates")
    repair = "Pass its other arguments, as in init_state(model, tx, key, x, train=False)."
    with checks.input_not_batch(x, inputs), checks.called_with(repair):
        variables = model.lazy_init(keys, *args, mutable=mutable, **kwargs, **apply_kwargs)
    others = {k: v for k, v in variables.items() if k not in ("params", "batch_stats")}
    params: Any = variables.get("params", {})
    if _is_lookahead(tx, params):
        params = optax.LookaheadParams.init_synced(params)
    state = TrainState.create(
        apply_fn=model.apply,
        params=params,
        tx=tx,
        batch_stats=variables.get("batch_stats", {}),
        rng=rng,
        rejected=jnp.zeros((), jnp.int32),
        collections={name: tree for name, tree in others.items() if not _is_sown(tree)},
        loss_scale=loss_scale,
    )
    return own_buffers(state)


def own_buffers(tree: Any) -> Any:
    """The tree with a separate buffer for each array, so that all can be donated."""
    seen: set[int] = set()

    def alone(leaf: Any) -> Any:
        if id(leaf) in seen and isinstance(leaf, jax.Array):
            return jnp.copy(leaf)
        seen.add(id(leaf))
        return leaf

    return jax.tree.map(alone, tree)


def commit(accepted: jax.Array, proposed: TrainState, current: TrainState) -> TrainState:
    """The proposed state if the step is accepted; otherwise the current one, rejected once more.

    Parameters, optimizer state and batch statistics are kept together, with the fields that a
    subclass adds: statistics from a rejected step would poison every later evaluation. `step`
    counts attempts, so data order and random numbers advance either way.

    Args:
        accepted: bool, ().
        proposed: the state after the step.
        current: the state before it.
    """
    names = [each.name for each in dataclasses.fields(current) if each.name not in _GO_ON]
    held = {n: (getattr(proposed, n), getattr(current, n)) for n in names if _is_data(current, n)}
    chosen = {name: choose(accepted, *both) for name, both in held.items()}
    rejected = current.rejected + jnp.where(accepted, 0, 1)
    return proposed.replace(**chosen, rejected=rejected)


def choose(accepted: jax.Array, new: Any, old: Any) -> Any:
    """One tree or the other, with the structure of the old one."""
    leaves, tree = jax.tree.flatten(old)
    pairs = zip(checks.same_leaves(new, old), leaves, strict=True)
    return tree.unflatten(jnp.where(accepted, n, o) for n, o in pairs)


def variables_of(params: Any, batch_stats: Any, collections: Mapping[str, Any]) -> dict[str, Any]:
    """The variables of a model, without empty collections."""
    held = {"params": params, "batch_stats": batch_stats, **collections}
    return {name: tree for name, tree in held.items() if tree or name == "params"}


def _is_lookahead(tx: optax.GradientTransformation, params: Any) -> bool:
    """Whether an optimizer keeps two sets of parameters, as `optax.lookahead` does."""
    kind = optax.LookaheadState
    try:
        made = jax.eval_shape(lambda p: tx.init(optax.LookaheadParams.init_synced(p)), params)
    except Exception:  # an optimizer may require the structure it was written for
        return False
    states = jax.tree.leaves(made, is_leaf=lambda node: isinstance(node, kind))
    return any(isinstance(state, kind) for state in states)


def _is_data(state: TrainState, name: str) -> bool:
    field = next(each for each in dataclasses.fields(state) if each.name == name)
    return field.metadata.get("pytree_node", True)


def _is_sown(tree: Any) -> bool:
    """Whether modules append to a collection, as `sow` does, so that it would grow."""
    if isinstance(tree, dict | FrozenDict):
        return any(map(_is_sown, tree.values()))
    return isinstance(tree, tuple)
