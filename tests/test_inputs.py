"""What of a batch a model is called with, and what in it has an entry for each example."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import bnjax
from bnjax.training import eval_step, evaluate, init_state, train_step

pytestmark = pytest.mark.quick_compile

SIZE = 24


class Critic(nn.Module):
    """A model of two inputs, the second of which has a default."""

    @nn.compact
    def __call__(self, obs, action=None, train=False):
        x = obs if action is None else jnp.concatenate([obs, action], -1)
        x = nn.Dense(4, name="dense")(x)
        x = nn.BatchNorm(not train, momentum=0.9, name="bn")(x)
        return nn.Dense(3, name="head")(nn.relu(x))


class OfDict(Critic):
    """Called with one dict of dicts."""

    def __call__(self, obs, action=None, train=False):
        assert action is None
        return super().__call__(obs["state"]["obs"], obs["action"], train=train)


def batch(seed: int, size: int = SIZE) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {
        "obs": (1 + 2 * rng.normal(size=(size, 3))).astype(np.float32),
        "action": rng.normal(size=(size, 2)).astype(np.float32),
        "y": rng.integers(0, 3, size),
        "weights": (1 + np.arange(SIZE)).astype(np.float32) / SIZE,  # of classes, for whatever size
    }


BATCHES = [batch(seed) for seed in range(8)]
PER_EXAMPLE = ("obs", "action", "y")


def nested(each: dict[str, Any]) -> dict[str, Any]:
    return {"state": {"obs": each["obs"]}, "action": each["action"]}


# Each is a model, `inputs`, and a batch made of one as above.
WAYS: dict[str, tuple[nn.Module, Any, Any]] = {
    "several": (Critic(), ("obs", "action"), lambda each: each),
    "keywords": (Critic(), {"action": "action", "obs": "obs"}, lambda each: each),
    "function_of_tuple": (Critic(), lambda b: (b["obs"], b["action"]), lambda each: each),
    "function_of_keywords": (
        Critic(),
        lambda b: {"obs": b["obs"], "action": b["action"]},
        lambda each: each,
    ),
    "function_of_one": (Critic(), lambda b: jnp.concatenate([b["obs"], b["action"]], -1), dict),
    "one_name": (
        Critic(),
        "both",
        lambda each: each | {"both": np.concatenate([each["obs"], each["action"]], -1)},
    ),
    "nested": (OfDict(), "image", lambda each: each | {"image": nested(each)}),
    "function_of_nested": (OfDict(), lambda b: (nested(b),), lambda each: each),
}
each_way = pytest.mark.parametrize(("model", "inputs", "make"), WAYS.values(), ids=WAYS)
SOME = ("several", "keywords", "function_of_keywords", "nested")
some_ways = pytest.mark.parametrize(
    ("model", "inputs", "make"), [WAYS[name] for name in SOME], ids=SOME
)


def loss(outputs, each):
    values = optax.softmax_cross_entropy_with_integer_labels(outputs, each["y"])
    return values * each["weights"][each["y"]], {"right": outputs.argmax(-1) == each["y"]}


@functools.cache
def start() -> Any:
    names = ("obs", "action")
    return init_state(Critic(), optax.sgd(0.1), jax.random.key(0), BATCHES[0], inputs=names)


def by_hand(state: Any, each: Any, mask: Any = None) -> tuple[Any, Any, Any]:
    """Parameters, statistics and loss after a plain step, of the examples that count."""
    kept = {name: each[name] if mask is None else each[name][mask] for name in PER_EXAMPLE}

    def objective(params):
        variables = {"params": params, "batch_stats": state.batch_stats}
        args = kept["obs"], kept["action"]
        y, new = Critic().apply(variables, *args, train=True, mutable=["batch_stats"])
        return loss(y, each | kept)[0].mean(), new["batch_stats"]

    (value, stats), grads = jax.jit(jax.value_and_grad(objective, has_aux=True))(state.params)
    return jax.tree.map(lambda p, g: p - 0.1 * g, state.params, grads), stats, value


def close(found: Any, wanted: Any, tol: float = 1e-5) -> None:
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=tol, atol=tol)


def exact(params: Any, batches: Any) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of what the batch norm gets, in float64."""
    wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params["dense"])
    x = np.concatenate([np.concatenate([b["obs"], b["action"]], -1) for b in batches])
    x = x @ wide["kernel"] + wide["bias"]
    return x.mean(0), x.var(0)


@each_way
def test_a_step_of_each_form_of_inputs_is_the_plain_one(model, inputs, make):
    state = start().replace(apply_fn=model.apply)
    how: Any = {"inputs": inputs, "per_example": (*PER_EXAMPLE, "both", "image")}
    step = train_step(loss, apply_kwargs={"train": True}, donate=False, **how)
    after, metrics = step(state, make(BATCHES[0]))
    params, stats, value = by_hand(start(), BATCHES[0])
    close((after.params, after.batch_stats, metrics["loss"]), (params, stats, value))


@some_ways
@pytest.mark.parametrize("number", [2, 12])
def test_micro_batches_cut_each_form_of_inputs(model, inputs, make, number):
    state = start().replace(apply_fn=model.apply)
    how: Any = {"inputs": inputs, "per_example": (*PER_EXAMPLE, "both", "image")}
    step = train_step(loss, apply_kwargs={"train": True}, microbatches=number, donate=False, **how)
    after, metrics = step(state, make(BATCHES[0]))
    close(after.batch_stats, by_hand(start(), BATCHES[0])[1])
    masks = [np.arange(SIZE) % number == i for i in range(number)]
    close(metrics["loss"], np.mean([by_hand(start(), BATCHES[0], m)[2] for m in masks]))


@some_ways
def test_a_mesh_splits_each_form_of_inputs(model, inputs, make):
    state = start().replace(apply_fn=model.apply)
    mesh = jax.make_mesh((4,), ("data",))
    how: Any = {"inputs": inputs, "per_example": (*PER_EXAMPLE, "both", "image"), "mesh": mesh}
    after, metrics = train_step(loss, apply_kwargs={"train": True}, donate=False, **how)(
        state, make(BATCHES[0])
    )
    params, stats, value = by_hand(start(), BATCHES[0])
    close((after.params, after.batch_stats, metrics["loss"]), (params, stats, value))
    ragged = make(batch(1, 10))
    found = evaluate(eval_step(loss, **how), state, [ragged])
    alone = evaluate(eval_step(loss, **{**how, "mesh": None}), state, [ragged])
    assert found == pytest.approx(alone, rel=1e-5)
    variables = {"params": start().params, "batch_stats": start().batch_stats}
    y = Critic().apply(variables, ragged["obs"], ragged["action"])
    values, metrics = loss(y, ragged)
    assert found == pytest.approx(
        {"loss": float(values.mean()), "right": float(metrics["right"].mean())}, rel=1e-5
    )


@some_ways
@pytest.mark.parametrize("how", ["parallel", "sequential", "mesh"])
def test_recalibration_of_each_form_of_inputs(model, inputs, make, how):
    state = start()
    mesh = jax.make_mesh((4,), ("data",))
    options: dict[str, Any] = {"sequential": {"sequential": True}, "mesh": {"mesh": mesh}}
    batches = [*map(make, BATCHES), make(batch(9, 7))]
    found = bnjax.recalibrate(
        model, state.variables, batches, inputs=inputs, **options.get(how, {})
    )
    bn = found["batch_stats"]["bn"]
    close((bn["mean"], bn["var"]), exact(state.params, batches))


@each_way
def test_a_diagnosis_and_a_fold_of_each_form_of_inputs(model, inputs, make):
    state, batches = start(), [make(each) for each in BATCHES]
    fresh = bnjax.recalibrate(model, state.variables, batches, inputs=inputs)
    report = bnjax.diagnose(
        model, fresh, batches, loss_fn=loss, inputs=inputs, per_example=(*PER_EXAMPLE, "image")
    )
    assert list(report.findings) == []
    wanted = np.mean([loss(model_of(fresh, each), each)[0].mean() for each in BATCHES])
    assert report.losses["eval"]["loss"] == pytest.approx(wanted, rel=1e-5)
    folded = bnjax.fold(model, fresh, batches[0], inputs=inputs)
    close(folded.apply(folded.variables, make(batch(3, 5))), model_of(fresh, batch(3, 5)), 1e-4)
    assert "bn" not in folded.variables["params"]


def model_of(variables: Any, each: Any) -> Any:
    return Critic().apply(variables, each["obs"], each["action"])


@pytest.mark.parametrize("number", [1, 2, 12])
def test_masked_examples_count_nowhere_in_models_of_several_inputs(number):
    mask = np.arange(SIZE) % 5 > 0  # of each micro-batch some count
    wild = {
        name: np.where(mask.reshape(-1, *[1] * (v.ndim - 1)), v, 2)
        for name, v in BATCHES[0].items()
        if name in PER_EXAMPLE
    }
    each = BATCHES[0] | wild | {"mask": mask}
    how: Any = {"inputs": ("obs", "action"), "per_example": PER_EXAMPLE, "donate": False}
    step = train_step(loss, apply_kwargs={"train": True}, microbatches=number, **how)
    after, metrics = step(start(), each)
    params, stats, value = by_hand(start(), BATCHES[0], mask)
    close(after.batch_stats, stats)
    if number == 1:
        close((after.params, metrics["loss"]), (params, value))
    del how["donate"]
    found = evaluate(eval_step(loss, **how), start(), [each])
    kept = BATCHES[0] | {name: BATCHES[0][name][mask] for name in PER_EXAMPLE}
    alone = evaluate(eval_step(loss, **how), start(), [kept])
    assert found == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize("kind", [nn.BatchNorm, bnjax.linen.BatchNorm])
@pytest.mark.parametrize("number", [2, 12])
def test_a_micro_batch_of_padding_alone_counts_nowhere(kind, number):
    # With Flax's layers such a step was rejected.
    net = nn.Sequential([kind(False, momentum=0.9), nn.Dense(1), lambda y: y[:, 0]])
    each = {"x": BATCHES[0]["obs"], "mask": np.arange(SIZE) % 12 == 0}
    state = init_state(net, optax.sgd(0.1), jax.random.key(0), each["x"])
    step = train_step(lambda y, _: (y - 1) ** 2, microbatches=number, donate=False)
    after, metrics = step(state, each)
    assert metrics["accepted"]
    x = np.float64(each["x"][each["mask"]])
    close(after.batch_stats["layers_0"]["mean"], 0.1 * x.mean(0))
    close(after.batch_stats["layers_0"]["var"], 0.9 + 0.1 * x.var(0))


def test_what_is_as_long_as_the_batch_is_cut_unless_what_is_of_examples_is_named():
    how: Any = {"inputs": ("obs", "action"), "apply_kwargs": {"train": True}, "donate": False}
    values = [
        train_step(loss, microbatches=2, per_example=names, **how)(start(), BATCHES[0])[1]["loss"]
        for names in (None, "y", ["y"])
    ]
    masks = [np.arange(SIZE) % 2 == i for i in range(2)]
    close(values[1:], [np.mean([by_hand(start(), BATCHES[0], m)[2] for m in masks])] * 2)
    assert abs(values[0] - values[1]) > 1e-3


class Outputs(nn.Module):
    """A model of many outputs: a dict with a tuple, integers and one number for all examples."""

    @nn.compact
    def __call__(self, x, train=False):
        y = nn.Dense(3)(nn.BatchNorm(not train, name="bn")(nn.Dense(4)(x)))
        return {"logits": (y, y.argmax(-1)), "penalty": jnp.mean(y**2)}


def of_outputs(outputs, each):
    logits, classes = outputs["logits"]
    values = optax.softmax_cross_entropy_with_integer_labels(logits, each["y"])
    return values, {"right": classes == each["y"]}


@pytest.mark.parametrize(("number", "devices"), [(1, None), (2, None), (12, None), (2, 4)])
def test_outputs_may_be_dicts_tuples_and_integers(number, devices):
    mesh = None if devices is None else jax.make_mesh((devices,), ("data",))
    each = {"x": BATCHES[0]["obs"], "y": BATCHES[0]["y"]}
    net = Outputs()
    state = init_state(net, optax.sgd(0.1), jax.random.key(0), each["x"])
    how: Any = {"apply_kwargs": {"train": True}, "donate": False, "mesh": mesh}
    _, metrics = train_step(of_outputs, microbatches=number, **how)(state, each)
    outs = []
    for i in range(number):
        x = each["x"][i::number]
        y, _ = net.apply(state.variables, x, train=True, mutable=["batch_stats"])
        values, found = of_outputs(y, {"y": each["y"][i::number]})
        outs.append((float(values.mean()), float(found["right"].mean())))
    close((metrics["loss"], metrics["right"]), tuple(np.mean(outs, 0)))
    masked = each | {"mask": np.arange(SIZE) < 7}
    found = evaluate(eval_step(of_outputs, mesh=mesh), state, [masked])
    values, rest = of_outputs(net.apply(state.variables, each["x"][:7]), {"y": each["y"][:7]})
    wanted = {"loss": float(values.mean()), "right": float(rest["right"].mean())}
    assert found == pytest.approx(wanted, rel=1e-5)
    report = bnjax.diagnose(net, state.variables, [each], loss_fn=of_outputs)
    assert report.losses["eval"]["loss"] > 0
    assert bnjax.fold(net, state.variables, each["x"]).report.rows[0].reason is None


def masked_mean(outputs, each):
    """A loss that does by itself what the mask is for."""
    error = (outputs[:, 0] - each["y"]) ** 2
    mask = each.get("mask", jnp.ones(len(error), bool))
    return jnp.sum(jnp.where(mask, error, 0)) / jnp.maximum(mask.sum(), 1)


@pytest.mark.parametrize("number", [1, 2, 12])
@pytest.mark.parametrize(
    "loss_fn", [masked_mean, lambda y, b: jnp.mean((y[:, 0] - b["y"]) ** 2)], ids=["own", "plain"]
)
def test_a_loss_that_is_a_mean_is_that_of_the_examples_that_count(number, loss_fn):
    mask = np.arange(SIZE) % 3 > 0
    each = BATCHES[0] | {"mask": mask}
    how: Any = {"inputs": ("obs", "action"), "per_example": PER_EXAMPLE}
    state = start()
    found = evaluate(eval_step(loss_fn, **how), state, [each])["loss"]
    error = (model_of(state.variables, each)[:, 0] - each["y"])[mask] ** 2
    assert found == pytest.approx(float(error.mean()), rel=1e-5)
    step = train_step(
        loss_fn, microbatches=number, donate=False, apply_kwargs={"train": True}, **how
    )
    values = []
    for i in range(number):
        kept = {name: BATCHES[0][name][i::number][mask[i::number]] for name in PER_EXAMPLE}
        args = kept["obs"], kept["action"]
        y, _ = Critic().apply(state.variables, *args, train=True, mutable=["batch_stats"])
        values.append((y[:, 0] - kept["y"]) ** 2)
    close(step(state, each)[1]["loss"], np.concatenate(values).mean())


def metrics_of_three(y, each):
    return loss(y, each)[0], {}, {}


INPUTS_OR = (
    "`inputs` must be a name in the batch, several of them, a dict of names by keyword, or a "
    "function of the batch, got {!r}."
)
MISTAKES: dict[str, tuple[Any, type[Exception], str]] = {
    "evaluate_without_a_step": (
        lambda: evaluate(loss, start(), BATCHES),  # pyright: ignore[reportArgumentType]
        TypeError,
        "`step` must come from eval_step, as in evaluate(eval_step(loss_fn), state, batches), got "
        "loss.",
    ),
    "three_values": (
        lambda: train_step(metrics_of_three, inputs=("obs", "action"))(start(), BATCHES[0]),
        TypeError,
        "`loss_fn` must return the loss or (loss, metrics), an array and a dict of arrays, got a "
        "tuple of 3. Write return loss, {'accuracy': accuracy}.",
    ),
    "no_such_input": (
        lambda: train_step(loss, inputs=("obs", "reward"))(start(), BATCHES[0]),
        ValueError,
        "A batch must hold the `inputs` ['reward'], got ['action', 'obs', 'weights', 'y'].",
    ),
}
wrong: Any
for wrong in (0, -1, 2.0, True):
    message = f"`microbatches` must be an int of 1 or more, got {wrong!r}. Pass 1 to run the "
    message += "batch as a whole."
    call: Any = functools.partial(train_step, loss, microbatches=wrong)
    MISTAKES[f"microbatches_{wrong}"] = (call, ValueError, message)
for wrong in (3, ("x", 1), {"x": 2}, None):
    call = functools.partial(train_step, loss, inputs=wrong)
    MISTAKES[f"inputs_{wrong}"] = (call, TypeError, INPUTS_OR.format(wrong))


@pytest.mark.parametrize(("call", "error", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_gets_a_whole_sentence(call, error, message):
    with pytest.raises(error, match=rf"^{re.escape(message)}(\n|$)"):
        call()


def test_names_of_examples_that_a_batch_does_not_hold_are_named():
    step = train_step(loss, inputs=("obs", "action"), per_example=("labels",))
    with pytest.raises(ValueError, match=r"`per_example`.*\['labels'\]"):
        step(start(), BATCHES[0])


class Folds(nn.Module):
    """A model whose batch norm gets two rows for each example."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.BatchNorm(not train, name="bn")(x.reshape(2 * len(x), -1))
        return nn.Dense(1)(x).reshape(-1, 2).sum(1)


@pytest.mark.parametrize("number", [1, 2])
def test_a_mask_and_a_model_that_reshapes_examples(number):
    each = {"x": np.float32(np.arange(64).reshape(16, 4) % 7), "mask": np.arange(16) < 12}
    state = init_state(Folds(), optax.sgd(0.1), jax.random.key(0), each["x"])
    how: Any = {"apply_kwargs": {"train": True}, "donate": False, "microbatches": number}
    size = 16 // number
    message = (
        f"The `mask` of the batch has {size} examples, but the input of the BatchNorm at 'bn' has "
        f"shape ({2 * size}, 2): the model reshapes its examples. Pass that layer its own mask, as "
        f"in norm(x, mask=...), and rename that of the batch; or, in training, let the statistics "
        f"include the padding with mask_statistics=False."
    )
    with pytest.raises(ValueError, match=rf"^{re.escape(message)}(\n|$)"):
        train_step(lambda y, _: y**2, **how)(state, each)
    after, metrics = train_step(lambda y, _: y**2, mask_statistics=False, **how)(state, each)
    assert metrics["accepted"]
    wide = np.float64(each["x"]).reshape(-1, 2)
    close(after.batch_stats["bn"]["mean"], 0.01 * wide.mean(0))
