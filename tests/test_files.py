"""Saving and loading checkpoints: exact round trips, atomic writes, and errors."""

import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import bnjax
from bnjax import _files
from tests.support.checkpoints import NEEDS, STATE_DICT, VARIABLES

pytestmark = pytest.mark.quick_compile

FILES = (".safetensors", ".pth", ".msgpack")


@pytest.fixture(params=(*FILES, ""))
def path(request, tmp_path) -> Path:
    """A path in each format; the empty suffix is an orbax folder."""
    pytest.importorskip(NEEDS[request.param])
    return tmp_path / f"model{request.param}"


each_file = pytest.mark.parametrize("path", FILES, indirect=True)


def names(folder: Path) -> list[str]:
    return sorted(found.name for found in folder.iterdir())


def assert_same(actual: Any, expected: Any) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())


@pytest.mark.parametrize("tree", [STATE_DICT, VARIABLES])
def test_each_format_survives_a_round_trip_bit_for_bit(path, tree):
    bnjax.save(path, tree)
    assert_same(bnjax.load(str(path)), tree)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "bfloat16", "complex64"])
def test_jax_dtypes_survive_a_round_trip(path, dtype):
    tree = {"x": np.arange(3).astype(dtype)}
    if path.suffix == ".safetensors" and dtype.startswith("float8"):
        path = path.with_suffix(".msgpack")  # safetensors supports them, but not with NumPy
    bnjax.save(path, tree)
    assert_same(bnjax.load(path), tree)


def test_float8_in_safetensors_is_refused_by_name(tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    x = torch.ones(3)
    save_file({"x": x, "w": x.to(torch.float8_e5m2)}, tmp_path / "model.safetensors")
    message = (
        f"Cannot read {tmp_path / 'model.safetensors'} as safetensors: 'w' has dtype F8_E5M2, "
        "which NumPy does not support. Load it with `safetensors.torch`, or leave it out with "
        "`only`."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        bnjax.load(tmp_path / "model.safetensors")
    loaded = bnjax.load(tmp_path / "model.safetensors", only=lambda name, shape: name == "x")
    assert_same(loaded, {"x": np.ones(3, np.float32)})


def test_lazily_conjugated_tensors_load_as_arrays(tmp_path):
    torch = pytest.importorskip("torch")
    z = torch.tensor([1 + 2j, 3 - 1j])
    torch.save({"z": z.conj(), "imag": z.clone().conj().imag}, tmp_path / "model.pth")
    expected = {
        "z": np.array([1 - 2j, 3 + 1j], np.complex64),
        "imag": np.array([-2, 1], np.float32),
    }
    assert_same(bnjax.load(tmp_path / "model.pth"), expected)


def test_a_failed_orbax_save_leaves_nothing(tmp_path, monkeypatch):
    import orbax.checkpoint as ocp

    def full(self, path, *_, **__):
        path.with_name(f"{path.name}.orbax-checkpoint-tmp").mkdir()
        raise OSError("the disk is full")

    monkeypatch.setattr(ocp.PyTreeCheckpointer, "save", full)
    with pytest.raises(OSError, match=r"^the disk is full$"):
        bnjax.save(tmp_path / "model", VARIABLES)
    assert names(tmp_path) == []


@each_file
def test_saving_replaces_a_file_and_keeps_the_usual_permissions(path):
    bnjax.save(path, STATE_DICT)
    bnjax.save(path, VARIABLES)
    assert_same(bnjax.load(path), VARIABLES)
    (path.parent / "other").touch()
    assert path.stat().st_mode == (path.parent / "other").stat().st_mode
    assert names(path.parent) == sorted([path.name, "other"])


def test_saving_does_not_replace_a_folder(tmp_path):
    bnjax.save(tmp_path / "model", VARIABLES)
    (tmp_path / "file").touch()
    for name, what in (("model", "folder"), ("file", "file")):
        message = (
            f"There is a {what} at {tmp_path / name}, and a {what} can't be replaced atomically by "
            f"a folder. Choose another name, or remove it first."
        )
        with pytest.raises(FileExistsError, match=f"^{re.escape(message)}$"):
            bnjax.save(tmp_path / name, VARIABLES)


@each_file
def test_a_failed_save_leaves_only_the_old_file(path, monkeypatch):
    bnjax.save(path, VARIABLES)

    def full(_):
        raise OSError("the disk is full")

    monkeypatch.setattr(_files.os, "fsync", full)
    with pytest.raises(OSError, match=r"^the disk is full$"):
        bnjax.save(path, STATE_DICT)
    assert names(path.parent) == [path.name]
    assert_same(bnjax.load(path), VARIABLES)


def test_boxes_and_nnx_states_are_saved_as_plain_arrays(tmp_path):
    boxed = nn.Dense(2, kernel_init=nn.with_partitioning(nn.initializers.ones, (None, "x")))
    bnjax.save(tmp_path / "linen.msgpack", boxed.init(jax.random.key(0), jnp.ones((1, 3))))
    kernel = bnjax.load(tmp_path / "linen.msgpack")["params"]["kernel"]
    np.testing.assert_array_equal(kernel, np.ones((3, 2)))
    model = nnx.Sequential(nnx.Linear(3, 2, rngs=nnx.Rngs(0)))
    bnjax.save(tmp_path / "nnx.msgpack", nnx.state(model))
    assert jax.tree.map(np.shape, bnjax.load(tmp_path / "nnx.msgpack")) == {
        "layers": {"0": {"bias": (2,), "kernel": (3, 2)}}
    }


def test_only_selects_the_arrays_to_load(path):
    bnjax.save(path, VARIABLES)
    loaded = bnjax.load(path, only=lambda name, shape: name.endswith("mean") and shape == (5,))
    assert jax.tree.map(np.shape, loaded["batch_stats"]) == {"bn_0": {"mean": (5,)}}
    assert len(jax.tree.leaves(loaded)) == 1


def test_loading_keeps_values_that_are_not_arrays(tmp_path):
    torch = pytest.importorskip("torch")
    held = {"epoch": 3, "name": "run", "state_dict": {"w": torch.ones(2)}, "lr": [0.1, None]}
    torch.save(held, tmp_path / "run.pth")
    loaded = bnjax.load(tmp_path / "run.pth")
    np.testing.assert_array_equal(loaded.pop("state_dict")["w"], np.ones(2, np.float32))
    assert loaded == {"epoch": 3, "name": "run", "lr": {"0": 0.1, "1": None}}


# Errors


@pytest.mark.parametrize(
    ("name", "tree", "message"),
    [
        (
            "model.bin",
            {},
            "Cannot save to {}: '.bin' is not a supported suffix. Formats "
            "are .safetensors, .pth and .pt (PyTorch), .msgpack (Flax), and a folder without a "
            "suffix (orbax).",
        ),
        (
            "model.msgpack",
            {"a": {"b": "text"}, "key": print},
            "Cannot save to {}: a checkpoint holds only arrays of numbers, but these are not: "
            "a/b (str), key (builtin_function_or_method). Leave them out.",
        ),
        (
            "model.msgpack",
            {"names": np.array(["a", "b"]), "when": np.zeros(2, "M8[s]")},
            "Cannot save to {}: a checkpoint holds only arrays of numbers, but these are not: "
            "names (<U1), when (datetime64[s]). Leave them out.",
        ),
        (
            "model.safetensors",
            {"a": np.zeros(2, jnp.float8_e5m2), "b": np.zeros(2, np.complex128)},
            "Cannot save to {}: this format does not support these dtypes: a (float8_e5m2), b "
            "(complex128). Convert them, or save as .msgpack, which supports all.",
        ),
        *(
            (
                name,
                {"a": np.zeros(2, jnp.int4)},
                "Cannot save to {}: this format does not support these dtypes: a (int4). Convert "
                "them, or save as .msgpack, which supports all.",
            )
            for name in ("model.pth", "model")
        ),
        *(
            (
                "model",
                {first[0]: first[1], "a.b": np.ones(2)},
                "Cannot save to {}: orbax writes " + path + " and ('a.b',) to the same file, a.b. "
                "Rename one, or save as .msgpack.",
            )
            for first, path in (
                (("a", {"b": np.ones(2)}), "('a', 'b')"),
                (("a/b", np.ones(2)), "('a/b',)"),
            )
        ),
        (
            "model.msgpack",
            np.ones(2),
            "Cannot save to {}: it must hold a dict of arrays by name, got ndarray. Save the "
            "`state_dict()`, the variables or the training state of a model.",
        ),
        (
            "model.safetensors",
            {"a/b": np.ones(2)},
            "Cannot save to {}: the name 'a/b' contains '/', which separates the names of nested "
            "dicts. Rename it, or save as .msgpack.",
        ),
        (
            "model",
            {"a": {"..": np.ones(2)}},
            "Cannot save to {}: the name '..' in a is not a valid path.",
        ),
    ],
)
def test_trees_that_would_not_survive_a_round_trip_are_refused(tmp_path, name, tree, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message.format(tmp_path / name))}$"):
        bnjax.save(tmp_path / name, tree)
    assert names(tmp_path) == []


@pytest.mark.parametrize("name", ["model.msgpack", "model.safetensors", "model"])
def test_arrays_in_the_other_byte_order_keep_their_values(tmp_path, name):
    bnjax.save(tmp_path / name, {"w": np.arange(3, dtype=">f4")})
    np.testing.assert_array_equal(bnjax.load(tmp_path / name)["w"], np.arange(3.0))


def test_missing_folders_and_swapped_arguments_are_errors(tmp_path):
    message = f"There is no folder {tmp_path}/no to save m.msgpack in."
    with pytest.raises(FileNotFoundError, match=f"^{re.escape(message)}$"):
        bnjax.save(tmp_path / "no" / "m.msgpack", {"w": np.ones(2)})
    tree: Any = {"w": np.ones(2)}
    message = "`path` comes first, as in save(path, tree), got dict."
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        bnjax.save(tree, tmp_path / "m.msgpack")
