"""Contexts belong to the thread and the task that entered them; models can be collected after."""

import asyncio
import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import bnjax
from bnjax.core import compat
from bnjax.models import contexts
from tests.support.compilers import quickly

pytestmark = pytest.mark.quick_compile

X = jnp.asarray(np.random.default_rng(0).normal(3, 2, (16, 3)), jnp.float32)


class Net(nn.Module):
    """A dense layer and its batch norm, of a width of its own."""

    width: int = 4

    @nn.compact
    def __call__(self, x):
        return bnjax.BatchNorm1d(name="bn")(nn.Dense(self.width)(x))


class NnxNet(nnx.Module):
    def __init__(self, width: int = 4) -> None:
        self.dense = nnx.Linear(3, width, rngs=nnx.Rngs(0))
        self.bn = bnjax.nnx.BatchNorm1d(width, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.bn(self.dense(x))


def start(width: int = 4) -> tuple[Net, Any]:
    net = Net(width)
    return net, net.init(jax.random.key(width), X)


def moves(step: Callable, variables: Any) -> bool:
    return bool(jnp.any(step(variables)["batch_stats"]["bn"]["mean"] != 0))


def step_of(net: nn.Module) -> Callable:
    return jax.jit(lambda variables: net.apply(variables, X, mutable=["batch_stats"])[1])


def tools(net: Net, variables: Any) -> list[Any]:
    """What each tool says of a model, as arrays and strings."""
    with bnjax.freeze("bn"):
        frozen = net.apply(variables, X, mutable=["batch_stats"])
    with bnjax.override("bn", momentum=0.25):
        faster = net.apply(variables, X, mutable=["batch_stats"])
    new = bnjax.recalibrate(net, variables, [X, X + 1])
    folded = bnjax.fold(net, new, X)
    kinds = [finding.kind for finding in bnjax.diagnose(net, variables, [X, X + 1]).findings]
    return [frozen, faster, new, folded.apply(folded.variables, X), kinds]


def test_tools_in_threads_give_the_same_as_alone():
    models = [start(width) for width in range(3, 7)]
    expected = [tools(*model) for model in models]
    found: dict[int, list] = {}
    errors: list[BaseException] = []

    def work(number: int) -> None:
        try:
            with quickly(True):  # as the main thread does
                found[number] = [tools(*models[number]) for _ in range(2)]
        except BaseException as error:  # an assertion in a thread is lost
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(models))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    for number, results in found.items():
        chex.assert_trees_all_equal(expected[number], *results)


def test_tools_in_tasks_give_the_same_as_alone():
    models = [start(width) for width in range(3, 6)]
    steps = [step_of(net) for net, _ in models]
    for step, (_, variables) in zip(steps, models, strict=True):
        assert moves(step, variables)  # compiled before anything is frozen

    async def work(number: int) -> None:
        step, (_, variables) = steps[number], models[number]
        for turn in range(4):
            with bnjax.freeze("bn"):
                for _ in range(1 + (number + turn) % 3):
                    await asyncio.sleep(0)
                assert not moves(step, variables)
            assert moves(step, variables)
            await asyncio.sleep(0)

    async def all_of_them() -> None:
        await asyncio.gather(*map(work, range(len(models))))

    asyncio.run(all_of_them())
    assert contexts.active() == ()


def test_a_context_held_across_an_await_does_not_reach_other_tasks():
    net, variables = start()
    eager = lambda v: net.apply(v, X, mutable=["batch_stats"])[1]  # noqa: E731 - a step
    seen: dict[str, bool] = {}

    async def freezing(entered: asyncio.Event, looked: asyncio.Event) -> None:
        with bnjax.freeze("bn"):
            entered.set()
            await looked.wait()
            seen["here"] = moves(eager, variables)

    async def both() -> None:
        entered, looked = asyncio.Event(), asyncio.Event()
        task = asyncio.create_task(freezing(entered, looked))
        await entered.wait()
        seen["beside"] = moves(eager, variables)
        looked.set()
        await task

    asyncio.run(both())
    assert seen == {"beside": True, "here": False}


def test_tasks_created_inside_a_context_inherit_it_while_it_lasts():
    net, variables = start()
    eager = lambda v: net.apply(v, X, mutable=["batch_stats"])[1]  # noqa: E731 - a step

    async def look(event: asyncio.Event | None = None) -> bool:
        if event is not None:
            await event.wait()
        return moves(eager, variables)

    async def run() -> tuple[bool, bool]:
        over = asyncio.Event()
        with bnjax.freeze("bn"):
            late = asyncio.create_task(look(over))
            inside = await asyncio.create_task(look())
        over.set()
        return inside, await late

    assert asyncio.run(run()) == (False, True)


def test_a_step_that_other_tasks_called_in_between_is_frozen_in_the_next_context():
    net, variables = start()
    step = step_of(net)

    async def run() -> bool:
        with bnjax.freeze("bn"):
            assert not moves(step, variables)
            await asyncio.create_task(asyncio.sleep(0))
        with bnjax.freeze("bn"):
            return moves(step, variables)

    assert asyncio.run(run()) is False


def test_a_context_can_be_entered_again_and_inside_itself():
    net, variables = start()
    step, frozen = step_of(net), bnjax.freeze("bn")
    for _ in range(3):
        with frozen:
            assert not moves(step, variables)
        assert moves(step, variables)
    with frozen, frozen:
        assert not moves(step, variables)
    assert moves(step, variables)

    @bnjax.freeze("bn")
    def decorated() -> bool:
        return moves(step, variables)

    assert not decorated()


@pytest.mark.parametrize(
    "context",
    [lambda: bnjax.freeze("bn"), lambda: bnjax.override("bn", momentum=0.25)],
    ids=["freeze", "override"],
)
def test_a_step_is_traced_once_inside_a_context_and_once_outside(context):
    net, variables = start()

    @jax.jit
    @chex.assert_max_traces(n=2)
    def step(variables):
        return net.apply(variables, X, mutable=["batch_stats"])

    once = context()
    for _ in range(3):
        step(variables)
        for again in (context(), once):
            with again:
                step(variables)


def test_one_context_in_two_threads_ends_separately_in_each():
    net, variables = start()
    frozen, both = bnjax.freeze("bn"), threading.Barrier(2)
    found: list[bool] = []

    def work(longer: bool) -> None:
        eager = lambda v: net.apply(v, X, mutable=["batch_stats"])[1]  # noqa: E731 - a step
        with frozen:
            both.wait(60)
            if longer:
                both.wait(60)
            found.append(moves(eager, variables))
        if not longer:
            both.wait(60)

    threads = [threading.Thread(target=work, args=(longer,)) for longer in (True, False)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [False, False]


def test_a_compiled_step_stays_frozen_while_another_model_is_traced():
    (net, variables), (other, others) = start(), (nn.BatchNorm(use_running_average=False), None)
    others = other.init(jax.random.key(0), X)
    step = step_of(net)
    for _ in range(3):
        with bnjax.freeze("bn"):
            assert not moves(step, variables)
            other.apply(others, X, mutable=["batch_stats"])


def use(tool: str, kind: str) -> Any:
    """One use of a tool on a new model; the model."""
    model: Any
    if kind == "linen":
        model, variables = start()
    else:
        model, variables = NnxNet(), None
        model(X)
        model.eval()
    if tool == "freeze" and isinstance(model, nnx.Module):
        bnjax.nnx.freeze(model)
        model(X)
    elif tool == "freeze":
        with bnjax.freeze("bn"):
            step_of(model)(variables)
    elif tool == "recalibrate":
        bnjax.recalibrate(model, variables, [X])
    elif tool == "diagnose":
        bnjax.diagnose(model, variables, [X], loss_fn=lambda y, _: (y**2).sum(-1))
    else:
        folded = bnjax.fold(model, variables, X)
        jax.jit(folded.apply)(folded.variables, X)
    return model


@pytest.mark.parametrize("kind", ["linen", "nnx"])
@pytest.mark.parametrize("tool", ["freeze", "recalibrate", "diagnose", "fold"])
def test_a_model_is_freed_with_its_last_reference(tool, kind):
    use(tool, kind)
    models = [weakref.ref(use(tool, kind)) for _ in range(3)]
    gc.collect()
    before = len(jax.live_arrays())
    models += [weakref.ref(use(tool, kind)) for _ in range(2)]
    gc.collect()
    assert [model() for model in models] == [None] * 5
    assert len(jax.live_arrays()) <= before


@pytest.mark.parametrize("kind", ["linen", "nnx"])
@pytest.mark.parametrize("tool", ["freeze", "recalibrate", "diagnose", "fold"])
def test_jax_keeps_no_trace_of_a_tool_that_is_done(tool, kind):
    """Of its caches, the one of traces is the only one that it does not bound."""

    def traces():
        gc.collect()
        return compat.traces().cache_info().currsize

    for _ in range(2):
        use(tool, kind)
    before = traces()
    for _ in range(3):
        use(tool, kind)
    assert 0 < traces() <= before


def test_a_models_cache_is_neither_copied_nor_pickled():
    net, variables = start()
    bnjax.diagnose(net, variables, [X])
    for again in (copy.deepcopy(net), pickle.loads(pickle.dumps(net)), net.clone()):
        assert again == net
        assert bnjax.diagnose(again, variables, [X]).findings[0].kind == "never updated"


class Counted(Net):
    """A network that may be traced so often."""

    traces: int = 0

    @nn.compact
    def __call__(self, x):
        return super().__call__(chex.assert_max_traces(counted, self.traces)(x))


def counted(x):
    return x


@pytest.mark.parametrize(
    ("tool", "traces"),
    [("recalibrate", 1), ("diagnose", 2)],  # which also looks at an evaluation
)
def test_a_tool_traces_a_model_as_often_for_many_batches_as_for_one(tool, traces):
    net, (_, variables) = Counted(traces=traces), start()
    for batches in ([X], [X, X + 1, X + 2], [X]):
        getattr(bnjax, tool)(net, variables, batches)


def test_recalibrating_and_diagnosing_the_same_model_again_compiles_nothing():
    compiled: list[str] = []

    def count(event: str, *_: Any, **__: Any) -> None:
        compiled.extend([event] * ("backend_compile" in event))

    net, variables = start(width=9)
    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        for x in (X, X + 1):
            before = len(compiled)
            bnjax.recalibrate(net, variables, [x])
            bnjax.diagnose(net, variables, [x])
    finally:
        jax.monitoring.unregister_event_duration_listener(count)
    assert before > 0
    assert len(compiled) == before
