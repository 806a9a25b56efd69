"""Every tool on models of packages that know nothing of bnjax, against moments in float64.

`python -m tests.test_zoo` prints what each found as a table.
"""

import functools
import re
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
import pytest

import bnjax
from bnjax.training import eval_step, evaluate, init_state, train_step
from tests.support.compilers import install, quickly
from tests.support.zoo import CASES, Net, distance, leaf, moments, stats

pytestmark = pytest.mark.quick_compile
TOLERANCE = 5e-5  # of statistics in float32, relative to those in float64


def loss(outputs: Any, batch: Any) -> jax.Array:
    return (leaf(outputs) ** 2).mean(-1)


def state_of(net: Net, variables: Any = None) -> Any:
    """A state of training with these variables."""
    tx = optax.sgd(1e-2)
    state = init_state(net.model, tx, jax.random.key(0), net.xs[0], **net.case.evaluate)
    variables = net.variables if variables is None else variables
    return state.replace(params=variables["params"], batch_stats=variables["batch_stats"])


@functools.cache
def step_of(net: Net, microbatches: int = 1) -> Any:
    kwargs = net.case.train
    return train_step(loss, apply_kwargs=kwargs, microbatches=microbatches, donate=False)


def worst(net: Net, variables: Any, wanted: Callable[[str], Any], names: Any = None) -> str:
    """The largest distance of the statistics of all layers from those that are wanted."""
    names = net.layers if names is None else names
    largest = max((distance(stats(variables, n), wanted(n)), n) for n in names)
    assert largest[0] < TOLERANCE, largest
    return f"{largest[0]:.0e}"


def moved_to(net: Net, name: str, inputs: Any, momentum: float | None = None) -> Any:
    """The statistics of a layer after one step of training."""
    old = stats(net.variables, name)
    if name not in net.moving:
        return old
    kept = net.momenta[name] if momentum is None else momentum
    pairs = zip(old, moments(inputs[name]), strict=True)
    return tuple(kept * a + (1 - kept) * b for a, b in pairs)


def same(found: Any, wanted: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


def relative(found: Any, wanted: Any, tolerance: float = 1e-4) -> str:
    found, wanted = np.asarray(leaf(found), np.float64), np.asarray(leaf(wanted), np.float64)
    error = np.max(np.abs(found - wanted)) / np.max(np.abs(wanted))
    assert error < tolerance, error
    return f"{error:.0e}"


def freezing(net: Net) -> str:
    """Frozen, the model evaluates, and its statistics are bit for bit what they were."""
    apply = functools.partial(net.model.apply, mutable=["batch_stats"], **net.case.train)
    with bnjax.freeze("**"):
        y, after = jax.jit(apply)(net.variables, net.xs[0])
    same(after["batch_stats"], net.variables["batch_stats"])
    relative(y, net.evaluate(net.variables, net.xs[0]))
    return "bit for bit"


def overriding(net: Net) -> str:
    """A momentum of 0.5 moves the statistics half way to those of the batch."""
    apply = functools.partial(net.model.apply, mutable=["batch_stats"], **net.case.train)
    with bnjax.override("**", momentum=0.5):
        y, after = jax.jit(apply)(net.variables, net.xs[0])
    relative(y, net.apply(net.variables, net.xs[0])[0])
    inputs = net.inputs(net.variables, net.xs[:1], "train")
    return worst(net, after, lambda name: moved_to(net, name, inputs, 0.5))


@functools.cache
def recalibrated(net: Net) -> Any:
    return bnjax.recalibrate(net.model, net.variables, net.xs, apply_kwargs=net.case.evaluate)


def recalibrating(net: Net) -> str:
    """Each layer gets the moments of its inputs while every layer normalizes by its batch."""
    found = recalibrated(net)
    same(found["params"], net.variables["params"])
    inputs = net.inputs(net.variables, net.xs, "forced")
    return worst(net, found, lambda name: moments(inputs[name]))


def recalibrating_in_sequence(net: Net) -> str:
    """Each layer gets the moments of its inputs in evaluation, of the layers before it done."""
    options = {"apply_kwargs": net.case.evaluate, "sequential": True}
    found = bnjax.recalibrate(net.model, net.variables, net.xs, **options)
    inputs = net.inputs(found, net.xs, "evaluate")
    return worst(net, found, lambda name: moments(inputs[name]))


def findings(net: Net, variables: Any, **options: Any) -> dict[str, Any]:
    kwargs = net.case.evaluate
    found = bnjax.diagnose(net.model, variables, net.xs, apply_kwargs=kwargs, **options)
    return {each.kind: each for each in found.findings}


def diagnosing(net: Net) -> str:
    """New statistics were never updated; right ones are healthy; forgotten ones are named."""
    found = findings(net, net.fresh)
    assert set(found["never updated"].layers) == set(net.layers)
    found = findings(net, recalibrated(net))
    assert tuple(found) == net.case.findings, found
    return ", ".join(found) or "healthy"


def diagnosing_a_training(net: Net) -> str:
    """After a short training the layers that were left in evaluation are named, and no others."""
    state = state_of(net, net.fresh)
    for x in 3 * net.xs:
        state, _ = step_of(net)(state, {"x": x})
    found = findings(net, state.variables, steps=int(state.step))
    late = {"lagging"} if min(net.momenta.values()) ** 12 > 0.2 else set()
    left = set(net.layers) - set(net.moving)
    assert len(left) == net.case.evaluates
    assert set(found["left in evaluation"].layers if left else ()) == left
    assert set(found) - {"left in evaluation"} == {*net.case.findings, *late}
    return ", ".join(f"{kind} ({len(each.layers)})" for kind, each in found.items())


def fold(net: Net, variables: Any) -> Any:
    return bnjax.fold(net.model, variables, net.xs[0], apply_kwargs=net.case.evaluate)


def folding(net: Net) -> str:
    """Equal outputs under jit; for each batch norm that stays there is a reason."""
    variables, unfolded, error = recalibrated(net), net.case.unfolded, ""
    if len(unfolded) == len(net.layers):
        with pytest.raises(
            ValueError, match="must have a batch norm that can be folded"
        ) as refused:
            fold(net, variables)
        reasons = str(refused.value)
    else:
        folded = fold(net, variables)
        actual = jax.jit(folded.apply)(folded.variables, net.xs[1])
        error = ", " + relative(actual, net.evaluate(variables, net.xs[1]))
        rows = [row for row in folded.report.rows if row.batch_norm]
        assert {row.batch_norm for row in rows} == set(net.layers)
        assert {row.batch_norm for row in rows if row.reason} == set(unfolded)
        reasons = "\n".join(f"{row.batch_norm}: {row.reason}" for row in rows)
    for name, why in unfolded.items():
        assert f"{name}: {why}" in reasons
    return f"{len(net.layers) - len(unfolded)} of {len(net.layers)}{error}"


def micro_batch(net: Net) -> tuple[Any, Any]:
    return step_of(net, 2)(state_of(net), {"x": net.xs[0]})


def micro_batching(net: Net) -> str:
    """Two micro-batches move the statistics as far as the pooled moments of both."""
    if net.case.refuses:
        with pytest.raises(ValueError, match=re.escape(net.case.refuses)):
            micro_batch(net)
        return "refused"
    after, metrics = micro_batch(net)
    assert metrics["accepted"]
    inputs = net.inputs(net.variables, (net.xs[0][0::2], net.xs[0][1::2]), "train")
    return worst(net, after.variables, lambda name: moved_to(net, name, inputs))


def training(net: Net) -> str:
    """A step moves the statistics as the model by itself does, and all batches are evaluated."""
    after, metrics = step_of(net)(state_of(net), {"x": net.xs[0]})
    assert metrics["accepted"]
    y, updates = net.apply(net.variables, net.xs[0])
    np.testing.assert_allclose(metrics["loss"], np.mean(loss(y, {})), rtol=1e-5)
    error = worst(net, after.variables, lambda name: stats(updates, name))
    batches = [{"x": net.xs[0]}, {"x": net.xs[1][:3]}]
    step = eval_step(loss, apply_kwargs=net.case.evaluate)
    wanted = np.concatenate([loss(net.evaluate(after.variables, b["x"]), {}) for b in batches])
    found = evaluate(step, after, batches)["loss"]
    np.testing.assert_allclose(found, np.mean(wanted, dtype=np.float64), rtol=1e-5)
    return error


TOOLS: dict[str, Callable[[Net], str]] = {
    "freeze": freezing,
    "override": overriding,
    "recalibrate": recalibrating,
    "sequential": recalibrating_in_sequence,
    "diagnose": diagnosing,
    "after 12 steps": diagnosing_a_training,
    "fold": folding,
    "2 micro-batches": micro_batching,
    "train, evaluate": training,
}


@functools.cache
def said(package: str) -> tuple[Net, dict[str, str]]:
    """What each tool says of a package's own class of batch norm; then it is registered."""
    net = Net(next(case for case in CASES.values() if case.package == package))
    tools = TOOLS | {"fold": lambda net: fold(net, net.variables), "2 micro-batches": micro_batch}
    messages = {}
    for tool in tools.keys() - {"train, evaluate"}:
        with pytest.raises(ValueError, match=r"bnjax\.register\(") as refused:
            tools[tool](net)
        messages[tool] = str(refused.value)
    bnjax.register(net.norm)
    return net, messages


@functools.cache
def built(name: str) -> Net:
    """A model whose batch norms are known."""
    case = CASES[name]
    if case.copy is None:
        return Net(case)
    net, _ = said(case.package)
    return net if net.case is case else Net(case)


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("name", CASES)
def test_a_tool_on_a_model_of_the_zoo(name, tool):
    TOOLS[tool](built(name))


@pytest.mark.parametrize("package", dict.fromkeys(c.package for c in CASES.values() if c.copy))
def test_a_class_of_its_own_is_named_until_it_registered_class(package):
    net, messages = said(package)
    for tool, message in messages.items():
        for layer in net.layers:
            assert f"'{layer}' ({net.norm.__name__})" in message, tool
        assert f"bnjax.register({net.norm.__name__}, ...)" in message, tool


def main() -> None:
    """Print what each tool found, the models in rows."""
    install()
    print("model", *TOOLS, "seconds", sep=" | ")
    for name in CASES:
        begin, cells = time.perf_counter(), []
        for check in TOOLS.values():
            with quickly(True):
                try:
                    cells.append(check(built(name)))
                except pytest.skip.Exception:
                    cells.append("-")
                except Exception as error:
                    cells.append(f"{type(error).__name__}: {error}")
        print(name, *cells, f"{time.perf_counter() - begin:.0f}", sep=" | ", flush=True)


if __name__ == "__main__":
    main()
