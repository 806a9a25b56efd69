"""Convert trained models to banks and back; recalibrate, diagnose and fold models with banks."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import bnjax
import bnjax.linen
from bnjax import policies

NAMES = ("clean", "noisy")
X = jax.random.normal(jax.random.key(0), (16, 4, 4, 3)) * 2 + 1
BANK = np.arange(16) % 2


class Net(nn.Module):
    """A conv and a batch norm of any kind."""

    norm: type = bnjax.BatchNorm2d
    settings: tuple = ()

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(3, (1, 1), name="conv")(x)
        return self.norm(name="bn", **dict(self.settings))(x)


class NNXNet(nnx.Module):
    """The same for nnx."""

    def __init__(self, **settings):
        self.bn = bnjax.nnx.BatchNorm2d(3, rngs=nnx.Rngs(0), **settings)

    def __call__(self, x, **call):
        return self.bn(x, **call)


def trained(net: Any) -> Any:
    variables = net.init(jax.random.key(1), X)
    return jax.tree.map(lambda a: a + 0.1 * jnp.arange(a.size).reshape(a.shape), variables)


def evaluated(net: Any, variables: Any) -> Any:
    return net.apply(variables, X)


@pytest.mark.parametrize("affine", [True, "own", "both"])
def test_a_flax_model_converted_to_banks_evaluates_the_same_and_converts_back(affine):
    plain = Net(nn.BatchNorm, (("use_running_average", True),))
    variables = trained(plain)
    banks = bnjax.to_banks(variables, NAMES, affine=affine)
    net = Net(settings=(("banks", NAMES), ("affine", affine)))
    assert jax.tree.map(jnp.shape, banks) == jax.tree.map(jnp.shape, net.init(jax.random.key(0), X))
    for name in NAMES:
        with bnjax.bank(name):
            np.testing.assert_allclose(
                evaluated(net, banks), evaluated(plain, variables), rtol=1e-6, atol=1e-6
            )
    with bnjax.bank("noisy"):
        _, moved = net.apply(banks, X, mutable=["batch_stats"])
    one = bnjax.select_bank({**banks, **moved}, "noisy")
    assert jax.tree.map(jnp.shape, one) == jax.tree.map(jnp.shape, variables)
    with bnjax.bank("noisy"):
        np.testing.assert_allclose(
            evaluated(plain, one), evaluated(net, {**banks, **moved}), rtol=1e-5, atol=1e-6
        )
    folded = bnjax.fold(plain, one, X)
    np.testing.assert_allclose(
        folded.apply(folded.variables, X), evaluated(plain, one), rtol=1e-4, atol=1e-4
    )
    assert bnjax.select_bank(banks, 0, banks=2)["batch_stats"]["bn"]["mean"].shape == (3,)


@pytest.mark.parametrize("affine", [True, "own", "both"])
def test_an_nnx_model_converted_to_banks_evaluates_the_same_and_converts_back(affine):
    plain = NNXNet()
    plain(X)
    plain.eval()
    net = NNXNet(banks=3, affine=affine)
    nnx.update(net, bnjax.to_banks(nnx.state(plain), 3, affine=affine))
    net.eval()
    np.testing.assert_array_equal(net(X, bank=2), plain(X))
    again = NNXNet()
    nnx.update(again, bnjax.select_bank(nnx.state(net), 2))
    again.eval()
    np.testing.assert_array_equal(again(X), plain(X))


def test_all_statistics_of_a_momentum_are_copied_and_selected():
    net = Net(settings=(("momentum", "pooled"), ("using", policies.Renorm.paper())))
    _, moved = net.apply(variables := trained(net), X, mutable=["batch_stats"])
    variables = {**variables, **moved}
    banks = bnjax.to_banks(variables, 2)
    assert {a.shape[0] for a in jax.tree.leaves(banks["batch_stats"])} == {2}
    found = bnjax.select_bank(banks, 1)
    jax.tree.map(np.testing.assert_array_equal, found, variables)


def test_layers_that_do_not_match_the_paths_stay_unchanged():
    stats = {"mean": jnp.zeros(3), "var": jnp.ones(3)}
    new = bnjax.to_banks({"batch_stats": {"a": stats, "b": stats}}, 2, paths="b")
    assert jax.tree.map(jnp.shape, new["batch_stats"]) == {
        "a": {"mean": (3,), "var": (3,)},
        "b": {"mean": (2, 3), "var": (2, 3)},
    }


def test_recalibration_uses_the_examples_of_each_bank():
    net = Net(settings=(("banks", ("clean", "noisy", "absent")),))
    variables = trained(net)
    batches = [{"x": X[:6], "bank": BANK[:6]}, {"x": X[6:], "bank": BANK[6:]}]
    new = bnjax.recalibrate(net, variables, batches)
    inputs = np.asarray(nn.Conv(3, (1, 1)).apply({"params": variables["params"]["conv"]}, X))
    for bank in (0, 1):
        part = inputs[BANK == bank].reshape(-1, 3).astype(np.float64)
        stats = new["batch_stats"]["bn"]
        np.testing.assert_allclose(stats["mean"][bank], part.mean(0), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(stats["var"][bank], part.var(0), rtol=1e-5)
    old = variables["batch_stats"]["bn"]["mean"][2]
    np.testing.assert_array_equal(new["batch_stats"]["bn"]["mean"][2], old)


def test_a_diagnosis_lists_each_bank_by_name():
    net = Net(settings=(("banks", NAMES),))
    variables = net.init(jax.random.key(1), X)
    batches = [{"x": X, "bank": BANK}] * 4
    variables = bnjax.recalibrate(net, variables, batches)
    assert bnjax.diagnose(net, variables, batches).healthy
    stats = variables["batch_stats"]["bn"]
    lost = {**stats, "mean": stats["mean"].at[1].set(0), "var": stats["var"].at[1].set(1)}
    report = bnjax.diagnose(net, {**variables, "batch_stats": {"bn": lost}}, batches)
    assert [row["path"] for row in report.layers] == ["bn[clean]", "bn[noisy]"]
    assert {finding.layers for finding in report.findings} == {("bn[noisy]",)}


class Block(nn.Module):
    settings: tuple = ()

    @nn.compact
    def __call__(self, x, _):
        return nn.relu(bnjax.BatchNorm1d(3, name="bn", **dict(self.settings))(x)), None


class Stack(nn.Module):
    """Batch norms in a loop, whose statistics nn.scan stacks."""

    length: int
    settings: tuple = ()

    @nn.compact
    def __call__(self, x):
        axes: Any = {"params": 0, "batch_stats": 0}
        loop = nn.scan(Block, variable_axes=axes, split_rngs={"params": True}, length=self.length)
        return loop(self.settings, name="blocks")(x, None)[0]


@pytest.mark.parametrize("length", [3, 2])  # 2 banks as well
@pytest.mark.parametrize("affine", [True, "own", "both"])
def test_a_bank_of_stacked_layers_is_taken_out(length, affine):
    x = jax.random.normal(jax.random.key(0), (8, 3))
    net = Stack(length, (("banks", 2), ("affine", affine), ("momentum", None)))
    variables = trained_on(net, x)
    one = bnjax.select_bank(variables, 1, banks=2)
    with bnjax.bank(1):
        expected = net.apply(variables, x)
    np.testing.assert_array_equal(Stack(length, (("momentum", None),)).apply(one, x), expected)


def trained_on(net: Any, x: Any) -> Any:
    with bnjax.bank(0):
        variables = net.init(jax.random.key(1), x)
    return jax.tree.map(
        lambda a: (a + jnp.arange(a.size).reshape(a.shape) / 8).astype(a.dtype), variables
    )


def test_a_diagnosis_tells_the_banks_of_stacked_layers_apart():
    x, bank = jax.random.normal(jax.random.key(0), (64, 3)) * 2 + 1, np.arange(64) % 2
    net = Stack(3, (("banks", NAMES),))
    batches = [{"x": x, "bank": bank}] * 3
    with bnjax.bank(0):
        variables = net.init(jax.random.key(1), x)
    variables = bnjax.recalibrate(net, variables, batches)
    assert bnjax.diagnose(net, variables, batches).healthy
    lost = jax.tree.map(lambda a: a.at[:, 1].set(9), variables["batch_stats"])
    report = bnjax.diagnose(net, {**variables, "batch_stats": lost}, batches)
    assert {path for each in report.findings for path in each.layers} == {"blocks/bn[noisy]"}


def test_a_diagnosis_says_nothing_of_banks_without_examples():
    net = Net(settings=(("banks", NAMES),))
    variables = net.init(jax.random.key(1), X)
    with bnjax.bank("clean"):
        variables = bnjax.recalibrate(net, variables, [X])
        report = bnjax.diagnose(net, variables, [X] * 3)
    assert report.healthy
    assert [row["values"] for row in report.layers] == [256, 0]
    with bnjax.bank("noisy"):
        (finding,) = bnjax.diagnose(net, variables, [X] * 3).findings
    assert (finding.kind, finding.layer) == ("never updated", "bn[noisy]")
    assert finding.cause == "The training had no examples of these banks, but of others."
    assert finding.repair == "variables = bnjax.recalibrate(model, variables, batches)"


def test_a_diagnosis_adds_the_scales_of_banks_to_shared_ones():
    net = Net(settings=(("banks", NAMES), ("affine", "both")))
    batches = [{"x": X, "bank": BANK}] * 4
    variables = bnjax.recalibrate(net, net.init(jax.random.key(1), X), batches)
    scales = {"scale": jnp.array([1.0, 2, 3]), "bank_scale": jnp.zeros((2, 3)).at[1, 0].set(-1)}
    params = {**variables["params"], "bn": {**variables["params"]["bn"], **scales}}
    (finding,) = bnjax.diagnose(net, {**variables, "params": params}, batches).findings
    assert (finding.kind, finding.layers) == ("dead channels", ("bn[noisy]",))


def test_a_diagnosis_finds_renormalization_at_its_limits():
    net = Net(settings=(("using", policies.Renorm(1.05, 0.05)),))
    keys = jax.random.split(jax.random.key(2), 16)
    batches = [jax.random.normal(key, (4, 2, 2, 3)) + 2 for key in keys]
    variables = bnjax.recalibrate(net, net.init(jax.random.key(1), X), batches)
    kinds = [finding.kind for finding in bnjax.diagnose(net, variables, batches).findings]
    assert "renorm at its limits" in kinds
    wide = Net(settings=(("using", policies.Renorm()),))
    kinds = [finding.kind for finding in bnjax.diagnose(wide, variables, batches).findings]
    assert "renorm at its limits" not in kinds
    warmup = Net(settings=(("using", policies.Renorm(1, 0)),))  # that is batch norm
    kinds = [finding.kind for finding in bnjax.diagnose(warmup, variables, batches).findings]
    assert "renorm at its limits" not in kinds


def test_a_diagnosis_finds_a_policy_that_makes_evaluation_depend_on_the_batch():
    net = Net(nn.BatchNorm, (("use_running_average", True),))
    variables = bnjax.recalibrate(net, trained(net), [X])
    assert bnjax.diagnose(net, variables, [X] * 3).healthy
    with bnjax.override("**", using=policies.Blend(prior=4)):
        (finding,) = bnjax.diagnose(net, variables, [X] * 3).findings
    assert (finding.kind, finding.severity) == ("eval depends on the batch", "warning")
    assert "using=Blend(prior=4) in 1 layer" in finding.evidence


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (
            (("using", policies.Batch()),),
            "the batch norm normalizes by its input in evaluation, with using=Batch()",
        ),
        (
            (("using", policies.Example(0.1)),),
            "the batch norm normalizes by its input in evaluation, with using=Example(weight=0.1)",
        ),
        (
            (("banks", 2),),
            "the batch norm has banks: fold the same model without banks, with the variables that "
            "bnjax.select_bank(variables, bank) returns",
        ),
    ],
)
def test_a_batch_norm_that_no_conv_can_absorb_is_reported(settings, reason):
    net = Net(settings=settings)
    variables = net.init(jax.random.key(1), X)
    with pytest.raises(ValueError, match=re.escape(f"conv, bn: {reason}.")), bnjax.bank(0):
        bnjax.fold(net, variables, X)


@pytest.mark.parametrize(
    "settings", [(("using", policies.Renorm.paper()),), (("momentum", "pooled"),)]
)
def test_a_layer_that_evaluates_as_a_batch_norm_is_folded(settings):
    net = Net(settings=settings)
    variables = trained(net)
    folded = bnjax.fold(net, variables, X)
    np.testing.assert_allclose(
        folded.apply(folded.variables, X), evaluated(net, variables), rtol=1e-4, atol=1e-4
    )


def test_a_conditional_norm_is_not_folded_but_reported():
    class Generator(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(3, (1, 1), name="conv")(x)
            return bnjax.ConditionalBatchNorm2d(3, 4, name="cbn")(x, jnp.arange(16) % 4)

    variables = Generator().init(jax.random.key(0), X)
    message = "conv, cbn/norm: the batch norm is called with a scale or a bias for each example."
    with pytest.raises(ValueError, match=re.escape(message)):
        bnjax.fold(Generator(), variables, X)


BANKS = {"batch_stats": {"bn": {"mean": jnp.zeros((2, 3)), "var": jnp.ones((2, 3))}}}
STACK = jnp.zeros((5, 2, 3))
PLAIN = {"batch_stats": {"bn": {"mean": jnp.zeros(3), "var": jnp.ones(3)}}}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: bnjax.to_banks(BANKS, 2),
            "The batch norm at 'bn' has statistics with 2 axes: it has banks already, or several "
            "feature axes, or is stacked by nn.scan or vmap. Leave it out by `paths`.",
        ),
        (
            lambda: bnjax.select_bank({"batch_stats": {"bn": {"mean": STACK, "var": STACK}}}, 0),
            "Which axis are the banks of the batch norm at 'bn', which has statistics of shape "
            "(5, 2, 3)? Pass their number, as in banks=2.",
        ),
        (
            lambda: bnjax.to_banks(PLAIN, ("a", "a")),
            "`banks` must be the number of sets of statistics or their names, all different, as in "
            "banks=('clean', 'adversarial'), got ('a', 'a').",
        ),
        (
            lambda: bnjax.select_bank(BANKS, "nobody's"),
            'Which bank is "nobody\'s"? Here no layer names it. Pass all names in their '
            "order, as in banks=(\"nobody's\", 'other'), or the number of the bank.",
        ),
        (
            lambda: bnjax.select_bank(BANKS, "c", banks=("a", "b")),
            "There is no bank 'c'; the banks are ['a', 'b'].",
        ),
        (
            lambda: bnjax.select_bank(BANKS, 2),
            "`bank` must lie between 0 and 1, the banks of the batch norm at 'bn', got 2.",
        ),
        (
            lambda: bnjax.select_bank(PLAIN, 0),
            "`variables` must have batch norms with banks, statistics of shape (K, C), but have "
            "none. bnjax.to_banks makes them.",
        ),
        (
            lambda: bnjax.to_banks(PLAIN, 2, paths="encoder/**"),
            "The pattern 'encoder/**' matches no batch norm: there are ['bn'].",
        ),
    ],
)
def test_each_mistake_raises_its_message(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


@pytest.mark.parametrize("own", [True, False], ids=["bnjax", "flax"])
def test_an_override_of_an_nnx_model_is_active_in_its_block(own):
    class Two(nnx.Module):
        def __init__(self):
            kind = bnjax.nnx.BatchNorm if own else nnx.BatchNorm
            self.a, self.b = kind(3, rngs=nnx.Rngs(0)), kind(3, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return self.a(x), self.b(x)

    model = Two()
    model.eval()
    graph = nnx.graphdef(model)
    plain = model(X)
    override = bnjax.nnx.override(model, "b", using=policies.Batch())
    for _ in range(2):
        with override:
            found = nnx.jit(lambda model, x: model(x))(model, X)
        np.testing.assert_array_equal(found[0], plain[0])
        np.testing.assert_allclose(found[1].mean((0, 1, 2)), np.zeros(3), atol=1e-6)
    np.testing.assert_array_equal(model(X)[1], plain[1])
    assert nnx.graphdef(model) == graph
    with pytest.raises(ValueError, match="The pattern 'c' matches no batch norm"):
        bnjax.nnx.override(model, "c", using=policies.Batch())
