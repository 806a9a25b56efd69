"""Saving and resuming training: states survive a round trip bit for bit, with `like`."""

import re
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx, serialization, struct
from flax.training.dynamic_scale import DynamicScale
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import bnjax
from bnjax.training import TrainState, init_state, train_step
from tests.support.checkpoints import NEEDS
from tests.support.nnx_layers import WithDropout

pytestmark = pytest.mark.quick_compile

X = jnp.arange(12.0).reshape(4, 3) ** 2
PATHS = pytest.mark.parametrize("suffix", [".msgpack", ".safetensors", ".pth", ""])


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        self.variable("codebook", "codes", lambda: jnp.ones((2, 3), jnp.bfloat16))
        x = bnjax.BatchNorm1d()(nn.Dense(4)(x))
        return nn.Dropout(0.5)(x, deterministic=False).sum(-1)


class Averaged(TrainState):
    """A user's state with extra fields: one with a default, and one that is not saved."""

    noise: Any = None
    name: str = struct.field(default="", pytree_node=False)


def linen_state(seed: int, kind: str = "threefry2x32") -> TrainState:
    tx = optax.chain(optax.clip(1.0), optax.adamw(1e-2))
    key = jax.random.key(seed, impl=kind)
    model = Net()
    state = init_state(model, tx, key, X, loss_scale=DynamicScale())
    held = {name: getattr(state, name) for name in TrainState.__dataclass_fields__}
    return Averaged(**held, noise=jax.random.split(key, 2), name="mine")


def trained(seed: int, kind: str = "threefry2x32") -> TrainState:
    step = train_step(lambda y, batch: y, donate=False)
    return step(linen_state(seed, kind), {"x": X})[0]


def bits(tree: Any) -> list[tuple]:
    """Dtype, shape and bytes of all leaves, including the kind of typed keys."""

    def one(leaf: Any) -> tuple:
        is_key = jnp.issubdtype(getattr(leaf, "dtype", np.dtype(int)), jax.dtypes.prng_key)
        data = np.asarray(jax.random.key_data(leaf) if is_key else leaf)
        return str(leaf.dtype), data.dtype, data.shape, data.tobytes()

    return [one(leaf) for leaf in jax.tree.leaves(tree)]


@pytest.fixture(scope="module")
def state() -> TrainState:
    return trained(0)


@PATHS
def test_a_linen_state_survives_a_round_trip_bit_for_bit(tmp_path, state, suffix):
    pytest.importorskip(NEEDS[suffix])
    path = tmp_path / f"state{suffix}"
    bnjax.save(path, state)
    like = linen_state(1)
    found = bnjax.load(path, like=like)
    assert jax.tree.structure(found) == jax.tree.structure(like)
    assert bits(found) == bits(state)
    assert (found.name, found.loss_scale.scale) == ("mine", state.loss_scale.scale)
    for leaf, new in zip(jax.tree.leaves(state), jax.tree.leaves(found), strict=True):
        assert leaf.sharding == new.sharding


def test_training_resumes_exactly(tmp_path, state):
    step = train_step(lambda y, batch: y, donate=False)
    bnjax.save(tmp_path / "state.msgpack", state)
    found = bnjax.load(tmp_path / "state.msgpack", like=linen_state(1))
    assert bits(step(found, {"x": X})) == bits(step(state, {"x": X}))


@pytest.mark.parametrize("kind", ["rbg", "unsafe_rbg"])
def test_random_keys_of_other_kinds_survive_a_round_trip(tmp_path, kind):
    state = linen_state(0, kind)
    bnjax.save(tmp_path / "state.msgpack", state)
    found = bnjax.load(tmp_path / "state.msgpack", like=linen_state(1, kind))
    assert bits(found.rng) == bits(state.rng)
    assert str(jax.tree.map(jnp.result_type, found.rng)).startswith("key<")
    assert jax.tree.map(jnp.result_type, found.rng) == jax.tree.map(jnp.result_type, state.rng)
    message = r"does not match `like`: wrong shape \['noise \(2, 4\) not \(2, 2\)', 'rng"
    with pytest.raises(ValueError, match=message):
        bnjax.load(tmp_path / "state.msgpack", like=linen_state(1))


def test_flax_serializes_a_state_with_typed_keys(state):
    found: Any = serialization.from_bytes(linen_state(1), serialization.to_bytes(state))
    assert bits(found) == bits(state)
    assert type(found) is Averaged


def nnx_training(seed: int, *, steps: int = 0) -> tuple[WithDropout, nnx.Optimizer]:
    model = WithDropout(nnx.Rngs(seed))
    optimizer = nnx.Optimizer(model, optax.adamw(1e-2), wrt=nnx.Param)
    step = bnjax.nnx.train_step(lambda y, batch: y.sum(-1))
    for _ in range(steps):
        step(model, optimizer, {"x": X})
    return model, optimizer


@PATHS
def test_an_nnx_model_and_optimizer_survive_a_round_trip_bit_for_bit(tmp_path, suffix):
    pytest.importorskip(NEEDS[suffix])
    model, optimizer = nnx_training(0, steps=2)
    path = tmp_path / f"training{suffix}"
    bnjax.save(path, (model, optimizer))
    other = nnx_training(1)
    before = bits(nnx.state(other))
    new_model, new_optimizer = bnjax.load(path, like=other)
    assert bits(nnx.state(new_model)) == bits(nnx.state(model))
    assert bits(nnx.state(new_optimizer)) == bits(nnx.state(optimizer))
    assert bits(nnx.state(other)) == before
    step = bnjax.nnx.train_step(lambda y, batch: y.sum(-1))
    ours, theirs = (
        step(*each, {"x": X}) for each in ((new_model, new_optimizer), (model, optimizer))
    )
    assert bits(ours) == bits(theirs)
    assert bits(nnx.state(new_model)) == bits(nnx.state(model))


def test_nnx_states_load_as_states(tmp_path):
    model, optimizer = nnx_training(0, steps=1)
    tree = {"model": nnx.state(model), "optimizer": nnx.state(optimizer), "epoch": 3}
    bnjax.save(tmp_path / "training.msgpack", tree)
    like = dict(zip(("model", "optimizer"), map(nnx.state, nnx_training(1)), strict=True))
    found = bnjax.load(tmp_path / "training.msgpack", like={**like, "epoch": 0})
    assert (found["epoch"], type(found["epoch"])) == (3, int)
    assert type(found["model"]) is nnx.State
    assert bits(found["model"]) == bits(tree["model"])
    assert bits(found["optimizer"]) == bits(tree["optimizer"])


def test_without_like_a_state_loads_as_dicts_of_numpy_arrays(tmp_path, state):
    bnjax.save(tmp_path / "state.msgpack", state)
    found = bnjax.load(tmp_path / "state.msgpack")
    np.testing.assert_array_equal(found["rng"], jax.random.key_data(state.rng))
    np.testing.assert_array_equal(
        found["opt_state"]["1"]["0"]["mu"]["Dense_0"]["bias"],
        state.opt_state[1][0].mu["Dense_0"]["bias"],
    )
    assert {type(leaf) for leaf in jax.tree.leaves(found)} == {np.ndarray}


def test_like_sets_dtypes_and_shardings(tmp_path):
    bnjax.save(tmp_path / "m.msgpack", {"w": np.arange(8.0, dtype="f"), "n": np.arange(3)})
    mesh = jax.make_mesh((8,), ("data",))
    split = NamedSharding(mesh, P("data"))
    like = {"w": jax.ShapeDtypeStruct((8,), jnp.bfloat16, sharding=split), "n": np.zeros(3, "i2")}
    found = bnjax.load(tmp_path / "m.msgpack", like=like)
    assert found["w"].sharding == split
    assert found["w"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(found["w"], np.arange(8.0))
    assert (type(found["n"]), found["n"].dtype) == (np.ndarray, np.int16)
    placed = jax.device_put(jnp.zeros(8), jax.devices()[3])
    found = bnjax.load(tmp_path / "m.msgpack", like={"w": placed, "n": np.zeros(3, int)})
    assert found["w"].devices() == {jax.devices()[3]}


@pytest.mark.parametrize("suffix", [".msgpack", ".safetensors", ""])
def test_a_mismatch_with_like_is_an_error_that_names_everything(tmp_path, suffix):
    path = tmp_path / f"m{suffix}"
    bnjax.save(path, {"a": np.ones(2), "b": {"c": np.ones((2, 3)), "d": np.ones(1)}})
    like = {"a": np.ones(2, int), "b": {"c": np.ones((3, 2))}, "e": [np.ones(4)]}
    message = (
        "it does not match `like`: missing ['e/0'], unknown ['b/d'], wrong shape ['b/c (2, 3) "
        "not (3, 2)'], wrong dtype ['a float64 not int64']. Is it from another model or "
        "optimizer? Without `like`, it loads unchanged."
    )
    with pytest.raises(ValueError, match=f"{re.escape(message)}$"):
        bnjax.load(path, like=like)
    with pytest.raises(ValueError, match="`like` holds a str at a, not an array"):
        bnjax.load(path, like={"a": "text"})


def test_like_keeps_boxes(tmp_path):
    init = nn.with_partitioning(nn.initializers.ones, (None, "x"))
    variables = nn.Dense(2, kernel_init=init).init(jax.random.key(0), X)
    bnjax.save(tmp_path / "m.msgpack", jax.tree.map(lambda leaf: leaf + 1, variables))
    found = bnjax.load(tmp_path / "m.msgpack", like=variables)
    chex.assert_trees_all_equal(found, jax.tree.map(lambda leaf: leaf + 1, variables))
    assert found["params"]["kernel"].names == (None, "x")


def test_a_manager_folder_loads_its_newest_step(tmp_path, state, capfd):
    import orbax.checkpoint as ocp

    with ocp.CheckpointManager(tmp_path / "run" / "checkpoints") as manager:
        for number, each in ((9, linen_state(2)), (10, state)):
            items = ocp.args.Composite(
                state=ocp.args.StandardSave(serialization.to_state_dict(each)),
                records=ocp.args.JsonSave({"loss": [1.0]}),
            )
            manager.save(number, args=items)
        manager.wait_until_finished()
    (tmp_path / "run" / "checkpoints" / "11.orbax-checkpoint-tmp-0").mkdir()
    capfd.readouterr()
    found = bnjax.load(tmp_path / "run", like=linen_state(1))
    assert bits(found) == bits(state)
    assert capfd.readouterr() == ("", "")


def test_a_folder_with_several_checkpoints_or_none_is_an_error(tmp_path):
    for name in ("a", "b"):
        bnjax.save(tmp_path / f"{name}.msgpack", {"w": np.ones(2)})
    message = f"the folder is not a checkpoint itself. It holds {tmp_path}/a.msgpack, "
    with pytest.raises(ValueError, match=re.escape(message)):
        bnjax.load(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"the folder is not a checkpoint itself. It holds none."):
        bnjax.load(tmp_path / "empty")


def test_a_folder_of_legacy_flax_files_loads_the_newest(tmp_path, state):
    for number, each in ((9, linen_state(2)), (10, state)):
        (tmp_path / f"checkpoint_{number}").write_bytes(serialization.to_bytes(each))
    assert bits(bnjax.load(tmp_path, like=linen_state(1))) == bits(state)
    assert int(bnjax.load(tmp_path / "checkpoint_9")["step"]) == 0


def test_names_besides_those_of_arrays_are_checked_when_saving_but_not_when_loading(tmp_path):
    held = {"w": np.ones(2), "vocabulary": {".": 1, "": 3}, "best": {"./a//b.ckpt": np.ones(())}}
    (tmp_path / "m.msgpack").write_bytes(serialization.msgpack_serialize(held))
    chex.assert_trees_all_equal(bnjax.load(tmp_path / "m.msgpack"), held)
    with pytest.raises(ValueError, match=r"the name '\.' in vocabulary is not a valid path"):
        bnjax.save(tmp_path / "other.msgpack", held)


def test_replacing_a_file_keeps_permissions_and_symlinks(tmp_path):
    target, link = tmp_path / "target.msgpack", tmp_path / f"{'m' * 240}.msgpack"
    bnjax.save(target, {"w": np.ones(2)})
    target.chmod(0o600)
    link.symlink_to(target)
    bnjax.save(link, {"w": np.zeros(2)})
    assert link.is_symlink()
    assert target.stat().st_mode & 0o777 == 0o600
    np.testing.assert_array_equal(bnjax.load(target)["w"], np.zeros(2))


@pytest.mark.parametrize("suffix", NEEDS)
def test_empty_collections_and_arrays_survive_a_round_trip(tmp_path, suffix):
    pytest.importorskip(NEEDS[suffix])
    tree = {
        "params": {},
        "batch_stats": {"bn": {"mean": np.ones(2, "f"), "var": np.zeros((0, 3), jnp.bfloat16)}},
        "cache": {"a": {"b": {}}},
    }
    bnjax.save(tmp_path / f"m{suffix}", tree)
    found = bnjax.load(tmp_path / f"m{suffix}")
    chex.assert_trees_all_equal(found, tree)
    assert found["batch_stats"]["bn"]["var"].dtype == jnp.bfloat16
    for name, tree in (("none", {}), ("one", {"a": np.zeros((2, 0))})):
        bnjax.save(tmp_path / f"{name}{suffix}", tree)
        chex.assert_trees_all_equal(bnjax.load(tmp_path / f"{name}{suffix}"), tree)


def test_a_failed_orbax_save_removes_only_its_own_files(tmp_path, monkeypatch):
    import orbax.checkpoint as ocp

    def full(self, path, *_, **__):
        path.with_name(f"{path.name}.orbax-checkpoint-tmp").mkdir()
        raise OSError("the disk is full")

    others = tmp_path / "m.orbax-checkpoint-tmp-7"
    others.mkdir()
    monkeypatch.setattr(ocp.PyTreeCheckpointer, "save", full)
    with pytest.raises(OSError, match=r"^the disk is full$"):
        bnjax.save(tmp_path / "m", {"w": np.ones(2)})
    assert list(tmp_path.iterdir()) == [others]
