"""Small Flax models with batch norm from other packages, with random parameters."""

import functools
import importlib.util
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

EXTRA = "pip install 'bnjax[zoo]'"


class Case(NamedTuple):
    """A model, its arguments in training and in evaluation, and what to expect of it."""

    package: str
    make: Callable[[], nn.Module]
    train: dict[str, Any]
    evaluate: dict[str, Any]
    install: str = EXTRA
    shape: tuple[int, ...] = (8, 16, 16, 3)
    copy: Callable[[], type] | None = None  # its own batch norm class, if it is not Flax's
    evaluates: int = 0  # the number of layers that stay in evaluation mode
    findings: tuple[str, ...] = ()  # of a diagnosis with correct statistics
    unfolded: Mapping[str, str] = {}  # the batch norms that fold keeps, and why
    refuses: str = ""  # why micro-batches are refused


def resnet() -> nn.Module:
    models = importlib.import_module("transformers.models.resnet.modeling_flax_resnet")
    sizes = {"embedding_size": 4, "hidden_sizes": [8, 12], "depths": [1, 1], "num_labels": 3}
    config = models.ResNetConfig(layer_type="basic", **sizes)
    return models.FlaxResNetForImageClassificationModule(config)


def regnet() -> nn.Module:
    models = importlib.import_module("transformers.models.regnet.modeling_flax_regnet")
    sizes = {"embedding_size": 4, "hidden_sizes": [8, 12], "depths": [1, 1], "num_labels": 3}
    config = models.RegNetConfig(groups_width=4, **sizes)
    return models.FlaxRegNetForImageClassificationModule(config)


def jax_resnet(kind: str) -> nn.Module:
    resnet = importlib.import_module("jax_resnet.resnet")
    stem, block = {
        "plain": (resnet.ResNetStem, resnet.ResNetBlock),
        "split": (
            functools.partial(resnet.ResNetDStem, stem_width=4),
            resnet.ResNeStBottleneckBlock,
        ),
    }[kind]
    norm = functools.partial(nn.BatchNorm, momentum=0.9)
    sizes = {"stage_sizes": [1], "hidden_sizes": (8,), "n_classes": 3}
    return resnet.ResNet(block, stem_cls=stem, norm_cls=norm, **sizes)


def flaim(name: str, model: str, *args: Any) -> nn.Module:
    # The package's annotations use a type that JAX has removed.
    with mock.patch.object(jax.random, "KeyArray", jax.Array, create=True):
        models = importlib.import_module(f"flaim.models.{name}")
    return getattr(models, model)(*args, n_classes=3)


def flaxmodels() -> nn.Module:
    resnet = importlib.import_module("flaxmodels.resnet.resnet")
    resnet.LAYERS["tiny"] = [1, 1, 0, 0]
    arguments = {"output": "logits", "pretrained": None, "normalize": False, "num_classes": 3}
    return resnet.ResNet(architecture="tiny", **arguments)


def flaxmodels_norm() -> type:
    return importlib.import_module("flaxmodels.resnet.ops").BatchNorm


@functools.cache
def sbx_layers() -> Any:
    """Only the module with sbx's layers: the whole package needs PyTorch and more."""
    package = importlib.util.find_spec("sbx")
    assert package is not None
    assert package.submodule_search_locations
    path = f"{package.submodule_search_locations[0]}/common/jax_layers.py"
    spec = importlib.util.spec_from_file_location("sbx_jax_layers", path)
    assert spec is not None
    assert spec.loader is not None
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module


class CrossQ(nn.Module):
    """A CrossQ critic, built as in sbx, with or without its residual blocks."""

    simba: bool = False
    width: int = 8

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        layers = sbx_layers()
        norm = functools.partial(
            layers.BatchRenorm, use_running_average=not train, momentum=0.99, warmup_steps=100
        )
        x = norm()(x)
        for _ in range(2):
            if self.simba:
                x = nn.Dense(self.width)(x)
                x = layers.SimbaResidualBlock(self.width, norm_layer=norm)(x)
            else:
                x = norm()(nn.relu(nn.Dense(self.width)(x)))
        return nn.Dense(1)(norm()(x) if self.simba else x)


FROM = "its input comes from"


def images(name: str, model: str, *args: Any, **facts: Any) -> Case:
    make = functools.partial(flaim, name, model, *args)
    return Case("flaim", make, {"training": True}, {"training": False}, **facts)


def critic(simba: bool, **facts: Any) -> Case:
    return Case(
        "sbx",
        functools.partial(CrossQ, simba),
        {"train": True},
        {"train": False},
        install="pip install --no-deps sbx-rl==0.28.0",
        shape=(64, 5),
        copy=lambda: sbx_layers().BatchRenorm,
        refuses="keeps ['d_max', 'r_max', 'steps']",
        **facts,
    )


HF: Any = {"train": {"deterministic": False}, "evaluate": {"deterministic": True}}
CASES: dict[str, Case] = {
    "transformers ResNet": Case("transformers", resnet, **HF),
    "transformers RegNet": Case("transformers", regnet, evaluates=6, **HF),
    "jax-resnet ResNet": Case("jax_resnet", functools.partial(jax_resnet, "plain"), {}, {}),
    "jax-resnet ResNeSt": Case(
        "jax_resnet",
        functools.partial(jax_resnet, "split"),
        {},
        {},
        findings=("batch too small",),  # its attention normalizes a single position of 8 examples
    ),
    "flaim ConvMixer": images(
        "convmixer",
        "ConvMixer",
        *(1, 8, 4, 3),
        unfolded={
            f"{name}/BatchNorm_0": f"{FROM} copy"  # of an activation
            for name in ("ConvActBN_0", "ConvMixerBlock_0/ConvActBN_0")  # and a skip around it
        },
    ),
    "flaim VAN": images(
        "van",
        "VAN",
        *((1, 1), (4, 8), (2, 2)),
        unfolded={
            "VANStage_0/VANBlock_0/BatchNorm_0": f"{FROM} 'ConvBNAct_0/BatchNorm_0'",
            "VANStage_1/VANBlock_0/BatchNorm_0": f"{FROM} 'VANStage_1/ConvBNAct_0/BatchNorm_0'",
        },
    ),
    "flaxmodels ResNet": Case(
        "flaxmodels",
        flaxmodels,
        {"train": True},
        {"train": False},
        copy=flaxmodels_norm,
        findings=("momentum looks inverted",),  # it is 0.1, as in PyTorch's ResNet
    ),
    "sbx CrossQ": critic(False),
    "sbx Simba": critic(True),
}


def leaf(outputs: Any) -> jax.Array:
    """The outputs of any model as one array."""
    first = jax.tree.leaves(outputs)[0]
    return first.reshape(first.shape[0], -1)


class Net:
    """A model of the zoo, its inputs, and its behaviour in Flax without bnjax."""

    def __init__(self, case: Case) -> None:
        if importlib.util.find_spec(case.package) is None:
            pytest.skip(f"{case.package} is not installed: {case.install}")
        self.case, self.model = case, case.make()
        self.norm: type = case.copy() if case.copy else nn.BatchNorm
        rng = np.random.default_rng(0)
        spread = rng.uniform(0.5, 2, (4, case.shape[0], *[1] * (len(case.shape) - 1)))
        xs = rng.normal(0.5, 1, (4, *case.shape)) * spread
        self.xs = [jnp.asarray(x, jnp.float32) for x in xs]
        key = jax.random.key(0)
        call = functools.partial(self.model.init, **case.evaluate)
        self.fresh: Any = jax.jit(call)(key, self.xs[0])
        self._momenta: dict[str, float] = {}

    @functools.cached_property
    def variables(self) -> Any:
        """Parameters and statistics that differ from the initial ones."""
        rng = np.random.default_rng(1)

        def draw(path: Any, value: Any) -> jax.Array:
            noise = jnp.asarray(rng.normal(size=value.shape), value.dtype)
            name = path[-1].key
            if name == "var":
                return jnp.exp(noise / 4)
            return value if name not in PERTURBED else value + noise / 4

        return jax.tree_util.tree_map_with_path(draw, self.fresh)

    @functools.cached_property
    def layers(self) -> tuple[str, ...]:
        flat = jax.tree_util.tree_leaves_with_path(self.fresh["batch_stats"])
        paths = (tuple(key.key for key in path) for path, _ in flat)
        return tuple("/".join(path[:-1]) for path in paths if path[-1] == "mean")

    @functools.cached_property
    def apply(self) -> Callable[..., Any]:
        """`apply(variables, x)` in training, without bnjax: outputs and new statistics."""
        apply = functools.partial(self.model.apply, mutable=["batch_stats"], **self.case.train)
        return jax.jit(apply)

    @functools.cached_property
    def evaluate(self) -> Callable[..., Any]:
        return jax.jit(functools.partial(self.model.apply, **self.case.evaluate))

    @functools.cached_property
    def momenta(self) -> dict[str, float]:
        """The momentum of each layer that is called."""
        self.inputs(self.fresh, self.xs[:1], "evaluate")
        return self._momenta

    @functools.cached_property
    def moving(self) -> tuple[str, ...]:
        """The layers whose statistics a training step updates."""
        before, after = self.fresh, self.apply(self.fresh, self.xs[0])[1]
        found = [np.any(stats(before, n)[0] != stats(after, n)[0]) for n in self.layers]
        return tuple(n for n, moved in zip(self.layers, found, strict=True) if moved)

    def inputs(self, variables: Any, xs: Any, mode: str) -> dict[str, Any]:
        """The inputs of each batch norm over all batches: in training, in evaluation, or forced.

        Forced, every batch norm normalizes with its batch, whatever the model asks for.
        """
        found = [self.inputs_of[mode](variables, x) for x in xs]
        return {name: np.concatenate([each[name] for each in found]) for name in self.layers}

    @functools.cached_property
    def inputs_of(self) -> dict[str, Callable[..., Any]]:
        kwargs = {"train": self.case.train, "forced": self.case.train}

        def run(variables: Any, x: Any, mode: str) -> Any:
            seen: dict[str, Any] = {}
            forced = functools.partial(self._look, seen, mode == "forced")
            with nn.intercept_methods(forced):
                options = kwargs.get(mode, self.case.evaluate)
                mutable = ["batch_stats"] if mode != "evaluate" else False
                self.model.apply(variables, x, mutable=mutable, **options)
            return seen

        modes = ("train", "evaluate", "forced")
        return {mode: jax.jit(functools.partial(run, mode=mode)) for mode in modes}

    def _look(self, seen: Any, forced: bool, call: Any, args: Any, kwargs: Any, context: Any):
        layer = context.module
        if context.method_name != "__call__" or type(layer) is not self.norm:
            return call(*args, **kwargs)
        x = args[0]
        name = "/".join(layer.path)
        assert name not in seen
        seen[name], self._momenta[name] = x.reshape(-1, x.shape[-1]), layer.momentum
        if not forced:
            return call(*args, **kwargs)
        axes, params = tuple(range(x.ndim - 1)), layer.variables.get("params", {})
        y = (x - x.mean(axes)) / jnp.sqrt(x.var(axes) + layer.epsilon)
        return y * params.get("scale", 1) + params.get("bias", 0)


PERTURBED = ("scale", "bias", "kernel", "mean")


def stats(variables: Any, name: str) -> tuple[np.ndarray, np.ndarray]:
    """The statistics of a layer, in float64."""
    tree = functools.reduce(lambda tree, key: tree[key], name.split("/"), variables["batch_stats"])
    mean, var = (np.asarray(tree[kind], np.float64) for kind in ("mean", "var"))
    return mean, var


def moments(x: Any) -> tuple[np.ndarray, np.ndarray]:
    """Mean and biased variance over all positions, in float64."""
    x = np.asarray(x, np.float64)
    return x.mean(0), x.var(0)


def distance(found: Any, wanted: Any) -> float:
    """The largest difference of statistics, in standard deviations and relative to the variance."""
    (mean, var), (m, v) = found, wanted
    return float(max(np.max(np.abs(mean - m) / np.sqrt(v + 1e-6)), np.max(np.abs(var / v - 1))))
