"""Override settings by module path in other people's models, and label their parameters."""

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
from bnjax.globs import matcher
from bnjax.models import frames
from bnjax.training import init_state, train_step

pytestmark = pytest.mark.quick_compile


class Block(nn.Module):
    """A block in plain Flax, with a mode argument and a named layer."""

    flax: bool = True

    @nn.compact
    def __call__(self, x, train=True):
        norm = nn.BatchNorm(momentum=0.9, name="bn") if self.flax else bnjax.BatchNorm1d(name="bn")
        x = nn.Dense(4)(x)
        return nn.relu(norm(x, use_running_average=not train) if self.flax else norm(x))


class SetupNet(nn.Module):
    flax: bool = True
    remat: bool = False

    def setup(self):
        block = nn.remat(Block, static_argnums=(2,)) if self.remat else Block
        self.encoder = [block(self.flax) for _ in range(2)]
        self.head = block(self.flax)

    def __call__(self, x, train=True):
        for layer in self.encoder:
            x = x + layer(x, train)
        return self.head(x, train)


class ScanNet(nn.Module):
    flax: bool = True

    @nn.compact
    def __call__(self, x, train=True):
        axes: Any = {"params": 0, "batch_stats": 0}
        scan = nn.scan(
            lambda block, x, _: (block(x, train), None),
            variable_axes=axes,
            split_rngs={"params": True},
            length=3,
        )
        x, _ = scan(Block(self.flax, name="encoder"), x, None)
        return Block(self.flax, name="head")(x, train)


MODELS = [
    pytest.param(SetupNet(flax, remat), id=f"{'flax' if flax else 'bnjax'}{' remat' * remat}")
    for flax in (True, False)
    for remat in (True, False)
] + [pytest.param(ScanNet(flax), id=f"scan {flax}") for flax in (True, False)]


@pytest.fixture
def x(rng):
    return jnp.asarray(rng.normal(2, 1, (8, 4)), jnp.float32)


def moved(model, variables, x, apply=None) -> set[str]:
    """The top-level names below which any statistic changed."""
    apply = apply or (lambda v, x: model.apply(v, x, mutable=["batch_stats"]))
    stats = apply(variables, x)[1]["batch_stats"]

    def differs(name):
        pairs = zip(
            *(jax.tree.leaves(s[name]) for s in (stats, variables["batch_stats"])), strict=True
        )
        return any(not np.array_equal(a, b) for a, b in pairs)

    return {name for name in stats if differs(name)}


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("model", MODELS)
def test_frozen_layers_keep_their_statistics_and_the_others_move(model, x, jit):
    variables = model.init(jax.random.key(0), x)
    apply = lambda v, x: model.apply(v, x, mutable=["batch_stats"])  # noqa: E731
    apply = jax.jit(apply) if jit else apply
    everything = set(variables["batch_stats"])
    assert moved(model, variables, x, apply) == everything
    for _ in range(2):  # the second time, a jitted function is not traced again
        with bnjax.freeze("encoder*/**"):
            assert moved(model, variables, x, apply) == {"head"}
    assert moved(model, variables, x, apply) == everything


@pytest.mark.parametrize("model", MODELS)
def test_frozen_layers_normalize_with_their_running_statistics(model, x):
    variables = model.init(jax.random.key(0), x)
    with bnjax.freeze("**"):
        y, _ = jax.jit(lambda v: model.apply(v, x, mutable=["batch_stats"]))(variables)
    np.testing.assert_allclose(y, model.apply(variables, x, train=False), atol=1e-6)


def test_the_inner_context_wins(x):
    model = SetupNet()
    variables = model.init(jax.random.key(0), x)
    with bnjax.freeze("**"), bnjax.override("head/bn", use_running_average=False):
        assert moved(model, variables, x) == {"head"}
    with bnjax.override("head/bn", use_running_average=False), bnjax.freeze("**"):
        assert moved(model, variables, x) == set()


def test_any_field_can_be_overridden_and_is_restored(x):
    model = SetupNet()
    variables = model.init(jax.random.key(0), x)

    def mean() -> Any:
        updates: Any = model.apply(variables, x, mutable=["batch_stats"])[1]
        return updates["batch_stats"]["head"]["bn"]["mean"]

    usual = mean()
    with bnjax.override(["head/*"], momentum=0.0):
        batch = mean()
    np.testing.assert_allclose(usual, 0.1 * batch, rtol=1e-5)
    np.testing.assert_array_equal(mean(), usual)


def test_a_bound_module_is_restored_when_the_model_raises(x):
    layer = bnjax.BatchNorm1d(5)
    with pytest.raises(ValueError, match="`num_features` is 5"), bnjax.override("**", momentum=0.3):
        layer.init(jax.random.key(0), x)
    assert layer.momentum == 0.1


def test_frozen_layers_stay_frozen_in_a_step_of_micro_batches(x):
    from bnjax.training import init_state, train_step

    model = SetupNet(flax=False)
    state = init_state(model, optax.sgd(0.1), jax.random.key(0), x)
    step = train_step(lambda y, batch: jnp.mean(y**2), microbatches=2, donate=False)
    with bnjax.freeze("encoder*/**"):
        after, _ = step(state, {"x": x})
    for name in ("encoder_0", "encoder_1"):
        np.testing.assert_array_equal(
            after.batch_stats[name]["bn"]["mean"], state.batch_stats[name]["bn"]["mean"]
        )
    assert np.any(
        after.batch_stats["head"]["bn"]["mean"] != state.batch_stats["head"]["bn"]["mean"]
    )


def test_one_list_of_patterns_freezes_parameters_too(x):
    params = SetupNet().init(jax.random.key(0), x)["params"]
    labels = bnjax.trainable_labels(params, frozen=["encoder*/**"])
    assert {name: set(jax.tree.leaves(labels[name])) for name in labels} == {
        "encoder_0": {"frozen"},
        "encoder_1": {"frozen"},
        "head": {"trainable"},
    }
    tx = optax.multi_transform({"trainable": optax.sgd(1.0), "frozen": optax.set_to_zero()}, labels)
    updates: Any = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params))[0]
    assert set(np.concatenate([u.ravel() for u in jax.tree.leaves(updates["encoder_0"])])) == {0.0}
    assert set(np.concatenate([u.ravel() for u in jax.tree.leaves(updates["head"])])) == {-1.0}


def test_masks_read_the_state_of_an_nnx_model_too():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.encoder = bnjax.nnx.BatchNorm1d(3, rngs=rngs)
            self.head = nnx.Linear(3, 2, rngs=rngs)

    state = nnx.state(Model(nnx.Rngs(0)), nnx.Param)
    labels = nnx.to_pure_dict(bnjax.trainable_labels(state, frozen="encoder"))
    assert labels["encoder"] == {"scale": "frozen", "bias": "frozen"}
    assert labels["head"] == {"kernel": "trainable", "bias": "trainable"}
    decays = nnx.to_pure_dict(bnjax.decay_mask(state))
    assert decays["encoder"] == {"scale": False, "bias": False}
    assert decays["head"] == {"kernel": True, "bias": False}


@pytest.mark.parametrize(
    ("pattern", "path", "fits"),
    [
        ("encoder/**", "encoder", True),
        ("encoder/**", "encoder/a/b", True),
        ("encoder/**", "encoder2/a", False),
        ("**/bn", "bn", True),
        ("**/bn", "a/b/bn", True),
        ("**/bn", "a/bn2", False),
        ("a/*/bn", "a/x/bn", True),
        ("a/*/bn", "a/x/y/bn", False),
        ("a/**/bn", "a/bn", True),
        ("a/**/bn", "a/x/y/bn", True),
        ("bn?", "bn1", True),
        ("bn?", "bn", False),
        ("**", "", True),
        ("a.b", "axb", False),
    ],
)
def test_globs(pattern, path, fits):
    assert matcher(pattern)(path) is fits


def test_a_pattern_that_matches_nothing_lists_the_existing_paths(x, monkeypatch):
    monkeypatch.setattr(frames, "_fitted", set())  # of other tests' programs
    model = SetupNet()
    variables = model.init(jax.random.key(0), x)
    there = "there are ['encoder_0/bn', 'encoder_1/bn', 'head/bn']"
    hint = "`*` matches part of one name, `**` any number of names, as in 'encoder/**'."
    message = f"The pattern 'encoder/**' matches no batch norm: {there}. {hint}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"), bnjax.freeze("encoder/**"):
        moved(model, variables, x)
    nothing = "none was called or given (for an nnx model, use bnjax.nnx.freeze)"
    message = f"The pattern '**' matches no batch norm: {nothing}. {hint}"
    with (
        pytest.raises(ValueError, match=f"^{re.escape(message)}$"),
        bnjax.override("**", momentum=0.25),
    ):
        pass
    blocks, parts = ("encoder_0", "encoder_1", "head"), ("Dense_0", "bn")
    there = f"there are {[f'{block}/{part}' for block in blocks for part in parts]}"
    what = "no module with parameters"
    message = f"The pattern 'tail/**' matches {what}: {there}. {hint}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        bnjax.trainable_labels(variables["params"], frozen=("head/**", "tail/**"))


def test_an_unknown_field_is_an_error(x):
    with (
        pytest.raises(
            TypeError,
            match=r"^`override` takes settings of batch norm layers, got `use_running`\. "
            r"Did you mean `use_running_average`\?$",
        ),
        bnjax.override("**", use_running=True),
    ):
        pass
    message = (
        "The BatchNorm at 'encoder_0/bn' has no field ['eps']. PyTorch's convention has `eps` and "
        "`affine` where Flax's has `epsilon`, `use_scale` and `use_bias`."
    )
    wanted = rf"^{re.escape(message)}(\n|$)"  # JAX adds a note
    with pytest.raises(TypeError, match=wanted), bnjax.override("**", eps=0.1):
        SetupNet().init(jax.random.key(0), x)


@pytest.mark.parametrize(("kind", "momentum"), [(nn.BatchNorm, 0.02), (bnjax.BatchNorm1d, 0.98)])
def test_a_momentum_from_the_other_convention_also_warns_in_an_override(kind, momentum):
    model = nn.Sequential([kind(use_running_average=True)])
    x = jnp.ones((4, 3))
    variables = model.init(jax.random.key(0), x)
    with (
        pytest.warns(UserWarning, match=f"^momentum={momentum} gives the "),
        bnjax.override("**", momentum=momentum),
    ):
        model.apply(variables, x)


def test_a_path_is_a_glob():
    pattern: Any = 3
    message = r"^Paths must be a glob or several, such as 'encoder/\*\*', got 3\.$"
    with pytest.raises(TypeError, match=message), bnjax.freeze(pattern):
        pass


def test_a_debiased_momentum_is_in_the_convention_of_each_layer():
    class Both(nn.Module):
        @nn.compact
        def __call__(self, x):
            nn.BatchNorm(use_running_average=False, name="flax")(x)
            return bnjax.BatchNorm1d(3, name="torch")(x)

    x = jax.random.normal(jax.random.key(0), (8, 3)) + 5
    variables = Both().init(jax.random.key(1), x)
    for layer, momentum in (("flax", 0.9), ("torch", 0.1)):
        state = init_state(Both(), optax.sgd(0.0), jax.random.key(1), x)
        step = train_step(lambda y, batch: jnp.mean(y), donate=False)
        with bnjax.override(layer, momentum=bnjax.policies.Debiased(momentum)):
            for number in range(3):
                state, _ = step(state, {"x": x + number})
        found = state.batch_stats[layer]["mean"]
        np.testing.assert_allclose(found, x.mean(0) + 1, rtol=1e-6)
    assert variables["batch_stats"]["flax"].keys() == {"mean", "var"}


@pytest.mark.parametrize(
    ("momentum", "needed"),
    [(None, "['count']"), ("pooled", "['values', 'values_low', 'mean_low', 'var_low']")],
)
def test_a_momentum_that_needs_missing_statistics_is_refused(momentum, needed):
    model, x = nn.Sequential([nn.BatchNorm(use_running_average=False)]), jnp.ones((4, 3))
    variables = model.init(jax.random.key(0), x)
    message = (
        f"override(momentum={momentum!r}) needs {needed} in the `batch_stats` of the batch norm at "
        f"'layers_0', which has ['mean', 'var']. Construct a bnjax layer with "
        f"momentum={momentum!r} instead."
    )
    override = bnjax.override("**", momentum=momentum)
    with pytest.raises(ValueError, match=re.escape(message)), override:
        model.apply(variables, x, mutable=["batch_stats"])
