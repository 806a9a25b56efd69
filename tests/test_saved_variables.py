"""The tools take what a training has saved, and find the variables of the model in it."""

import dataclasses
import re
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx, serialization, struct
from flax.core import freeze, unfreeze

import bnjax
from bnjax.checkpoints import inspection
from bnjax.models.saved import variables_of_model
from bnjax.models.variables import variables_in
from bnjax.training import init_state
from tests.support.nnx_layers import WithDropout

pytestmark = pytest.mark.quick_compile

X = np.random.default_rng(0).normal(3, 2, (32, 3)).astype("f")


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        codes = self.variable("codebook", "codes", lambda: jnp.arange(3.0))
        return bnjax.BatchNorm1d(name="bn")(nn.Dense(3, name="fc")(x) + codes.value)


def trained(tx: Any = None) -> Any:
    return init_state(Net(), tx or optax.adam(0.1), jax.random.key(0), X)


def ways() -> dict[str, Any]:
    """One training as it comes from code and from disk."""
    state = trained()
    beside = {"params": state.params, "batch_stats": state.batch_stats, "step": 3}
    beside |= {"opt_state": state.opt_state, "codebook": state.collections["codebook"]}
    return {
        "state": state,
        "beside": beside,
        "dict": serialization.to_state_dict(state),
        "around": {"model": state, "epoch": 3},
        "variables": state.variables,
    }


@pytest.mark.parametrize("way", ways())
def test_the_variables_are_found_and_nothing_else(way):
    expected = trained().variables
    chex.assert_trees_all_equal(variables_of_model(Net(), ways()[way]), expected)
    recalibrated = bnjax.recalibrate(Net(), ways()[way], [X])
    chex.assert_trees_all_equal(recalibrated, bnjax.recalibrate(Net(), expected, [X]))
    assert bnjax.diagnose(Net(), ways()[way], [X]).findings[0].kind == "never updated"
    assert [row.name for row in inspection.inspect(ways()[way])] == ["bn"]


@struct.dataclass
class OfClu:
    step: int
    params: Any
    model_state: Any


@dataclasses.dataclass
class Holder:
    variables: Any


@pytest.mark.parametrize("name", ["model_state", "extra_vars", "mutable", "params"])
def test_statistics_inside_another_entry_of_a_state_are_found(name):
    expected = trained().variables
    rest = {k: tree for k, tree in expected.items() if k != "params"}
    frozen = {k: freeze(tree) for k, tree in rest.items()}
    states: list[Any] = [{"params": expected, "step": 3, "opt_state": ()}]
    kept: dict[str, Any] = {"params": expected["params"], "ema_params": expected["params"]}
    if name != "params":
        states = [{**kept, name: rest}, {**kept, name: freeze(frozen)}]
    if name == "model_state":
        states += [OfClu(3, expected["params"], rest), {"train": {**kept, name: rest}}]
    for state in (*states, Holder(expected)):
        held = {"params", "batch_stats", "codebook"}
        assert {*variables_in(state)} - {"ema_params"} == held
        chex.assert_trees_all_equal(
            unfreeze(variables_in(state)["batch_stats"]), rest["batch_stats"]
        )
        chex.assert_trees_all_equal(
            unfreeze(bnjax.recalibrate(Net(), state, [X])["batch_stats"]),
            bnjax.recalibrate(Net(), expected, [X])["batch_stats"],
        )


def test_two_sets_of_statistics_beside_one_of_parameters_are_not_guessed():
    stats = {"batch_stats": trained().variables["batch_stats"]}
    held = {"params": trained().params, "model_state": stats, "average": stats}
    message = "`variables` must be a dict with the collection `batch_stats`"
    with pytest.raises(ValueError, match=f"^{message}"):
        bnjax.recalibrate(Net(), held, [X])


def test_copies_for_pmap_are_told():
    copies = jax.tree.map(lambda leaf: jnp.stack([leaf] * 4), trained().variables)
    message = "Each array has a leading axis of 4, as copies for `pmap` do: pass one, as in "
    message += "flax.jax_utils.unreplicate(variables)."
    for tool in (
        lambda: bnjax.recalibrate(Net(), copies, [X]),
        lambda: bnjax.fold(Net(), copies, X),
    ):
        with pytest.raises(ValueError, match=f" {re.escape(message)}$"):
            tool()


def test_variables_alone_are_the_same_object():
    variables = trained().variables
    assert variables_in(variables) is variables
    assert variables_of_model(Net(), variables) is variables


def test_lookahead_gives_the_slow_parameters():
    state = trained(optax.lookahead(optax.sgd(0.1), 5, 0.5))
    fast = jax.tree.map(lambda leaf: leaf + 1, state.params.fast)
    state = state.replace(params=optax.LookaheadParams(fast, state.params.slow))
    saved = {name: getattr(state, name) for name in ("opt_state", "batch_stats")}
    saved |= {"params": state.params._asdict()}
    for tree in (state, saved):
        chex.assert_trees_all_equal(variables_in(tree)["params"], state.params.slow)


def test_several_models_or_a_pytorch_model_are_an_error():
    variables = trained().variables
    message = "`variables` must be those of one model, but hold several, at ['ema', 'model']. "
    message += "Pass one of them."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        bnjax.diagnose(Net(), {"ema": variables, "model": variables}, [X])
    message = "`variables` must be those of a Flax model, got the state dict of a PyTorch model. "
    state_dict = {"bn.running_mean": np.zeros(3), "bn.running_var": np.ones(3)}
    for tree in (state_dict, {"state_dict": state_dict}):
        with pytest.raises(ValueError, match=f"^{message}"):
            bnjax.recalibrate(Net(), tree, [X])


@pytest.mark.parametrize("form", ["model", "dict", "tuple", "loaded"])
def test_an_nnx_state_is_found_next_to_its_optimizer(tmp_path, form):
    model, other = WithDropout(nnx.Rngs(0)), WithDropout(nnx.Rngs(1))
    optimizer = nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param)
    bnjax.save(tmp_path / "m.msgpack", {"optimizer": optimizer, "net": model, "epoch": 1})
    saved = {
        "model": {"model": model, "optimizer": optimizer},
        "dict": {"net": nnx.state(model), "optimizer": nnx.state(optimizer)},
        "tuple": (nnx.state(model), nnx.state(optimizer)),
        "loaded": bnjax.load(tmp_path / "m.msgpack"),
    }[form]
    chex.assert_trees_all_equal(
        statistics(bnjax.recalibrate(other, saved, [X])),
        statistics(bnjax.recalibrate(model, None, [X])),
    )
    other.eval()
    assert bnjax.diagnose(other, saved, [X]).findings[0].kind == "never updated"
    message = re.escape("hold several, at ['a', 'b']. Pass one of them.")
    with pytest.raises(ValueError, match=message):
        bnjax.diagnose(other, {"a": nnx.state(model), "b": nnx.state(model)}, [X])


def statistics(state: nnx.State) -> Any:
    return nnx.to_pure_dict(nnx.filter_state(state, nnx.BatchStat))


def test_flax_train_states_are_accepted():
    from flax.training import train_state

    class State(train_state.TrainState):
        batch_stats: Any

    state = trained()
    held = {name: getattr(state, name) for name in ("apply_fn", "params", "tx", "batch_stats")}
    mine = State.create(**held)
    assert {*variables_in(mine)} == {"params", "batch_stats"}
    chex.assert_trees_all_equal(variables_in(mine)["batch_stats"], state.batch_stats)
