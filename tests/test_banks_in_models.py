"""Models whose bank is set from outside: by a context, or by the batch of a step."""

import re
import threading
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import bnjax
from bnjax.training import eval_step, init_state, train_step
from tests.support import banks
from tests.support.banks import NAMES
from tests.support.oracle import assert_close

pytestmark = pytest.mark.quick_compile

BANK = banks.BANK - (banks.BANK == 3)  # of three: 0 and 2
X = banks.make(banks.NLC, True, BANK, 3).x


class Block(nn.Module):
    """A batch norm with banks among others without, inside a block."""

    norm: Any = bnjax.BatchNorm1d

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(6)(x)
        x = self.norm(banks=NAMES, affine="own", name="banked")(x)
        return bnjax.BatchNorm1d(name="plain")(nn.relu(x))


class Net(nn.Module):
    """Blocks in blocks, one of them under `nn.remat`."""

    @nn.compact
    def __call__(self, x):
        x = Block()(x)
        x = nn.remat(Block)()(x)
        return nn.Dense(1)(x)[..., 0]


class NnxBlock(nnx.Module):
    def __init__(self, into: int, rngs: nnx.Rngs) -> None:
        self.dense = nnx.Linear(into, 6, rngs=rngs)
        self.banked = bnjax.nnx.BatchNorm1d(6, affine="own", banks=NAMES, rngs=rngs)
        self.plain = bnjax.nnx.BatchNorm1d(6, rngs=rngs)

    def __call__(self, x):
        return self.plain(nnx.relu(self.banked(self.dense(x))))


class NnxNet(nnx.Module):
    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.blocks = nnx.List([NnxBlock(4, rngs), NnxBlock(6, rngs)])
        self.head = nnx.Linear(6, 1, rngs=rngs)

    def __call__(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)[..., 0]


ROWS = np.random.default_rng(0).normal(1, 2, (12, 4)).astype("f")
LAYERS = (("Block_0",), ("CheckpointBlock_1",))


def variables_of(net: nn.Module = Net()) -> Any:  # noqa: B008 - frozen
    return net.init(jax.random.key(0), ROWS)


def rows_that_moved(before: Any, after: Any) -> set[tuple[bool, ...]]:
    """For each layer with banks, which of them changed; assert that other layers changed."""
    found = set()
    for layer, old in before.items():
        new = after[layer]
        assert (np.asarray(new["plain"]["mean"]) != old["plain"]["mean"]).any()
        moved = (np.asarray(new["banked"]["mean"]) != old["banked"]["mean"]).any(1)
        found.add(tuple(map(bool, moved)))
    return found


@pytest.mark.parametrize("compiled", [True, False], ids=["jit", "eager"])
def test_a_context_reaches_every_layer_of_a_linen_model(compiled):
    net, variables = Net(), variables_of()
    apply: Any = lambda v, x: net.apply(v, x, mutable=["batch_stats"])  # noqa: E731
    apply = jax.jit(apply) if compiled else apply
    for number, name in enumerate(NAMES):
        with bnjax.bank(name):
            _, updates = apply(variables, ROWS)
        moved = rows_that_moved(variables["batch_stats"], updates["batch_stats"])
        assert moved == {tuple(n == number for n in range(3))}


@pytest.mark.parametrize("compiled", [True, False], ids=["jit", "eager"])
def test_a_context_reaches_every_layer_of_an_nnx_model(compiled):
    call: Any = nnx.jit(lambda net, x: net(x)) if compiled else lambda net, x: net(x)
    for number, name in enumerate(NAMES):
        net = NnxNet()
        with bnjax.bank(name):
            call(net, ROWS)
        for block in net.blocks:
            moved = (block.banked.mean[...] != 0).any(1).tolist()
            assert moved == [n == number for n in range(3)]


def test_a_program_is_compiled_once_for_each_name():
    net, variables = Net(), variables_of()

    @jax.jit
    @chex.assert_max_traces(2)
    def apply(variables, x):
        return net.apply(variables, x)

    found = []
    for name in ("clean", "dark", "clean", "dark", "clean"):
        with bnjax.bank(name):
            found.append(apply(variables, ROWS))
    np.testing.assert_array_equal(found[0], found[2])


def test_the_inner_context_wins_and_the_call_wins_over_both():
    layer = bnjax.BatchNorm1d(5, banks=NAMES)
    variables = layer.init(jax.random.key(0), X)

    def moved(**told: Any) -> Any:
        _, updates = layer.apply(variables, X, mutable=["batch_stats"], **told)
        return np.asarray(updates["batch_stats"]["mean"]).any(1).tolist()

    with bnjax.bank("clean"):
        with bnjax.bank(1):
            assert moved() == [False, True, False]
            assert moved(bank="dark") == [False, False, True]
        assert moved() == [True, False, False]
        with bnjax.bank(BANK):
            assert moved() == [True, False, True]
    with pytest.raises(ValueError, match="the call must say which one"):
        moved()


def test_an_error_ends_a_context_which_can_be_entered_again():
    target = bnjax.bank("dark")
    layer = bnjax.BatchNorm1d(5, banks=NAMES)
    variables = layer.init(jax.random.key(0), X)
    for _ in range(2):
        with pytest.raises(ValueError, match="BatchNorm1d expected 2D input"), target:
            layer.apply(variables, X[0, 0])
    with pytest.raises(ValueError, match="the call must say which one"):
        layer.apply(variables, X)


def test_each_thread_has_its_own_bank():
    layer = bnjax.BatchNorm1d(5, banks=NAMES)
    variables = layer.init(jax.random.key(0), X)
    apply = jax.jit(lambda v, x: layer.apply(v, x, mutable=["batch_stats"])[1])
    together, found = threading.Barrier(3), {}

    def run(name: str) -> None:
        for _ in range(3):
            with bnjax.bank(name):
                together.wait()
                mean = apply(variables, X)["batch_stats"]["mean"]
                found.setdefault(name, []).append(np.asarray(mean).any(1).tolist())

    threads = [threading.Thread(target=run, args=(name,)) for name in NAMES]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wanted = {name: [[n == k for n in NAMES]] * 3 for k in NAMES for name in (k,)}
    assert found == wanted


def test_a_traced_bank_works_inside_its_trace():
    net, variables = Net(), variables_of()

    @jax.jit
    def apply(variables, x, bank):
        with bnjax.bank(bank):
            return net.apply(variables, x, mutable=["batch_stats"])[1]

    for bank, wanted in ((jnp.int32(1), (False, True, False)), (BANK, (True, False, True))):
        updates = apply(variables, ROWS, bank)
        assert rows_that_moved(variables["batch_stats"], updates["batch_stats"]) == {wanted}


def loss(outputs, batch):
    return (outputs - batch["y"]) ** 2


BATCH = {"x": ROWS, "y": ROWS.sum(1), "bank": BANK}


def by_hand(net: Any, variables: Any, batch: Any) -> Any:
    """The gradient and the statistics of one step, with a context inside."""

    def objective(params):
        with bnjax.bank(batch["bank"]):
            y, updates = net.apply(
                {**variables, "params": params}, batch["x"], mutable=["batch_stats"]
            )
        return loss(y, batch).mean(), updates["batch_stats"]

    grads, stats = jax.grad(objective, has_aux=True)(variables["params"])
    params = jax.tree.map(lambda p, g: p - 0.1 * g, variables["params"], grads)
    return {"params": params, "batch_stats": stats}


def test_a_training_step_takes_the_banks_of_a_batch():
    state = init_state(Net(), optax.sgd(0.1), jax.random.key(0), ROWS)
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    new, _ = train_step(loss, donate=False)(state, BATCH)
    wanted = by_hand(Net(), variables, BATCH)
    found = {"params": new.params, "batch_stats": new.batch_stats}
    assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    totals = eval_step(loss)(new, BATCH)
    with bnjax.bank(BANK):
        y = Net().apply(found, ROWS)
    assert_close(totals["loss"], loss(y, BATCH).sum(), rtol=1e-5)


def test_padded_examples_need_no_bank():
    state = init_state(Net(), optax.sgd(0.1), jax.random.key(0), ROWS)
    mask = np.arange(12) < 9
    padded = {**BATCH, "mask": mask, "bank": np.where(mask, BANK, -1).astype(np.int32)}
    some = {**BATCH, "mask": mask}
    step, evaluation = train_step(loss, donate=False), eval_step(loss)
    (a, one), (b, other) = (step(state, batch) for batch in (padded, some))
    assert_close((a.params, a.batch_stats, one), (b.params, b.batch_stats, other), rtol=1e-6)
    assert_close(evaluation(a, padded)["loss"], evaluation(a, some)["loss"], rtol=1e-6)


def test_micro_batches_pool_the_moments_of_each_bank():
    """Equal to the whole batch if only the statistics depend on the other examples."""
    net = bnjax.BatchNorm1d(4, banks=NAMES, affine="own")
    state = init_state(net, optax.sgd(0.1), jax.random.key(0), ROWS)

    def of_one(outputs, batch):
        return (outputs.sum(-1) - batch["y"]) ** 2

    whole, _ = train_step(of_one, donate=False)(state, BATCH)
    parts, _ = train_step(of_one, donate=False, microbatches=3)(state, BATCH)
    assert_close(parts.batch_stats, whole.batch_stats, rtol=1e-5)


def test_an_nnx_training_step_takes_the_banks_of_a_batch():
    model, other = NnxNet(), NnxNet()
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
    by_itself = nnx.Optimizer(other, optax.sgd(0.1), wrt=nnx.Param)
    bnjax.nnx.train_step(loss)(model, optimizer, BATCH)

    def objective(model):
        with bnjax.bank(BANK):
            return loss(model(ROWS), BATCH).mean()

    by_itself.update(other, nnx.grad(objective)(other))
    assert_close(
        nnx.to_pure_dict(nnx.state(model)), nnx.to_pure_dict(nnx.state(other)), rtol=1e-5, atol=1e-6
    )
    totals = bnjax.nnx.eval_step(loss)(model, BATCH)
    model.eval()
    with bnjax.bank(BANK):
        assert_close(totals["loss"], loss(model(ROWS), BATCH).sum(), rtol=1e-5)


def test_recalibration_pools_the_statistics_of_each_bank_over_all_batches():
    layer = bnjax.BatchNorm1d(4, banks=NAMES)
    variables = layer.init(jax.random.key(0), ROWS)
    batches = [{"x": ROWS[:7], "bank": BANK[:7]}, {"x": ROWS[7:], "bank": BANK[7:]}]
    found = bnjax.recalibrate(layer, variables, batches)["batch_stats"]
    for number in (0, 2):
        seen = ROWS[number == BANK]
        assert_close(found["mean"][number], seen.mean(0), rtol=1e-5)
        assert_close(found["var"][number], seen.var(0), rtol=1e-5)
    assert found["mean"][1].tolist() == [0] * 4
    assert found["var"][1].tolist() == [1] * 4
    model = bnjax.nnx.BatchNorm1d(4, banks=NAMES, rngs=nnx.Rngs(0))
    state = bnjax.recalibrate(model, None, batches)
    assert_close(state["mean"][...], found["mean"], rtol=1e-6)
    with bnjax.bank("noisy"):
        one = bnjax.recalibrate(layer, variables, [ROWS])["batch_stats"]
    assert_close(one["mean"][1], ROWS.mean(0), rtol=1e-5)
    assert one["mean"][0].tolist() == [0] * 4


def test_without_a_bank_the_error_names_the_layer_that_needs_one():
    net, variables = Net(), variables_of()
    message = (
        "The layer has the banks ['clean', 'noisy', 'dark'], and the call must say which one: pass "
        '`bank`, or write `with bnjax.bank("clean"):` around the call of the model.\n'
        "In BatchNorm1d at 'Block_0/banked'."
    )
    with pytest.raises(ValueError, match=rf"^{re.escape(message)}"):
        net.apply(variables, ROWS)


@pytest.mark.parametrize("bank", ["dark", [0, 1, 2], ("dark", "clean")])
def test_names_and_lists_in_a_batch_are_refused(bank):
    net, variables, batch = Net(), variables_of(), {"x": X, "bank": bank}
    state = init_state(net, optax.sgd(0.1), jax.random.key(0), X)
    name = "dark" if bank == "dark" else "target"
    message = (
        "The `bank` of a batch must be a number or an array of int32, one for each example, got "
        f"{bank!r}. Convert it, as in np.array(bank), or give a name for all examples: `with "
        f'bnjax.bank("{name}"):` around the call.'
    )
    loss = lambda outputs, batch: jnp.mean(outputs**2)  # noqa: E731
    for call in (
        lambda: bnjax.recalibrate(net, variables, [batch]),
        lambda: bnjax.diagnose(net, variables, [batch]),
        lambda: train_step(loss)(state, batch),
        lambda: eval_step(loss)(state, batch),
    ):
        with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
            call()


def test_recalibration_refuses_banks_that_do_not_exist():
    net, variables, mask = Net(), variables_of(), np.ones(len(ROWS), bool)
    message = re.escape("`bank` must lie between 0 and 2, got [3].")
    bank = np.where(np.arange(len(ROWS)) < 2, 3, 1).astype(np.int32)
    with pytest.raises(ValueError, match=f"^{message}$"):
        bnjax.recalibrate(net, variables, [{"x": ROWS, "bank": bank}])
    mask[:2] = False
    bnjax.recalibrate(net, variables, [{"x": ROWS, "bank": bank, "mask": mask}])
