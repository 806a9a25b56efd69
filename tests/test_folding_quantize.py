"""Quantization-aware training, compared to torch.ao and to the folded model."""

import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import bnjax
from bnjax.training import eval_step, evaluate, init_state, train_step
from tests.support.folded import EVAL, STEP, close, fake, prepare, trained

torch = pytest.importorskip("torch", reason="PyTorch is pinned for Python < 3.12 only")
quantization = pytest.importorskip("torch.ao.quantization")
qat = pytest.importorskip("torch.ao.nn.intrinsic.qat")

pytestmark = pytest.mark.quick_compile


def identity(kernel: jax.Array) -> jax.Array:
    return kernel


QUANTIZERS: dict[str, tuple[Any, Any]] = {
    "identity": (identity, torch.nn.Identity),
    "fake": (
        fake,
        quantization.FakeQuantize.with_args(
            observer=torch.ao.quantization.MinMaxObserver,
            quant_min=-128,
            quant_max=127,
            dtype=torch.qint8,
            qscheme=torch.per_tensor_symmetric,
        ),
    ),
}


def torch_layer(make: Any, use_bias: bool, groups: int) -> Any:
    qconfig = quantization.QConfig(activation=torch.nn.Identity, weight=make)
    layer = qat.ConvBn2d(
        *(4, 6, 3), stride=2, padding=1, groups=groups, bias=use_bias, eps=1e-3, qconfig=qconfig
    )
    if isinstance(layer.weight_fake_quant, quantization.FakeQuantize):
        layer.weight_fake_quant.disable_observer()
        layer.weight_fake_quant.scale.fill_(STEP)
        layer.weight_fake_quant.zero_point.fill_(0)
    with torch.no_grad():
        layer.bn.weight.copy_(torch.linspace(-1.5, 2, 6))
        layer.bn.running_var.copy_(torch.linspace(0.2, 3, 6))
        layer.bn.running_mean.copy_(torch.linspace(-1, 1, 6))
    return layer


class ConvBatchNorm(nn.Module):
    use_bias: bool
    groups: int

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(
            *(6, (3, 3), 2, 1),
            use_bias=self.use_bias,
            feature_group_count=self.groups,
            name="conv",
        )(x)
        return bnjax.BatchNorm2d(eps=1e-3, name="bn")(x)


def from_torch(layer: Any) -> Any:
    def array(tensor: Any) -> jax.Array:
        return jnp.asarray(tensor.detach().numpy())

    conv = {"kernel": jnp.transpose(array(layer.weight), (2, 3, 1, 0))}
    conv |= {} if layer.bias is None else {"bias": array(layer.bias)}
    norm = {"scale": array(layer.bn.weight), "bias": array(layer.bn.bias)}
    stats = {"mean": array(layer.bn.running_mean), "var": array(layer.bn.running_var)}
    return {"params": {"conv": conv, "bn": norm}, "batch_stats": {"bn": stats}}


def gradients_of(layer: Any) -> Any:
    tensors = {"kernel": layer.weight.grad.permute(2, 3, 1, 0)}
    tensors |= {} if layer.bias is None else {"conv bias": layer.bias.grad}
    tensors |= {"scale": layer.bn.weight.grad, "bias": layer.bn.bias.grad}
    return {name: tensor.numpy().copy() for name, tensor in tensors.items()}


@pytest.mark.parametrize("name", QUANTIZERS)
@pytest.mark.parametrize(("use_bias", "groups"), [(False, 1), (True, 2)])
def test_training_matches_torch_and_the_frozen_model_matches_fold(name, use_bias, groups):
    torch.manual_seed(0)
    quantize, make = QUANTIZERS[name]
    layer, model = torch_layer(make, use_bias, groups), ConvBatchNorm(use_bias, groups)
    variables, rng = from_torch(layer), np.random.default_rng(0)
    batches = [rng.normal(1, 2, (5, 8, 7, 4)).astype(np.float32) for _ in range(4)]
    targets = [rng.normal(size=(5, 4, 4, 6)).astype(np.float32) for _ in range(4)]
    folded = bnjax.fold(model, variables, batches[0], quantize=quantize)

    @jax.jit
    def step(variables, x, target):
        def loss(params):
            held = folded.fake_quantize({**variables, "params": params})
            y, moved = model.apply(held, x, mutable=["batch_stats"])
            return jnp.mean((y - target) ** 2), (y, moved)

        found = jax.value_and_grad(loss, has_aux=True)(variables["params"])
        (_, (y, moved)), grads = found
        params = jax.tree.map(lambda p, g: p - 0.1 * g, variables["params"], grads)
        return y, grads, {"params": params, **moved}

    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    for x, target in zip(batches, targets, strict=True):
        y, grads, variables = step(variables, x, target)
        optimizer.zero_grad()
        expected = layer(torch.tensor(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        torch.mean((expected - torch.tensor(target)) ** 2).backward()
        close(y, expected.detach())
        actual = {
            "kernel": grads["conv"]["kernel"],
            **({"conv bias": grads["conv"]["bias"]} if use_bias else {}),
            **grads["bn"],
        }
        for key, gradient in gradients_of(layer).items():
            if key != "conv bias":  # zero up to rounding
                close(actual[key], gradient, 1e-4)
        optimizer.step()
        after = from_torch(layer)
        jax.tree.map(partial(close, rtol=1e-4), variables, after)

    layer.freeze_bn_stats()
    layer.eval()
    x = batches[1]
    expected = layer(torch.tensor(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).detach().numpy()
    variables = from_torch(layer)  # a rounding that went the other way would be a whole step
    again = bnjax.fold(model, variables, x, quantize=quantize)
    close(again.apply(again.variables, x), expected)
    close(model.apply(again.fake_quantize(variables), x), expected)
    close(folded.apply(folded.refold(variables), x), expected)
    if name == "fake":
        plain = bnjax.fold(model, variables, x)
        assert np.abs(plain.apply(plain.variables, x) - expected).max() > 1e-2


def test_an_identity_quantizer_leaves_the_kernels_unchanged():
    model, variables, x = prepare(nn.Sequential([nn.Dense(4), EVAL()]), (5, 3))
    folded = bnjax.fold(model, variables, x, quantize=identity)
    kernel = folded.fake_quantize(variables)["params"]["layers_0"]["kernel"]
    np.testing.assert_array_equal(kernel, variables["params"]["layers_0"]["kernel"])


@pytest.mark.parametrize("scale", [0.0, -0.0, 1e-35], ids=str)
def test_a_scale_of_zero_gives_neither_nan_nor_a_lost_gradient(scale):
    model, variables, x = prepare(nn.Sequential([nn.Dense(4), EVAL()]), (64, 3))
    norm = variables["params"]["layers_1"]
    norm["scale"] = norm["scale"].at[1].set(scale)
    folded = bnjax.fold(model, variables, x, quantize=fake)
    train = nn.Sequential([nn.Dense(4), nn.BatchNorm(use_running_average=False)])

    def loss(params, quantized):
        held = {**variables, "params": params}
        held = folded.fake_quantize(held) if quantized else held
        y, _ = train.apply(held, x, mutable=["batch_stats"])
        return jnp.sum(y * x[:, :1] ** 2)

    actual, expected = (jax.grad(loss)(variables["params"], each) for each in (True, False))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(actual))
    close(actual["layers_1"]["scale"][1], expected["layers_1"]["scale"][1], 1e-4)
    assert np.abs(actual["layers_1"]["scale"][1]) > 1e-2
    y = model.apply(folded.fake_quantize(variables), x)
    close(folded.apply(folded.variables, x), y)


class Branched(nn.Module):
    """A batch norm before a conv, branches, and a head after a batch norm."""

    train: bool = False

    @nn.compact
    def __call__(self, x):
        norm = partial(nn.BatchNorm, use_running_average=not self.train)
        x = nn.relu(norm()(nn.Conv(4, (3, 3), use_bias=False)(norm()(x))))
        y = norm()(nn.Conv(4, (3, 3))(x)) + norm()(nn.Conv(4, (1, 1))(x)) + norm()(x)
        x = norm()(nn.relu(y)).mean((1, 2))
        return nn.DenseGeneral((3, 2))(x)


def test_evaluation_matches_the_folded_model_for_everything_that_folds():
    model, variables, x = prepare(Branched(), (2, 6, 6, 3))
    folded = bnjax.fold(model, variables, x, quantize=fake)
    expected = folded.apply(folded.variables, x)
    close(model.apply(folded.fake_quantize(variables), x), expected)
    plain = bnjax.fold(model, variables, x)
    assert np.abs(plain.apply(plain.variables, x) - expected).max() > 1e-2
    assert folded.max_difference == plain.max_difference
    identical = bnjax.fold(model, variables, x, quantize=identity)
    jax.tree.map(partial(close, rtol=1e-6), identical.variables, plain.variables)


class Summed(nn.Module):
    """Branches without batch norms, next to a layer with one."""

    @nn.compact
    def __call__(self, x):
        y = nn.Conv(3, (3, 3), name="a")(x) + nn.Conv(3, (1, 1), name="b")(x)
        return EVAL(name="bn")(nn.Dense(2, name="head")(nn.relu(y)))


def test_merged_branches_are_quantized_as_one_kernel():
    model, variables, x = prepare(Summed(), (2, 6, 6, 3))
    folded = bnjax.fold(model, variables, x, quantize=fake)
    params = variables["params"]
    kernel = params["a"]["kernel"].at[1, 1].add(params["b"]["kernel"][0, 0])
    new = folded.fake_quantize(variables)["params"]
    close(new["a"]["kernel"] + kernel - params["a"]["kernel"], fake(kernel))
    np.testing.assert_array_equal(new["b"]["kernel"], params["b"]["kernel"])
    expected = folded.apply(folded.variables, x)
    close(model.apply(folded.fake_quantize(variables), x), expected)


def test_refold_works_under_jit_and_has_gradients():
    model, variables, x = prepare(Branched(), (2, 6, 6, 3))
    folded, other = bnjax.fold(model, variables, x), trained(variables, seed=3)
    again = bnjax.fold(model, other, x).variables
    assert jax.tree.structure(again) == jax.tree.structure(jax.jit(folded.refold)(other))
    jax.tree.map(partial(close, rtol=1e-5), jax.jit(folded.refold)(other), again)

    def through(variables):
        return jnp.sum(folded.apply(folded.refold(variables), x) ** 2)

    def direct(variables):
        return jnp.sum(model.apply(variables, x) ** 2)

    actual, expected = jax.grad(through)(variables), jax.grad(direct)(variables)
    jax.tree.map(partial(close, rtol=1e-3), actual["params"], expected["params"])


def test_a_training_step_works_with_a_quantizer():
    model, variables, x = prepare(Branched(), (8, 6, 6, 3))
    folded = bnjax.fold(model, variables, x, quantize=fake)
    state = init_state(Branched(train=True), optax.adam(1e-2), jax.random.key(0), x)

    def through(model: nn.Module) -> Any:
        return lambda v, *args, **options: model.apply(folded.fake_quantize(v), *args, **options)

    def loss(outputs: jax.Array, _: Any) -> jax.Array:
        return jnp.mean((outputs - 1) ** 2, (1, 2))

    quantized = state.replace(apply_fn=through(Branched(train=True)))
    step, losses = train_step(loss, donate=False), []
    for _ in range(20):
        quantized, metrics = step(quantized, {"x": x})
        losses.append(metrics["loss"])
    assert losses[-1] < losses[0] / 2
    variables = {**quantized.variables}
    evaluating = quantized.replace(apply_fn=through(model))
    found = evaluate(eval_step(loss), evaluating, [{"x": x}])["loss"]
    final = bnjax.fold(model, variables, x, quantize=fake)
    close(loss(final.apply(final.variables, x), {}).mean(), found)


# Mistakes


def test_half_precision_kernels_keep_their_dtype():
    dense = nn.Dense(4, param_dtype=jnp.bfloat16)
    model, variables, x = prepare(nn.Sequential([dense, EVAL()]), (5, 3))
    folded = bnjax.fold(model, variables, x, quantize=fake)
    new = folded.fake_quantize(variables)
    assert new["params"]["layers_0"]["kernel"].dtype == jnp.bfloat16
    close(model.apply(new, x), folded.apply(folded.variables, x), 2e-2)


def test_partitioned_kernels_stay_partitioned():
    boxed = nn.with_partitioning(nn.initializers.lecun_normal(), ("in", "out"))
    model = nn.Sequential([nn.Dense(4, kernel_init=boxed), EVAL()])
    model, variables, x = prepare(model, (5, 3))
    folded = bnjax.fold(model, variables, x, quantize=fake)
    assert isinstance(
        folded.fake_quantize(variables)["params"]["layers_0"]["kernel"], nn.Partitioned
    )
    folded.apply(folded.variables, x)


MODEL, VARIABLES, X = prepare(nn.Sequential([nn.Dense(4), EVAL()]), (5, 3))
MISTAKES: dict[str, tuple[Any, type[Exception], str]] = {
    "no quantizer": (
        lambda: bnjax.fold(MODEL, VARIABLES, X).fake_quantize(VARIABLES),
        ValueError,
        "The model must be folded with `quantize` to train for it, got None. Write fold(model, "
        "variables, example_x, quantize=...).",
    ),
    "no function": (
        lambda: bnjax.fold(MODEL, VARIABLES, X, quantize=8),  # pyright: ignore[reportArgumentType]
        TypeError,
        "`quantize` must be a function of a kernel, got int.",
    ),
    "another shape": (
        lambda: bnjax.fold(MODEL, VARIABLES, X, quantize=jnp.ravel),
        ValueError,
        "`quantize` must preserve the shape of the kernel, (3, 4) at 'layers_0', got (12,).",
    ),
    "folded variables": (
        lambda: (f := bnjax.fold(MODEL, VARIABLES, X, quantize=fake)).fake_quantize(f.variables),
        ValueError,
        "`variables` must be those of the unfolded model, but these are missing: "
        "['batch_stats/layers_1/var'].",
    ),
    "parameters alone": (
        lambda: bnjax.fold(MODEL, VARIABLES, X).refold(VARIABLES["params"]),
        ValueError,
        "`variables` must be those of the unfolded model, but these are missing: "
        "['batch_stats/layers_1/var', 'params/layers_0/kernel'].",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_each_mistake_raises_an_error_with_a_repair(name):
    call, error, message = MISTAKES[name]
    with pytest.raises(error, match=rf"\A{re.escape(message)}\Z"):
        call()
