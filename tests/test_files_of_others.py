"""Checkpoints written by other programs, recognized by their content, whatever their names."""

import json
import pickle
import re
import shutil
import tarfile
from pathlib import Path
from typing import Any

import chex
import numpy as np
import pytest
from flax import serialization

import bnjax
from tests.support.checkpoints import STATE_DICT, VARIABLES

pytestmark = pytest.mark.quick_compile

PLAIN = {"bn.running_mean": np.arange(3, dtype="f"), "bn.running_var": np.ones(3, "f")}
REFUSED = "Cannot read {} as {}: {}"


def torch_file(path: Path, tree: Any, **options: Any) -> Path:
    torch = pytest.importorskip("torch")

    def tensors(part: Any) -> Any:
        if isinstance(part, dict):
            return {name: tensors(each) for name, each in part.items()}
        return torch.from_numpy(part.copy()) if isinstance(part, np.ndarray) else part

    torch.save(tensors(tree), path, **options)
    return path


@pytest.mark.parametrize("archived", [True, False])
@pytest.mark.parametrize(
    "name",
    [
        "model_best.pth.tar",
        "model.pth.tar-250",
        "epoch=3.ckpt",
        "pytorch_model.bin",
        "weights",
        "weights.safetensors",
        "checkpoint_3",
    ],
)
def test_pytorch_files_load_under_any_name(tmp_path, name, archived):
    options = {"_use_new_zipfile_serialization": archived}
    path = torch_file(tmp_path / name, {"state_dict": PLAIN, "arch": "resnet18"}, **options)
    chex.assert_trees_all_equal(bnjax.load(path)["state_dict"], PLAIN)
    assert bnjax.load(path)["arch"] == "resnet18"
    chex.assert_trees_all_equal(bnjax.load(tmp_path, key="state_dict"), PLAIN)


@pytest.mark.parametrize("suffix", [".safetensors", ".msgpack"])
@pytest.mark.parametrize("name", ["checkpoint_100", "flax_model", "a.pth", "b.bin"])
def test_other_formats_load_under_any_name(tmp_path, suffix, name):
    bnjax.save(tmp_path / f"m{suffix}", VARIABLES)
    (tmp_path / f"m{suffix}").rename(tmp_path / name)
    chex.assert_trees_all_equal(bnjax.load(tmp_path / name), VARIABLES)


@pytest.mark.parametrize("start", [b"\x80\x02", b"\x80\x04", b"PK", b"\x81\xa1"])
def test_safetensors_is_recognized_if_its_length_looks_like_another_format(tmp_path, start):
    pytest.importorskip("safetensors")
    bnjax.save(tmp_path / "m.safetensors", PLAIN)
    content = (tmp_path / "m.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    longer = int.from_bytes(start, "little")
    padded = content[8 : 8 + length].ljust(longer) + content[8 + length :]
    (tmp_path / "m.bin").write_bytes(longer.to_bytes(8, "little") + padded)
    chex.assert_trees_all_equal(bnjax.load(tmp_path / "m.bin"), PLAIN)


def test_key_selects_a_part(tmp_path):
    tree = {"model": {"ema": PLAIN, "now": {"w": np.ones(1)}}, "step": 3}
    path = torch_file(tmp_path / "m.pth", tree)
    chex.assert_trees_all_equal(bnjax.load(path, key="model/ema"), PLAIN)
    found = bnjax.load(path, key="model/ema", only=lambda name, shape: name == "bn.running_var")
    assert list(found) == ["bn.running_var"]
    like = {"w": np.zeros(1, "f")}
    np.testing.assert_array_equal(bnjax.load(path, key="model/now", like=like)["w"], [1])


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("mode", "`key` is 'mode', but it has no part 'mode'. Its parts are 'model', 'other'."),
        (
            "model/now",
            "`key` is 'model/now', but model has no part 'now'. Its parts are 'ema', 'old'.",
        ),
        ("step", "`key` is 'step', which is not a dict of arrays."),
        ("step/a", "`key` is 'step/a', but step has no part 'a'. It has no parts."),
    ],
)
def test_an_unknown_key_is_an_error_that_lists_the_parts(tmp_path, key, message):
    tree = {"model": {"ema": PLAIN, "old": PLAIN}, "other": PLAIN, "step": 3}
    path = tmp_path / "m.msgpack"
    path.write_bytes(serialization.msgpack_serialize(tree))
    expected = REFUSED.format(path, "Flax's msgpack", message)
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        bnjax.load(path, key=key)


def test_entries_besides_the_weights_may_have_any_name(tmp_path):
    others = {
        "best_k_models": {"/runs/epoch=3.ckpt": 0.2, "./a//b.ckpt": np.full((), 0.5)},
        "vocabulary": {".": 1, "/": 2, "": 3, 0.5: 4, ("a", "b"): 5},
    }
    path = torch_file(tmp_path / "m.ckpt", {"state_dict": PLAIN, **others})
    loaded = bnjax.load(path)
    chex.assert_trees_all_equal(loaded["state_dict"], PLAIN)
    assert loaded["vocabulary"] == {".": 1, "/": 2, "": 3, "0.5": 4, "('a', 'b')": 5}
    assert float(loaded["best_k_models"]["./a//b.ckpt"]) == 0.5


def test_names_of_unwanted_arrays_are_not_checked(tmp_path):
    path = torch_file(tmp_path / "m.pth", {"state_dict": PLAIN, "cache": {"..": np.ones(3)}})
    with pytest.raises(ValueError, match=r"the name '\.\.' in cache is not a valid path"):
        bnjax.load(path)
    chex.assert_trees_all_equal(bnjax.load(path, key="state_dict"), PLAIN)
    pytest.importorskip("safetensors")
    from safetensors.numpy import save_file

    save_file({**PLAIN, "/a": np.ones(3)}, tmp_path / "m.safetensors")
    found = bnjax.load(tmp_path / "m.safetensors", only=lambda name, _: name.startswith("bn"))
    chex.assert_trees_all_equal(found, PLAIN)


# Shards


def shards(folder: Path, kind: str) -> Path:
    """Save STATE_DICT in two files of `kind`, with an index."""
    names, places = list(STATE_DICT), {}
    stem = {"bin": "pytorch_model", "safetensors": "model"}[kind]
    for number, part in enumerate((names[:3], names[3:]), 1):
        file = f"{stem}-0000{number}-of-00002.{kind}"
        held = {name: STATE_DICT[name] for name in part}
        if kind == "bin":
            bnjax.save(folder / "part.pth", held)
            (folder / "part.pth").rename(folder / file)
        else:
            bnjax.save(folder / file, held)
        places |= dict.fromkeys(part, file)
    index = folder / f"{stem}.{kind}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    return index


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_shards_load_from_their_index_or_folder(tmp_path, kind):
    pytest.importorskip("torch" if kind == "bin" else "safetensors")
    index = shards(tmp_path, kind)
    (tmp_path / "config.json").write_text("{}")
    chex.assert_trees_all_equal(bnjax.load(index), STATE_DICT)
    chex.assert_trees_all_equal(bnjax.load(tmp_path), STATE_DICT)
    found = bnjax.load(tmp_path, only=lambda name, shape: shape == (5,))
    assert sorted(found) == ["bn.running_mean", "bn.running_var", "bn.weight"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda folder, index: (folder / "model-00002-of-00002.safetensors").unlink(),
            "these shards are missing: model-00002-of-00002.safetensors. Copy them to its folder.",
        ),
        (
            lambda folder, index: index.write_text('{"weight_map": {"a": "../other.safetensors"}}'),
            "its shards must be in its folder, got ../other.safetensors.",
        ),
        (
            lambda folder, index: index.write_text('{"weight_map": ["a"]}'),
            "its `weight_map` does not give a file for each name.",
        ),
        (
            lambda folder, index: shutil.copy(
                folder / "model-00001-of-00002.safetensors",
                folder / "model-00002-of-00002.safetensors",
            ),
            "its shard model-00002-of-00002.safetensors does not hold bn.num_batches_tracked, "
            "bn.running_var, empty.",
        ),
    ],
)
def test_shards_that_do_not_match_the_index_are_an_error(tmp_path, damage, message):
    pytest.importorskip("safetensors")
    index = shards(tmp_path, "safetensors")
    damage(tmp_path, index)
    expected = REFUSED.format(index, "an index of shards", message)
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        bnjax.load(index)


def test_a_hugging_face_folder_loads_its_model(tmp_path):
    torch_file(tmp_path / "training_args.bin", {"lr": 0.1})
    torch_file(tmp_path / "optimizer.pt", {"state": {0: {"exp_avg": np.ones(3)}}})
    bnjax.save(tmp_path / "flax_model.msgpack", VARIABLES)
    chex.assert_trees_all_equal(bnjax.load(tmp_path), VARIABLES)
    torch_file(tmp_path / "pytorch_model.bin", PLAIN)
    chex.assert_trees_all_equal(bnjax.load(tmp_path), PLAIN)


# Orbax folders


def test_a_step_with_an_item_per_collection_loads_as_a_whole(tmp_path):
    import orbax.checkpoint as ocp

    with ocp.CheckpointManager(tmp_path / "run") as manager:
        for step in (9, 10):
            saves: dict[str, Any] = {
                name: ocp.args.StandardSave(part) for name, part in VARIABLES.items()
            }
            saves["records"] = ocp.args.JsonSave({"loss": step})
            manager.save(step, args=ocp.args.Composite(**saves))
        manager.wait_until_finished()
    for path in ("run", "run/10"):
        chex.assert_trees_all_equal(bnjax.load(tmp_path / path), VARIABLES)
    found = bnjax.load(tmp_path / "run/10/params")
    chex.assert_trees_all_equal(found, VARIABLES["params"])


def test_a_symlink_to_the_newest_step_is_not_a_second_checkpoint(tmp_path):
    for step in (1, 2):
        bnjax.save(tmp_path / f"step_{step}", {"w": np.full(2, step)})
    (tmp_path / "latest").symlink_to(tmp_path / "step_2")
    (tmp_path / "around").symlink_to(tmp_path)
    np.testing.assert_array_equal(bnjax.load(tmp_path)["w"], [2, 2])
    np.testing.assert_array_equal(bnjax.load(tmp_path / "latest")["w"], [2, 2])


def test_an_orbax_folder_with_damaged_metadata_is_an_error(tmp_path):
    bnjax.save(tmp_path / "m", VARIABLES)
    (tmp_path / "m" / "manifest.ocdbt").write_bytes(b"damage")
    (tmp_path / "m" / "_METADATA").write_bytes(b"damage")
    message = REFUSED.format(
        tmp_path / "m", "an orbax checkpoint", "its metadata is damaged. Copy it again."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        bnjax.load(tmp_path / "m")


def test_a_folder_loads_its_only_checkpoint_among_other_files(tmp_path):
    np.savez(tmp_path / "inputs.npz", x=np.ones(2))
    (tmp_path / "history.pkl").write_bytes(pickle.dumps({"loss": [1.0]}))
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (tmp_path / "broken.pth").write_bytes(b"PK\x03\x04")
    (tmp_path / "config.json").write_text('{"weight": 1}')
    with tarfile.open(tmp_path / "data.tar", "w") as archive:
        archive.add(tmp_path / "config.json")
    torch_file(tmp_path / "epoch=3.ckpt", PLAIN)
    chex.assert_trees_all_equal(bnjax.load(tmp_path), PLAIN)
