"""Models as other people write them: what the tools say of their habits."""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import linen as nn
from flax import nnx

import bnjax
from bnjax.training import history, init_state, train_step

pytestmark = pytest.mark.quick_compile

BATCHES = [jax.random.normal(jax.random.key(i), (64, 4)) + 1 for i in range(8)]


def found(model: Any, variables: Any) -> list[Any]:
    return list(bnjax.diagnose(model, variables, BATCHES).findings)


class StartsAsIdentity(nn.Module):
    """A residual branch whose last scale is zero at first, so that the block is the identity."""

    @nn.compact
    def __call__(self, x, train=False):
        running = not train
        x = nn.Dense(16)(x)
        y = nn.relu(nn.BatchNorm(running, momentum=0.9)(nn.Dense(16)(x)))
        zeros = nn.initializers.zeros
        y = nn.BatchNorm(running, momentum=0.9, scale_init=zeros, name="last")(nn.Dense(16)(y))
        return nn.Dense(2)(nn.relu(x + y))


@pytest.mark.parametrize("steps", [0, 3])
def test_scales_that_start_at_zero_are_not_dead(steps):
    # The report said "dead channels" of a new residual network.
    net = StartsAsIdentity()
    state = init_state(net, optax.adam(1e-3), jax.random.key(9), BATCHES[0])
    step = train_step(lambda y, _: (y**2).sum(-1), apply_kwargs={"train": True})
    for x in BATCHES[:steps]:
        state, _ = step(state, {"x": x})
    assert found(net, bnjax.recalibrate(net, state.variables, BATCHES)) == []


def test_scales_of_zero_among_others_are_dead():
    net = StartsAsIdentity()
    variables = bnjax.recalibrate(net, net.init(jax.random.key(0), BATCHES[0]), BATCHES)
    variables["params"]["last"]["scale"] = jnp.full(16, 0.01).at[:4].set(1e-6)
    (finding,) = found(net, variables)
    assert (finding.kind, finding.layer, finding.numbers["constant"]) == (
        "dead channels",
        "last",
        4,
    )


class Forgetful(nn.Module):
    """Two blocks, the second of which is not told whether the model trains."""

    momentum: float = 0.9

    @nn.compact
    def __call__(self, x, train=False):
        for name, running in (("told", not train), ("forgotten", True)):
            x = nn.relu(nn.BatchNorm(running, momentum=self.momentum, name=name)(nn.Dense(8)(x)))
        return nn.Dense(1)(x)


class ForgetfulNnx(nnx.Module):
    def __init__(self, momentum: float = 0.9) -> None:
        rngs = nnx.Rngs(0)
        self.told = nnx.BatchNorm(4, momentum=momentum, rngs=rngs)
        self.forgotten = nnx.BatchNorm(4, momentum=momentum, rngs=rngs)

    def __call__(self, x):
        return self.forgotten(nnx.relu(self.told(x)), use_running_average=True)


def trained_linen(momentum: float) -> tuple[Any, Any]:
    net = Forgetful(momentum)
    variables: Any = net.init(jax.random.key(0), BATCHES[0])
    for x in BATCHES * 6:
        variables |= net.apply(variables, x, train=True, mutable=["batch_stats"])[1]
    return net, variables


def trained_nnx(momentum: float) -> tuple[Any, Any]:
    model = ForgetfulNnx(momentum)
    model.train()
    for x in BATCHES * 6:
        model(x)
    model.eval()
    return model, None


TRAINED: dict[str, Callable[[float], tuple[Any, Any]]] = {
    "linen": trained_linen,
    "nnx": trained_nnx,
}
each_api = pytest.mark.parametrize("trained", TRAINED.values(), ids=TRAINED)


@each_api
def test_a_layer_left_in_evaluation_is_distinguished_from_updates_thrown_away(trained):
    # The report said "`mutable` was not given", though other layers had been updated.
    (finding,) = found(*trained(0.9))
    assert (finding.kind, finding.layers) == ("left in evaluation", ("forgotten",))
    assert finding.cause.startswith("These layers evaluate while the model trains, ")
    assert finding.cause.endswith("Pass `history=` of the training to find out.")
    assert "use_running_average" in finding.repair


@each_api
def test_a_momentum_that_gives_new_batches_no_weight_is_named(trained):
    # The report said "`mutable` was not given" of statistics that no update could move.
    (finding,) = found(*trained(1.0))
    assert finding.kind == "momentum moves nothing"
    assert finding.cause.startswith("With momentum=1.0 a new batch has no weight")
    assert finding.repair == "BatchNorm(..., momentum=0.99)  # then bnjax.recalibrate"


@pytest.mark.parametrize("steps", [1, 8])
def test_a_record_shows_which_layers_evaluate_while_the_model_trains(steps):
    net, record = Forgetful(), {}
    state = init_state(net, optax.sgd(1e-3), jax.random.key(1), BATCHES[0])
    step = train_step(lambda y, _: (y**2).sum(-1), apply_kwargs={"train": True}, donate=False)
    step = history(step, record)
    for x in BATCHES[:steps]:
        state, _ = step(state, {"x": x})
    report = bnjax.diagnose(net, state.variables, BATCHES, history=record)
    (finding,) = (f for f in report.findings if f.kind == "left in evaluation")
    assert ("Pass `history=`" in finding.cause) is (steps == 1)  # one line shows no movement


def test_a_momentum_that_keeps_statistics_of_other_data_is_named():
    variables = trained_linen(0.9)[1]
    shifted = [5 * x + 3 for x in BATCHES]
    report = bnjax.diagnose(Forgetful(1.0), variables, shifted)
    kinds = {finding.kind: finding.layers for finding in report.findings}
    assert kinds["momentum moves nothing"] == ("told", "forgotten")


class DeadBlock(nn.Module):
    """A branch that starts at zero before a relu, whose gradient at zero is zero."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.BatchNorm(not train, momentum=0.9, name="first")(nn.Dense(16)(x))
        y = nn.Dense(16)(nn.relu(x))
        y = nn.BatchNorm(not train, momentum=0.9, scale_init=nn.initializers.zeros, name="dead")(y)
        return nn.Dense(2)(x + nn.relu(y))


@pytest.mark.parametrize("steps", [0, 20])
def test_scales_without_gradient_are_distinguished_from_those_of_a_new_network(steps):
    net = DeadBlock()
    state = init_state(net, optax.adam(1e-2), jax.random.key(9), BATCHES[0])
    step = train_step(lambda y, _: (y**2).sum(-1), apply_kwargs={"train": True})
    for i in range(steps):
        state, _ = step(state, {"x": BATCHES[i % 8]})
    findings = found(net, bnjax.recalibrate(net, state.variables, BATCHES))
    assert [(f.kind, f.layer) for f in findings] == [("dead channels", "dead")] * bool(steps)
    if steps:
        assert "no gradient passes a relu at zero" in findings[0].cause
        assert findings[0].cause.endswith("Pass `steps=` to find out.")


class KeepsAxes(nn.Module):
    """A batch norm of somebody's own, whose statistics have other shapes once they were moved."""

    @nn.compact
    def __call__(self, x, train):
        mean = self.variable("batch_stats", "mean", jnp.zeros, x.shape[-1:])
        var = self.variable("batch_stats", "var", jnp.ones, x.shape[-1:])
        if train:
            mean.value = 0.9 * mean.value + 0.1 * x.mean(0, keepdims=True)
            var.value = 0.9 * var.value + 0.1 * x.var(0, keepdims=True)
        return (x - mean.value) / jnp.sqrt(var.value + 1e-5)


class WithItsOwn(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.BatchNorm(not train, name="bn")(nn.Dense(4, name="dense")(x))
        return nn.Dense(2, name="head")(KeepsAxes(name="own")(nn.Dense(4, name="other")(x), train))


class OwnNnx(nnx.Module):
    def __init__(self) -> None:
        self.mean, self.var = nnx.BatchStat(jnp.zeros(4)), nnx.BatchStat(jnp.ones(4))

    def __call__(self, x):
        return (x - self.mean[...]) / jnp.sqrt(self.var[...] + 1e-5)


class WithItsOwnNnx(nnx.Module):
    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.dense, self.other = (nnx.Linear(4, 4, rngs=rngs) for _ in range(2))
        self.bn, self.own = nnx.BatchNorm(4, rngs=rngs), OwnNnx()

    def __call__(self, x):
        return self.own(self.other(self.bn(self.dense(x))))


def test_micro_batches_name_an_unknown_batch_norm_even_if_it_fails():
    # The error said that the carry of a scan must have equal types.
    state = init_state(WithItsOwn(), optax.sgd(0.0), jax.random.key(0), BATCHES[0])
    loss = lambda y, _: (y**2).sum(-1)  # noqa: E731 - one line says it
    step = train_step(loss, apply_kwargs={"train": True}, microbatches=2)
    message = "'own' (KeepsAxes) keep a mean and a variance, but are not batch norms of"
    with pytest.raises(ValueError, match=re.escape(message)):
        step(state, {"x": BATCHES[0]})


@pytest.mark.parametrize("api", ["linen", "nnx"])
def test_fold_names_an_unknown_batch_norm_next_to_those_that_it_folds(api):
    # The report had no row for it.
    if api == "linen":
        net: Any = WithItsOwn()
        report = bnjax.fold(net, net.init(jax.random.key(0), BATCHES[0]), BATCHES[0]).report
    else:
        report = bnjax.fold(WithItsOwnNnx(), None, BATCHES[0]).report
    reasons = {row.batch_norm: row.reason for row in report.rows if row.batch_norm}
    kind = "KeepsAxes" if api == "linen" else "OwnNnx"
    why = f"{kind} is not a known batch norm class: register it with bnjax.register({kind}, ...)"
    assert reasons == {"bn": None, "own": why}


def late() -> Any:
    """A class that no other test knows, and a model with it."""

    class Late(nn.Module):
        momentum: float = 0.9

        @nn.compact
        def __call__(self, x, use_running_average):
            mean = self.variable("batch_stats", "mean", jnp.zeros, x.shape[-1:])
            var = self.variable("batch_stats", "var", jnp.ones, x.shape[-1:])
            used = (mean.value, var.value) if use_running_average else (x.mean(0), x.var(0))
            if not use_running_average:
                mean.value = self.momentum * mean.value + (1 - self.momentum) * used[0]
                var.value = self.momentum * var.value + (1 - self.momentum) * used[1]
            return (x - used[0]) / jnp.sqrt(used[1] + 1e-5)

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            return nn.Dense(2)(Late()(nn.Dense(4)(x), not train))

    return Net(), Late


@pytest.mark.parametrize("tool", ["recalibrate", "diagnose", "fold"])
def test_a_tool_that_refused_a_model_accepts_it_once_its_class_is_registered(tool):
    # Refused it for as long as the model lived: what was traced before was kept.
    net, kind = late()
    variables = net.init(jax.random.key(0), BATCHES[0])
    batches = BATCHES[0] if tool == "fold" else BATCHES
    with pytest.raises(ValueError, match=r"bnjax\.register\(Late, "):
        getattr(bnjax, tool)(net, variables, batches)
    bnjax.register(kind)
    getattr(bnjax, tool)(net, variables, batches)
