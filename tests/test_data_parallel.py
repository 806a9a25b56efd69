"""Training and evaluation over the devices of a mesh, padded batches, and merged statistics."""

import contextlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import bnjax
from bnjax.training import eval_step, evaluate, pad_batch, train_step
from tests.support.oracle import assert_close
from tests.support.regression import TRAINED, Net, images, squared_error, start, trained

pytestmark = pytest.mark.quick_compile


def a_mesh(axis_type: AxisType, **axes: int) -> Any:
    axes = axes or {"data": 8}
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(axis_type,) * len(axes))


@pytest.mark.parametrize(
    ("mesh", "microbatches"),
    [
        (a_mesh(AxisType.Auto), 1),
        (a_mesh(AxisType.Explicit), 1),
        (a_mesh(AxisType.Auto, rows=4, columns=2), 4),
    ],
    ids=["auto", "explicit", "two_axes_and_microbatches"],
)
def test_data_parallel_training_equals_that_on_one_device(mesh, microbatches):
    state, batches = start(Net(TRAINED), images(0)["x"]), [images(0), images(1), images(2)]
    spread = trained(state, batches, mesh=mesh, microbatches=microbatches)
    alone = trained(state, batches, microbatches=microbatches)
    found, wanted = ((s.params, s.batch_stats, s.step) for s in (spread, alone))
    assert_close(found, wanted, rtol=1e-5)


@pytest.mark.parametrize(
    "context", [contextlib.nullcontext, jax.set_mesh], ids=["as_it_is", "set_mesh"]
)
def test_a_state_that_lives_on_an_explicit_mesh_trains_on_it(context):
    mesh, state = a_mesh(AxisType.Explicit), start(Net(TRAINED), images(0)["x"])
    on_mesh = jax.device_put(state, NamedSharding(mesh, P()))
    with context(mesh):
        spread = trained(on_mesh, [images(0)], mesh=mesh)
    assert_close(spread.batch_stats, trained(state, [images(0)]).batch_stats, rtol=1e-5)


def test_data_parallel_training_gives_its_state_to_all_devices_and_takes_the_old_one_away():
    mesh, batch = a_mesh(AxisType.Auto), images(0)
    step = train_step(squared_error, mesh=mesh)
    first, _ = step(start(Net(TRAINED), batch["x"]), batch)
    second, _ = step(first, batch)
    for leaf in jax.tree.leaves(second):
        assert leaf.sharding.device_set == set(mesh.devices.flat)
        assert leaf.is_fully_replicated
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(first.params))


def first_of(batch: dict[str, Any], size: int) -> dict[str, Any]:
    return jax.tree.map(lambda leaf: leaf[:size], batch)


def test_data_parallel_evaluation_counts_each_example_of_a_ragged_batch_once():
    def metrics(outputs, batch):
        error = squared_error(outputs, batch)
        return error, {"distance": jnp.sqrt(error)}

    state = start(Net(TRAINED), images(0)["x"])
    hidden = first_of(images(2), 11) | {"mask": np.arange(11) % 3 > 0}
    batches = [images(0), first_of(images(1), 13), hidden, first_of(images(3), 1)]
    found = evaluate(eval_step(metrics, mesh=a_mesh(AxisType.Explicit)), state, batches)
    assert_close(found, evaluate(eval_step(metrics), state, batches), rtol=1e-5)


def test_data_parallel_evaluation_of_a_mean_counts_each_example_once():
    def mean(outputs, batch):
        return jnp.mean(squared_error(outputs, batch))

    state, batch = start(Net(TRAINED), images(0)["x"]), first_of(images(0), 5)
    found = evaluate(eval_step(mean, mesh=a_mesh(AxisType.Auto)), state, [batch])
    assert_close(found, evaluate(eval_step(mean), state, [batch]), rtol=1e-5)


@pytest.mark.parametrize(("size", "padded"), [(1, 4), (4, 4), (5, 8), (8, 8)])
def test_a_padded_batch_repeats_its_last_example_out_of_sight(size, padded):
    batch = {"x": {"image": np.arange(size) + 1.0, "label": np.arange(size)}}
    found = pad_batch(batch, 4)
    index = np.minimum(np.arange(padded), size - 1)
    wanted = {"image": index + 1.0, "label": index}
    assert_close(found, {"x": wanted, "mask": np.arange(padded) < size})
    assert found["mask"].dtype == bool
    assert set(batch) == {"x"}


def test_a_padded_batch_keeps_its_mask():
    batch = {"x": np.arange(3.0), "mask": np.array([True, False, True])}
    assert pad_batch(batch, 2)["mask"].tolist() == [True, False, True, False]
    assert batch["mask"].tolist() == [True, False, True]


def test_statistics_of_devices_that_never_talked_merge_to_those_of_all_values():
    rng = np.random.default_rng(0)
    x = rng.normal(rng.normal(size=(8, 1, 3)) * 5, 2, (8, 50, 3)).astype(np.float32)

    def alone(x):
        _, stats = bnjax.batch_norm(
            {}, bnjax.init(3)[1], x, mutable=True, momentum=1.0, correction=0
        )
        return stats

    merged = bnjax.merge_batch_stats({"block": {"bn": jax.pmap(alone)(x)}})
    values = x.reshape(-1, 3).astype(np.float64)
    wanted = {"mean": values.mean(0), "var": values.var(0)}
    assert_close(merged, {"block": {"bn": wanted}}, rtol=1e-5)


def test_merging_takes_any_axis_and_keeps_the_count():
    rng = np.random.default_rng(0)
    mean, var = rng.normal(size=(3, 4)), rng.uniform(1, 2, (3, 4))
    stats = {"mean": mean, "var": var, "count": np.full((1, 4), 7)}
    merged = bnjax.merge_batch_stats({"bn": stats}, axis=1)["bn"]
    wanted = {"mean": mean.mean(1), "var": var.mean(1) + mean.var(1), "count": np.array([7])}
    assert_close(merged, wanted, rtol=1e-6)


def sets(*sizes: int) -> tuple[Any, np.ndarray]:
    """The exact statistics of so many examples of each client, stacked, and all the examples."""
    rng = np.random.default_rng(0)
    xs = [rng.normal(10 * i, 1 + i, (size, 2)) for i, size in enumerate(sizes)]
    stats = {
        "mean": np.stack([x.mean(0) for x in xs]),
        "var": np.stack([x.var(0) for x in xs]),
    }
    return {"block": {"bn": stats}}, np.concatenate(xs)


@pytest.mark.parametrize("sizes", [(400, 20), (400, 100, 20), (5, 5), (7,)])
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_statistics_of_clients_merge_by_their_numbers_of_examples(sizes, axis):
    stats, x = sets(*sizes)
    moved = jax.tree.map(lambda array: np.moveaxis(array, 0, axis), stats)
    wanted = {"block": {"bn": {"mean": x.mean(0), "var": x.var(0)}}}
    assert_close(bnjax.merge_batch_stats(moved, axis, weights=sizes), wanted, rtol=1e-5)
    merge = jax.jit(lambda stats, weights: bnjax.merge_batch_stats(stats, axis, weights=weights))
    shares = np.array(sizes) / sum(sizes)
    assert_close(merge(moved, shares), wanted, rtol=1e-5)


def test_a_client_of_weight_0_has_no_effect():
    stats, x = sets(30, 20)
    lost = jax.tree.map(lambda array: np.concatenate([array, np.full((1, 2), np.nan)]), stats)
    merged = bnjax.merge_batch_stats(lost, weights=[30, 20, 0])
    assert_close(merged, {"block": {"bn": {"mean": x.mean(0), "var": x.var(0)}}}, rtol=1e-5)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (
            [1, 2, 3],
            "`weights` must have shape (2,), one for each stacked set, got shape (3,). Pass one "
            "number per set, such as its number of examples.",
        ),
        *(
            (
                given,
                f"`weights` must be finite, not negative and not all 0, got {given}. Pass one "
                "number per set, such as its number of examples.",
            )
            for given in ([1.0, -1.0], [0.0, 0.0], [1.0, np.inf], [1.0, np.nan])
        ),
    ],
)
def test_invalid_weights_are_an_error(weights, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        bnjax.merge_batch_stats(sets(3, 4)[0], weights=weights)


@pytest.mark.parametrize(
    ("tree", "axis", "message"),
    [
        (
            {"params": {"w": np.ones(3)}},
            0,
            "`batch_stats` must hold the `mean` and `var` of batch norms, but has none. Pass the "
            "stacked `variables['batch_stats']`.",
        ),
        (
            {"bn": {"mean": np.ones((2, 3)), "var": np.ones((2, 3))}},
            2,
            "`batch_stats` must be stacked along axis 2, but the mean at 'bn' has shape (2, 3). A "
            "single set needs no merging.",
        ),
        (
            {"bn": {"mean": np.ones((2, 3)), "var": np.ones(3)}},
            0,
            "`batch_stats` must have means and variances of the same shape, but at 'bn' they have "
            "(2, 3) and (3,). Stack both in the same way.",
        ),
    ],
)
def test_statistics_that_are_not_stacked_are_an_error(tree, axis, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        bnjax.merge_batch_stats(tree, axis)


@pytest.mark.parametrize(
    ("size", "microbatches", "mesh", "by"),
    [
        (30, 4, False, "4 (micro-batches)"),
        (30, 1, True, "8 (local devices of the mesh)"),
        (40, 2, True, "8 (local devices of the mesh) times 2 (micro-batches)"),
    ],
)
def test_a_batch_that_does_not_divide_is_an_error(size, microbatches, mesh, by):
    options = {"mesh": a_mesh(AxisType.Auto)} if mesh else {}
    step = train_step(squared_error, microbatches=microbatches, **options)
    message = (
        f"The size of a training batch must be divisible by {by}, got {size}. Drop the last "
        "partial batch."
    )
    state = start(Net(TRAINED), images(0)["x"])
    with pytest.raises(ValueError, match=rf"^{re.escape(message)}(\n|$)"):
        step(state, images(0, size))
