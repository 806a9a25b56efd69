"""Batch norms that others wrote: what `register` is told, and what each tool then does."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import bnjax
from bnjax.models.conventions import registered_class
from bnjax.training import init_state, train_step
from tests.support import strangers
from tests.support.registered import close, each_case
from tests.support.strangers import (
    BATCHES,
    CASES,
    INPUTS,
    Case,
    measured,
    start,
    stats_of,
    trained,
)

pytestmark = pytest.mark.quick_compile


@each_case
def test_a_frozen_registered_layer_evaluates_while_the_model_trains(case):
    net, variables = start(case)
    variables = trained(net, variables, BATCHES[1])[1]
    wanted = net.apply(variables, *(BATCHES[0][name] for name in INPUTS))
    with bnjax.freeze("norm"):
        y, after = trained(net, variables, BATCHES[0])
    close([y], [wanted])
    np.testing.assert_array_equal(stats_of(after), stats_of(variables))
    assert np.abs(trained(net, variables, BATCHES[0])[0] - wanted).max() > 0.01


@pytest.mark.parametrize("name", [n for n in CASES if n != "configured"])
def test_the_momentum_of_a_registered_layer_is_overridden_in_its_own_convention(name):
    net, variables = start(CASES[name])
    with bnjax.override("norm", momentum=0.75):
        after = trained(net, variables, BATCHES[0])[1]
    mean, var = measured(variables["params"], BATCHES[:1], CASES[name].padded)
    close(stats_of(after), (0.25 * mean, 0.75 + 0.25 * var))


@each_case
@pytest.mark.parametrize("how", ["parallel", "sequential", "mesh"])
def test_a_registered_layer_is_recalibrated(case, how):
    net, variables = start(case)
    options: dict[str, Any] = {"sequential": {"sequential": True}}.get(how, {})
    if how == "mesh":
        options = {"mesh": jax.make_mesh((4,), ("data",))}
    found = bnjax.recalibrate(net, variables, BATCHES, inputs=INPUTS, **options)
    close(stats_of(found), measured(variables["params"], BATCHES, case.padded))
    extra = set(variables["batch_stats"]["norm"]) - {"mean", "var"}
    assert all(found["batch_stats"]["norm"][name] == 0 for name in extra)


@each_case
def test_a_diagnosis_of_registered_layers_distinguishes_stale_from_fresh_statistics(case):
    net, variables = start(case)
    fresh = bnjax.recalibrate(net, variables, BATCHES, inputs=INPUTS)
    report = bnjax.diagnose(net, fresh, BATCHES, inputs=INPUTS)
    assert list(report.findings) == []
    assert report.healthy
    norm = fresh["batch_stats"]["norm"]
    stale = norm | {"mean": norm["mean"] + 10, "var": norm["var"] * 5}
    report = bnjax.diagnose(net, fresh | {"batch_stats": {"norm": stale}}, BATCHES, inputs=INPUTS)
    assert not report.healthy
    assert report.findings[0].layer == "norm"


@pytest.mark.parametrize("name", ["copied", "copied_told_in_call", "renorm"])
def test_a_registered_layer_is_folded(name):
    net, variables = start(CASES[name])
    fresh = bnjax.recalibrate(net, variables, BATCHES, inputs=INPUTS)
    fresh["params"]["norm"] = {"scale": jnp.arange(1.0, 5), "bias": jnp.arange(4.0)}
    found = bnjax.fold(net, fresh, BATCHES[0], inputs=INPUTS)
    assert [tuple(row) for row in found.report.rows if row.batch_norm] == [("dense", "norm", None)]
    assert "norm" not in found.variables["params"]
    y = net.apply(fresh, *(BATCHES[1][key] for key in INPUTS))
    close([found.apply(found.variables, BATCHES[1])], [y])


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("masked", "it returns more than an array"),
        ("configured", "the batch norm is called with a mask"),
    ],
)
def test_a_registered_layer_that_does_more_is_not_folded_with_a_reason(name, why):
    net, variables = start(CASES[name])
    with pytest.raises(ValueError, match=rf"(?s)must have a batch norm that can be folded.*{why}"):
        bnjax.fold(net, variables, BATCHES[0], inputs=INPUTS)


def test_a_registered_class_with_another_formula_is_not_folded():
    bnjax.register(strangers.Whitened, {"use_bias": False})
    net, variables = start(
        Case(
            strangers.Whitened,
            {},
            lambda x, _, train: strangers.Whitened(name="norm")(x, not train),
        )
    )
    with pytest.raises(ValueError, match="Folding must preserve the outputs on `example_x`"):
        bnjax.fold(net, variables, BATCHES[0], inputs=INPUTS)


def loss(outputs, _):
    return outputs**2


@pytest.mark.parametrize("name", [n for n in CASES if n != "renorm"])
@pytest.mark.parametrize("number", [2, 12])
def test_micro_batches_give_a_registered_layer_the_statistics_of_the_whole_batch(name, number):
    case = CASES[name]
    net, _ = start(case)
    state = init_state(net, optax.sgd(0.1), jax.random.key(0), BATCHES[0], inputs=INPUTS)
    step = train_step(
        loss, inputs=INPUTS, apply_kwargs={"train": True}, microbatches=number, donate=False
    )
    state, metrics = step(state, BATCHES[0])
    params = init_state(net, optax.sgd(0), jax.random.key(0), BATCHES[0], inputs=INPUTS).params
    mean, var = measured(params, BATCHES[:1], case.padded)
    assert metrics["accepted"]
    close(stats_of(state.variables), (0.1 * mean, 0.9 + 0.1 * var))


@pytest.mark.parametrize("number", [1, 2])
def test_statistics_with_more_axes_are_updated_over_several_steps(number):
    net, _ = start(CASES["configured"])
    state = init_state(net, optax.sgd(0.0), jax.random.key(0), BATCHES[0], inputs=INPUTS)
    how: Any = {"inputs": INPUTS, "apply_kwargs": {"train": True}}
    first, _ = train_step(loss, **how)(state, BATCHES[0])
    assert first.batch_stats["norm"]["mean"].shape == (1, 1, 4)
    last, metrics = train_step(loss, microbatches=number, **how)(first, BATCHES[1])
    assert metrics["accepted"]
    means = [measured(last.params, [each], True)[0] for each in BATCHES[:2]]
    close(stats_of(last.variables)[:1], [0.09 * means[0] + 0.1 * means[1]])
    fresh = bnjax.recalibrate(net, last.variables, BATCHES, inputs=INPUTS)
    assert bnjax.diagnose(net, fresh, BATCHES, inputs=INPUTS).healthy


def test_extra_statistics_of_a_registered_class_forbid_micro_batches():
    net, _ = start(CASES["renorm"])
    state = init_state(net, optax.sgd(0.1), jax.random.key(0), BATCHES[0], inputs=INPUTS)
    step = train_step(loss, inputs=INPUTS, apply_kwargs={"train": True}, microbatches=2)
    message = (
        "The Renorm at 'norm' must keep only a mean and a variance, but also keeps ['steps'], "
        "which can't be pooled over micro-batches. Train with microbatches=1."
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        step(state, BATCHES[0])


def error(kind: type[Exception], message: str) -> Any:
    return pytest.raises(kind, match=f"^{re.escape(message)}$")


def norm_class(**annotations: Any) -> Any:
    """A new class of linen with these fields, unknown yet."""

    class Fresh(nn.Module):
        __annotations__ = annotations

        def __call__(self, x, train):
            return x

    return Fresh


PASS_ITS_CLASS = " Pass its class, BatchNorm."


@pytest.mark.parametrize(
    ("kind", "repair"),
    [(nn.BatchNorm(), PASS_ITS_CLASS), (len, ""), (dict, ""), ("Norm", ""), (None, "")],
)
def test_only_classes_of_modules_are_registered(kind: Any, repair: str):
    message = f"`kind` must be a class of linen or nnx modules, got {kind!r}.{repair}"
    with error(TypeError, message):
        bnjax.register(kind)


class OfFlax(nn.BatchNorm):
    pass


@pytest.mark.parametrize("kind", [nn.BatchNorm, OfFlax, nnx.BatchNorm, bnjax.BatchNorm1d])
def test_a_known_class_is_not_registered(kind):
    message = f"`kind` must be an unknown class, but {kind.__name__} inherits from a known one. "
    message += "It needs no registration."
    with error(ValueError, message):
        bnjax.register(kind)


def test_a_subclass_that_does_not_call_its_known_base_can_be_registered():
    bnjax.register(kind := type("Anew", (strangers.Rewritten,), {}))
    assert registered_class(kind(True))


def test_facts_with_unknown_names_are_refused():
    message = (
        "`facts` must use the names of flax.linen.BatchNorm, x, use_running_average, momentum, "
        "axis, epsilon, mask, axis_name, axis_index_groups, use_scale, use_bias, got ['eps']."
    )
    with error(TypeError, message):
        bnjax.register(norm_class(momentum=float), {"eps": "epsilon"})


@pytest.mark.parametrize(
    ("fields", "facts", "missing", "name"),
    [
        ({"decay": float}, {"use_running_average": "not train"}, "momentum", "momentum"),
        ({"momentum": float}, {}, "use_running_average", "use_running_average"),
        (
            {"momentum": float},
            {"use_running_average": "not train", "epsilon": "config.eps"},
            "config.eps",
            "epsilon",
        ),
    ],
)
def test_facts_that_a_class_does_not_show_are_required(fields, facts, missing, name):
    message = (
        f"Fresh has no argument {missing!r}, only ['x', 'train'], and no such field, only "
        f'{[*fields]}. Say where its {name} is: bnjax.register(Fresh, {{"{name}": ...}}).'
    )
    with error(ValueError, message):
        bnjax.register(norm_class(**fields), facts)


def needs_a_name(name: str, kind: str, got: str) -> str:
    return re.escape(
        f"To change the {name} of the {kind} at 'norm', bnjax.register needs the name of an "
        f"argument or a field that sets it, got {got}."
    )


def test_a_momentum_in_a_config_can_be_read_but_not_overridden():
    net, variables = start(CASES["configured"])
    message = needs_a_name("momentum", "Configured", "'config.momentum'")
    with pytest.raises(ValueError, match=message), bnjax.override("norm", momentum=0.5):
        trained(net, variables, BATCHES[0])


@pytest.mark.parametrize(
    ("name", "kind", "got"), [("copied", "Copied", "'mask'"), ("masked", "Masked", "<function")]
)
def test_a_registered_layer_without_a_mask_cannot_leave_padding_out(name, kind, got):
    net, _ = start(CASES[name])
    state = init_state(net, optax.sgd(0.1), jax.random.key(0), BATCHES[0], inputs=INPUTS)
    masked = BATCHES[0] | {"mask": np.arange(24) < 20}
    how: Any = {"inputs": INPUTS, "apply_kwargs": {"train": True}, "donate": False}
    with pytest.raises(ValueError, match=needs_a_name("mask", kind, got)[:-3]):
        train_step(loss, **how)(state, masked)
    assert train_step(loss, mask_statistics=False, **how)(state, masked)[1]["accepted"]


@pytest.mark.parametrize("kind", [strangers.Sub, strangers.Plain])
def test_a_subclass_of_a_registered_class_is_known_with_it(kind):
    case = Case(kind, {}, lambda x, _, train: kind(not train, momentum=0.5, name="norm")(x))
    net, variables = start(case)
    y, after = trained(net, variables, BATCHES[0])
    mean, var = measured(variables["params"], BATCHES[:1], False)
    close(stats_of(after), (0.5 * mean, 0.5 + 0.5 * var))
    found = bnjax.recalibrate(net, variables, BATCHES[:1], inputs=INPUTS)
    close(stats_of(found), (mean, var))
    with bnjax.freeze("norm"):
        np.testing.assert_array_equal(
            stats_of(trained(net, variables, BATCHES[0])[1]), stats_of(variables)
        )
    assert np.abs(y).max() > 0


def frozen_apply(net: Any, variables: Any) -> None:
    with bnjax.freeze("norm"):
        trained(net, variables, BATCHES[0])


def micro_batched(net: Any, _: Any) -> None:
    state = init_state(net, optax.sgd(0.1), jax.random.key(0), BATCHES[0], inputs=INPUTS)
    how: Any = {"inputs": INPUTS, "apply_kwargs": {"train": True}, "microbatches": 2}
    train_step(loss, **how)(state, BATCHES[0])


TOOLS: dict[str, Any] = {
    "freeze": frozen_apply,
    "recalibrate": lambda net, v: bnjax.recalibrate(net, v, BATCHES, inputs=INPUTS),
    "diagnose": lambda net, v: bnjax.diagnose(net, v, BATCHES, inputs=INPUTS),
    "fold": lambda net, v: bnjax.fold(net, v, BATCHES[0], inputs=INPUTS),
    "microbatches": micro_batched,
}


def names_the_class(net: Any, variables: Any, tool: Any, kind: str) -> None:
    message = rf"'norm' \({kind}\) keep.* bnjax\.register\({kind}, \.\.\.\)"
    with pytest.raises(ValueError, match=message):
        tool(net, variables)


def unknown(kind: Any) -> Case:
    return Case(kind, {}, lambda x, _, train: kind(name="norm")(x, not train))


@pytest.mark.parametrize("tool", TOOLS.values(), ids=TOOLS)
def test_every_tool_names_an_unregistered_class(tool):
    names_the_class(*start(unknown(strangers.Stranger)), tool, "Stranger")


@pytest.mark.parametrize("kind", [strangers.Parent, strangers.Rewritten])
@pytest.mark.parametrize("tool", TOOLS.values(), ids=TOOLS)
def test_a_known_class_does_not_hide_one_that_it_shares_code_with(tool, kind):
    if not registered_class(strangers.Child()):
        bnjax.register(strangers.Child)
    names_the_class(*start(unknown(kind)), tool, kind.__name__)
