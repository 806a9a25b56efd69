"""Train models to measure the numbers in the pictures."""

import functools
from typing import Any

import domains
import jax
import joint_training
import numpy as np
import shifted_data
import small_batches
from digits import load, loss_fn
from resnet import ResNet50
from why_is_eval_bad import Trainer

import bnjax


@functools.cache
def _trained() -> tuple[Trainer, Any]:
    """The digits network after some epochs, with a record of its statistics."""
    trainer = Trainer(load(seed=0), epochs=12, seed=0)
    trainer.every = 1
    return trainer, trainer()


def statistics() -> dict[str, Any]:
    """Running and batch statistics of the first and last batch norm during training."""
    record = _trained()[0].record
    layers = list(record["layers"])
    shown = {
        layer: {name: [[row[0]] for row in rows] for name, rows in record["layers"][layer].items()}
        for layer in (layers[0], layers[-1])
    }
    return {"steps": record["step"], "record": shown}


def diagnosis() -> dict[str, Any]:
    """The report on images that are standardized differently than in training."""
    trainer, variables = _trained()
    data = trainer.clean(prepare=lambda x: x / 4 + 1)
    return bnjax.diagnose(trainer.model, variables, data, loss_fn=loss_fn).drawn


def many_layers() -> dict[str, Any]:
    """The report on a ResNet-50 whose weights changed from the third stage on."""
    model, rng = ResNet50(width=16), np.random.default_rng(0)
    batches = [rng.normal(size=(16, 64, 64, 3)).astype(np.float32) for _ in range(4)]
    variables = bnjax.recalibrate(model, model.init(jax.random.key(0), batches[0]), batches)
    params = dict(variables["params"])
    other = model.init(jax.random.key(1), batches[0])["params"]
    params |= {name: other[name] for name in params if name.startswith(("layer3", "layer4"))}
    return bnjax.diagnose(model, {**variables, "params": params}, batches).drawn


def joint() -> dict[str, Any]:
    """The accuracy of model_A while model_B trains, with all, some or none of it frozen."""
    splits = load(seed=0)
    a = joint_training.pretrain(splits, 15, 0)
    return {
        what: joint_training.train_b(splits, a, what, 15, 0)[1]
        for what in ("everything", "parameters only", "nothing")
    }


def two_domains() -> dict[str, Any]:
    """The statistics of the first batch norm, with banks for two domains and without."""
    kinds = {kind: domains.KINDS[kind] for kind in ("one batch norm", "banks")}
    splits = load(seed=0)
    states = {kind: domains.train(splits, norm, 12, 0, kind) for kind, norm in kinds.items()}
    return domains.statistics(states)


MEASURED = {
    "statistics": statistics,
    "diagnosis": diagnosis,
    "diagnosis_resnet50": many_layers,
    "joint_training": joint,
    "domains": two_domains,
    "shifted_data": lambda: shifted_data.measure(load()),
    "small_batches": lambda: small_batches.measure(load()),
}
