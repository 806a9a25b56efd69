"""The whole error message for each mistake with policies and momenta."""

import re

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import linen as nn
from flax import nnx

import bnjax
from bnjax.policies import Batch, Blend, Debiased, Example, Renorm, Running
from tests.support.mistakes import (
    COUNT,
    KEY,
    NC,
    PARAMS,
    RANGE,
    STATS,
    TEXT,
    VARIABLES,
    Mistake,
    core,
    init,
    train,
    untyped,
)

pytestmark = pytest.mark.quick_compile

LIMIT = (
    "`{}` must be a number, at least {}, or a function of the number of steps, got {}. "
    "Renorm(r_max=1, d_max=0) is batch norm."
)
SHARE = "`weight` must lie between 0 and 1, got {}."
EXAMPLES = "`prior` must be a number of examples and not negative, got {}."
ONE = "`Blend` takes `prior` or `weight`, got {}. Write Blend(prior=16), or Blend(weight=0.1)."
POLICY = "`using` must be a policy, such as bnjax.policies.Renorm(), or None, got {}."
UNTRACKED = (
    "using={} needs running statistics, but none are kept. Keep them (track_running_stats=True), "
    "or leave `using` out."
)
NO_COUNT = (
    "{} depends on the number of training steps, but `batch_stats` has no `count`. bnjax.init with "
    "the same `momentum` and `using` makes it; in old statistics, add "
    '{{"count": jnp.zeros((), jnp.int32)}}.'
)
POOLED = (
    "`batch_stats` must have the keys {mean, var, values, values_low, mean_low, var_low} or {mean, "
    "var, count, values, values_low, mean_low, var_low}, got ['mean', 'var']: missing ['mean_low', "
    "'values', 'values_low', 'var_low']. To pool all values, start with bnjax.init(..., "
    'momentum="pooled").'
)
SCHEDULE = (
    "The {} of the batch norm at 'norm' is a schedule, but no step is known here, and the layer "
    "keeps no count. Use bnjax.training.train_step or bnjax.nnx.train_step, or pass {}"
)
MISSES_COUNT = (
    "The batch norm at the top of the model misses ['count'] in `batch_stats`: it has ['mean', "
    "'var']. " + COUNT
)
SETTLED = optax.constant_schedule(0.1)


class Net(nn.Module):
    """A model in plain Flax."""

    @nn.compact
    def __call__(self, x):
        return nn.BatchNorm(False, name="norm")(x)


def overridden(**fields):
    def call():
        net = Net()
        variables = net.init(KEY, NC)
        with bnjax.override("**", **fields):
            net.apply(variables, NC, mutable=["batch_stats"])

    return call


def overridden_nnx(**fields):
    def call():
        layer = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
        with bnjax.nnx.override(layer, **fields):
            layer(NC)

    return call


POLICIES = (
    Mistake("r_max", lambda: Renorm(0.5), LIMIT.format("r_max", 1, 0.5)),
    Mistake("d_max", lambda: Renorm(3, -1), LIMIT.format("d_max", 0, -1)),
    Mistake("nan", lambda: Renorm(float("nan")), LIMIT.format("r_max", 1, "nan")),
    Mistake("text", lambda: Renorm(untyped("3")), LIMIT.format("r_max", 1, "'3'")),
    Mistake("list", lambda: Renorm(3, untyped([0, 5])), LIMIT.format("d_max", 0, "[0, 5]")),
    Mistake("None", lambda: Renorm(untyped(None)), LIMIT.format("r_max", 1, None)),
    Mistake("neither", lambda: Blend(), ONE.format("neither")),
    Mistake("both", lambda: Blend(16, 0.1), ONE.format("{'prior': 16, 'weight': 0.1}")),
    Mistake("prior", lambda: Blend(prior=-1), EXAMPLES.format(-1)),
    Mistake("text prior", lambda: Blend(prior=untyped("all")), EXAMPLES.format("'all'")),
    Mistake("weight", lambda: Blend(weight=1.5), SHARE.format(1.5)),
    Mistake("nan weight", lambda: Example(float("nan")), SHARE.format("nan")),
    Mistake("example", lambda: Example(-0.1), SHARE.format(-0.1)),
    Mistake("text weight", lambda: Example(untyped("half")), SHARE.format("'half'")),
    Mistake("None weight", lambda: Example(untyped(None)), SHARE.format(None)),
    Mistake("debiased", lambda: Debiased(2.0), RANGE.format(2.0)),
    Mistake("debiased None", lambda: Debiased(untyped(None)), RANGE.format(None)),
)

USING = (
    Mistake(
        "class in the core",
        core(using=Batch),
        POLICY.format("<class 'bnjax.core.policies.Batch'>") + " Write Batch().",
        TypeError,
    ),
    Mistake("text in the core", core(using="batch"), POLICY.format("'batch'"), TypeError),
    Mistake(
        "class in a layer",
        lambda: bnjax.BatchNorm2d(using=untyped(Renorm)),
        POLICY.format("<class 'bnjax.core.policies.Renorm'>") + " Write Renorm().",
        TypeError,
    ),
    Mistake(
        "text in an nnx layer",
        lambda: bnjax.nnx.BatchNorm2d(3, using=untyped("renorm"), rngs=nnx.Rngs(0)),
        POLICY.format("'renorm'"),
        TypeError,
    ),
    Mistake(
        "text in an override",
        lambda: bnjax.override("**", using="renorm"),
        POLICY.format("'renorm'"),
        TypeError,
    ),
    Mistake("nothing tracked", core(batch_stats={}, using=Batch()), UNTRACKED.format("Batch()")),
    Mistake(
        "nothing tracked in a layer",
        lambda: bnjax.BatchNorm2d(track_running_stats=False, using=Renorm()),
        UNTRACKED.format("Renorm()"),
    ),
    Mistake(
        "nothing tracked in an nnx layer",
        lambda: bnjax.nnx.BatchNorm1d(
            3, track_running_stats=False, using=Running(), rngs=nnx.Rngs(0)
        ),
        UNTRACKED.format("Running()"),
    ),
)

COUNTS = (
    Mistake("renorm", core(using=Renorm.paper()), NO_COUNT.format("using=Renorm.paper()")),
    Mistake(
        "debiased", core(momentum=Debiased(0.1)), NO_COUNT.format("momentum=Debiased(momentum=0.1)")
    ),
    Mistake("pooled", core(momentum="pooled"), POOLED),
    Mistake("text momentum", core(momentum="mean"), TEXT.format("'mean'")),
    Mistake(
        "text momentum of a layer",
        lambda: bnjax.BatchNorm2d(momentum=untyped("mean")),
        TEXT.format("'mean'"),
    ),
    Mistake(
        "statistics without the count of a layer",
        train(bnjax.BatchNorm1d(3, using=Renorm.crossq())),
        MISSES_COUNT + "\nIn BatchNorm1d at the top of the model.",
    ),
    Mistake(
        "policy by override",
        overridden(using=Renorm.crossq(5)),
        SCHEDULE.format(
            "policy Renorm.crossq(warmup=5)", "numbers: override(paths, using=policy.at(step))."
        ),
    ),
    Mistake(
        "momentum by override",
        overridden(momentum=SETTLED),
        SCHEDULE.format("momentum", "its value: override(paths, momentum=schedule(step))."),
    ),
    Mistake(
        "policy by override in nnx",
        overridden_nnx(using=Renorm.crossq(5)),
        SCHEDULE.format(
            "policy Renorm.crossq(warmup=5)", "numbers: override(paths, using=policy.at(step))."
        ).replace("at 'norm'", "at the top of the model"),
    ),
)

TABLES = {"policy": POLICIES, "using": USING, "count": COUNTS}
MISTAKES = [
    pytest.param(mistake, id=f"{table}: {mistake.name}")
    for table, mistakes in TABLES.items()
    for mistake in mistakes
]


@pytest.mark.parametrize("mistake", MISTAKES)
def test_each_mistake_raises_an_error_with_a_repair(mistake):
    with pytest.raises(mistake.error, match=r"(?m)\A" + re.escape(mistake.message) + "$"):
        mistake.call()


def test_a_policy_that_needs_only_one_value_accepts_one():
    one = jnp.ones((1, 3))
    for using in (Batch(), Blend(prior=1), Running(), Example(0.5)):
        y, _ = bnjax.batch_norm(PARAMS, STATS, one, mutable=False, using=using)
        assert jnp.isfinite(y).all()


def test_old_statistics_work_with_the_count_that_the_error_names():
    stats = {**VARIABLES["batch_stats"], "count": jnp.zeros((), jnp.int32)}
    _, after = bnjax.batch_norm(PARAMS, stats, NC, mutable=True, using=Renorm.paper())
    assert int(after["count"]) == 1


def test_a_new_layer_needs_no_count():
    layer = bnjax.BatchNorm1d(using=Renorm.paper(), momentum=Debiased(0.1))
    assert int(jax.eval_shape(layer.init, KEY, NC)["batch_stats"]["count"].size) == 1
    init(layer, NC)()
