"""On a mesh of explicit axes, however the batch is split over it: one device's results, and types
as they were."""

import contextlib
from typing import Any

import jax
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import bnjax
from bnjax.models.accumulation import accumulating, begin, finish
from tests.support.oracle import assert_close
from tests.support.ways import Case, Data, core, differentiated, expected, make

pytestmark = pytest.mark.quick_compile

MESH = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
CASE = Case("core", (16, 4, 6), -1, bnjax.BatchNorm1d)
SPLITS = (P("data"), P(("data", "model")), P("data", None, "model"), P(None, "data"))

each_split = pytest.mark.parametrize("split", SPLITS, ids=str)
each_mask = pytest.mark.parametrize("mask", ["none", "whole", "split", "with_channels"])


def placed(data: Data, split: P, mask: str) -> tuple[Data, Data]:
    """Data, with a mask of this kind, and the same laid out."""
    like_x = NamedSharding(MESH, split)
    alike = NamedSharding(MESH, P())
    rng = np.random.default_rng(1)
    masks = {
        "none": (None, None),
        "whole": (rng.random((16, 1, 1)) < 0.7, alike),
        "split": (rng.random((16, 1, 1)) < 0.7, NamedSharding(MESH, P(*split[:1]))),
        "with_channels": (rng.random((16, 4, 6)) < 0.7, like_x),
    }
    data = data._replace(mask=masks[mask][0])
    where = Data(alike, alike, like_x, masks[mask][1], like_x)
    return data, Data(*map(jax.device_put, data, where))


def assert_types_stay(found: Any, given: Data) -> None:
    for new, old in (
        (found.y, given.x),
        (found.dx, given.x),
        (found.batch_stats["mean"], given.batch_stats["mean"]),
        (found.batch_stats["var"], given.batch_stats["var"]),
        (found.dparams["scale"], given.params["scale"]),
    ):
        assert jax.typeof(new) == jax.typeof(old)


@each_split
@each_mask
@pytest.mark.parametrize("compile", [jax.jit, lambda step: step], ids=["jit", "eager"])
def test_any_split_gives_what_one_device_gives(split, mask, compile):
    with jax.set_mesh(MESH):
        data, given = placed(make(CASE, None), split, mask)
        found = compile(differentiated(core(None)))(*given)
    assert_types_stay(found, given)
    assert_close(found, expected(data, CASE), rtol=1e-5)


@each_split
@each_mask
@pytest.mark.parametrize("size", [2, 3, 8])  # smaller than a shard, ragged, larger
def test_virtual_batches_need_not_follow_the_shards(split, mask, size):
    with jax.set_mesh(MESH):
        data, given = placed(make(CASE, None), split, mask)
        step = jax.jit(differentiated(core(None, virtual_batch_size=size)))
        found = step(*given)
    assert_types_stay(found, given)
    assert_close(found, step(*data), rtol=1e-5)


@pytest.mark.parametrize("context", [contextlib.nullcontext, lambda: jax.set_mesh(MESH)])
def test_under_jit_the_types_say_enough(context):
    data, given = placed(make(CASE, None), SPLITS[0], "split")
    with context():
        step = jax.jit(differentiated(core(None, virtual_batch_size=3)))
        found = step(*given)
    assert_close(found, step(*data), rtol=1e-5)


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("split", [P("data"), P("data", None, "model")], ids=str)
def test_one_axis_may_be_mapped_and_another_explicit(split, check_vma):
    def mapped(params, batch_stats, x):
        return core("data")(params, batch_stats, x, None)

    axes = {"in_specs": (P(), P(), P("data")), "out_specs": (P("data"), P())}
    step = jax.shard_map(mapped, axis_names={"data"}, check_vma=check_vma, **axes)
    with jax.set_mesh(MESH):
        data, given = placed(make(CASE, None), split, "none")
        y, batch_stats = jax.jit(step)(given.params, given.batch_stats, given.x)
        assert jax.typeof(y) == jax.typeof(given.x)
    wanted = expected(data, CASE)
    assert_close((y, batch_stats), (wanted.y, wanted.batch_stats), rtol=1e-5)


class Net(nn.Module):
    """A virtual batch size that the shards do not follow, and the drop-in."""

    @nn.compact
    def __call__(self, x, train=False):
        x = bnjax.BatchNorm1d(virtual_batch_size=3)(x)
        return bnjax.linen.BatchNorm(use_running_average=not train)(nn.relu(x))


def test_a_model_is_trained_in_a_loop_recalibrated_and_diagnosed_on_it():
    model, data = Net(), make(CASE, None)

    def train(variables, x):
        def step(variables, _):
            def loss(params):
                given = {"params": params, "batch_stats": variables["batch_stats"]}
                y, updates = model.apply(given, x, train=True, mutable=["batch_stats"])
                return (y**4).mean(), updates

            grads, updates = jax.grad(loss, has_aux=True)(variables["params"])
            params = jax.tree.map(lambda p, g: p - 0.1 * g, variables["params"], grads)
            return {"params": params, **updates}, None

        return jax.lax.scan(step, variables, None, length=200)[0]

    variables = model.init(jax.random.key(0), data.x)
    alone = jax.jit(train)(variables, data.x)
    with jax.set_mesh(MESH):
        x = jax.device_put(data.x, NamedSharding(MESH, P("data")))
        found = jax.jit(train)(variables, x)
        mended = bnjax.recalibrate(model, found, [x])
        report = bnjax.diagnose(model, mended, [x])
    assert_close(found, alone, rtol=1e-4)
    assert_close(mended, bnjax.recalibrate(model, alone, [data.x]), rtol=1e-4)
    assert report.layers[0]["mean_distance"] < 1e-4


@each_split
def test_moments_are_accumulated_on_it(split):
    layer = bnjax.BatchNorm1d(6)
    data, given = placed(make(CASE, None), split, "none")

    @jax.jit
    def step(params, batch_stats, x):
        with accumulating() as conventions:
            variables = {"params": params, "batch_stats": begin({"bn": batch_stats})["bn"]}
            _, updates = layer.apply(variables, x, mutable=["batch_stats"])
        return finish(updates["batch_stats"], conventions)

    with jax.set_mesh(MESH):
        found = step(given.params, given.batch_stats, given.x)
        assert jax.typeof(found["mean"]) == jax.typeof(given.batch_stats["mean"])
    wanted = expected(data, CASE).batch_stats
    assert_close(found, wanted, rtol=1e-5)
