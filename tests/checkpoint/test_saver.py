"""What is saved: bit for bit what was loaded, for the safetensors package as for qjax."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors import deserialize, safe_open
from safetensors.numpy import load_file, save_file

import qjax
from qjax.checkpoint import saver
from qjax.checkpoint.loader import load
from qjax.checkpoint.safetensors_writer import SafetensorsWriter
from qjax.errors import CheckpointError, UnsupportedError
from qjax.params import Host

GOLDEN = Path(__file__).resolve().parent.parent / "golden"
OUTSIDE = Path(os.environ.get("QJAX_FIXTURES", GOLDEN))
FOLDERS = {
    folder.name: folder
    for root in (OUTSIDE, GOLDEN)
    for folder in sorted(root.glob("*"))
    if (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))
}
# Plain ones: with joined layers, with norms stored less one, with biases.
PLAIN = ("base-tiny-llama", "base-tiny-phi3", "base-tiny-gemma3", "base-tiny-qwen2")

# Beginnings of the names of those that are not saved, and what is said of them.
NOT_SAVED = {
    "autoawq-gemv": "writes gemm only",
}


def why_not(name: str) -> str | None:
    """What a refusal to save says, or None for what is saved."""
    found = [words for start, words in NOT_SAVED.items() if name.startswith(start)]
    return found[0] if found else None


def same(one: qjax.Params, other: qjax.Params) -> bool:
    if jax.tree.structure(one) != jax.tree.structure(other):
        return False
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs)


def raw_file(file: Path) -> dict[str, bytes]:
    """Tensors as bytes, as the safetensors package finds them: numpy has no small floats."""
    return {name: bytes(entry["data"]) for name, entry in deserialize(file.read_bytes())}


@pytest.mark.parametrize("name", [name for name in FOLDERS if why_not(name) is None])
def test_loads_as_what_was_saved(name, tmp_path):
    params = load(FOLDERS[name])
    saved = qjax.save(params, tmp_path / "saved")
    assert saved == tmp_path / "saved"
    assert same(load(saved), params)
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


@pytest.mark.parametrize("name", [name for name in FOLDERS if why_not(name) is not None])
def test_what_is_not_written_is_refused(name, tmp_path):
    with pytest.raises(UnsupportedError, match=why_not(name)):
        qjax.save(load(FOLDERS[name]), tmp_path / "saved")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", PLAIN)
def test_plain_tensors_come_back(name, tmp_path):
    qjax.save(load(FOLDERS[name]), tmp_path / "saved")
    found = load_file(tmp_path / "saved" / "model.safetensors")
    stored = load_file(FOLDERS[name] / "model.safetensors")
    assert found.keys() == stored.keys()
    for key, array in found.items():
        assert array.dtype == stored[key].dtype
        # A norm is used as 1 + weight in float32: that is what comes back of one that is tiny.
        tolerance = 2.0**-24 if name.endswith("gemma3") and array.ndim == 1 else 0
        difference = array.astype(np.float64) - stored[key].astype(np.float64)
        assert np.abs(difference).max() <= tolerance
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config == json.loads((FOLDERS[name] / "config.json").read_text())
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        if (FOLDERS[name] / file).exists():
            assert (tmp_path / "saved" / file).exists()
    assert not (tmp_path / "saved" / "provenance.json").exists()


@pytest.mark.parametrize("name", [name for name in FOLDERS if "gptoss" in name])
def test_experts_of_gpt_oss_come_back(name, tmp_path):
    """Rows of gate and up in turn, biases too; with plain weights, columns before rows."""
    qjax.save(load(FOLDERS[name]), tmp_path / "saved")
    stored = raw_file(FOLDERS[name] / "model.safetensors")
    assert raw_file(tmp_path / "saved" / "model.safetensors") == stored


def test_several_files_and_their_index(tmp_path):
    params = load(FOLDERS["base-tiny-llama"])
    saver.save(params, tmp_path / "saved", shard_bytes=200_000)
    files = sorted(path.name for path in (tmp_path / "saved").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    index = json.loads((tmp_path / "saved" / "model.safetensors.index.json").read_text())
    stored = load_file(FOLDERS["base-tiny-llama"] / "model.safetensors")
    assert index["metadata"]["total_size"] == sum(a.nbytes for a in stored.values())
    for file in files:
        found = load_file(tmp_path / "saved" / file)
        assert {name for name, where in index["weight_map"].items() if where == file} == set(found)
        assert len(found) == 1 or sum(a.nbytes for a in found.values()) <= 200_000
    assert same(load(tmp_path / "saved"), params)


def test_to_another_format_and_back_to_none(tmp_path):
    source = FOLDERS["base-tiny-llama"]
    rounded = load(source, quantization="fp8")
    qjax.save(rounded, tmp_path / "fp8")
    config = json.loads((tmp_path / "fp8" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "fp8"
    assert same(load(tmp_path / "fp8"), rounded)
    found = raw_file(tmp_path / "fp8" / "model.safetensors")
    stored = load_file(source / "model.safetensors")
    name = "model.layers.0.mlp.up_proj"
    weight = stored[f"{name}.weight"].astype(np.float32)
    scale = np.float32(np.abs(weight).max() / np.float32(448))
    assert found[f"{name}.weight_scale"] == scale.tobytes()
    codes = (weight / scale).clip(-448, 448).astype(ml_dtypes.float8_e4m3fn)
    assert found[f"{name}.weight"] == codes.tobytes()
    with pytest.raises(UnsupportedError, match=r"awq|AWQ|gemm"):
        qjax.save(rounded, tmp_path / "awq", {"quant_method": "awq", "bits": 4, "group_size": 32})
    assert not (tmp_path / "awq").exists()


def test_nothing_is_overwritten_and_nothing_left_half_done(tmp_path, monkeypatch):
    params = load(FOLDERS["base-tiny-llama"])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="not an empty folder"):
        qjax.save(params, tmp_path / "full")
    with pytest.raises(CheckpointError, match="not an empty folder"):
        qjax.save(params, tmp_path / "full" / "note.txt")

    def fail(self, name, array):
        raise OSError("disk full")

    monkeypatch.setattr(SafetensorsWriter, "add", fail)
    with pytest.raises(OSError, match="disk full"):
        qjax.save(params, tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]
    monkeypatch.undo()
    (tmp_path / "empty").mkdir()
    qjax.save(params, tmp_path / "empty")
    assert same(load(tmp_path / "empty"), params)


def test_what_cannot_be_saved(tmp_path):
    with pytest.raises(UnsupportedError, match="loaded from files can be saved"):
        qjax.save(replace(load(GOLDEN / "base-tiny-llama"), host=Host()), tmp_path / "a")
    fp8 = load(GOLDEN / "base-tiny-llama", quantization="fp8", quantize_activations=False)
    with pytest.raises(UnsupportedError, match="quantize_activations=False"):
        qjax.save(fp8, tmp_path / "a")
    moved = tmp_path / "source"
    shutil.copytree(GOLDEN / "base-tiny-llama", moved)
    params = load(moved)
    shutil.rmtree(moved)
    with pytest.raises(CheckpointError, match="has gone"):
        qjax.save(params, tmp_path / "a")
    with pytest.raises(CheckpointError, match="quant_method"):
        qjax.save(load(GOLDEN / "base-tiny-llama"), tmp_path / "a", {"bits": 4})
    assert list(tmp_path.iterdir()) == []


def test_ignored_tensors_are_kept(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(GOLDEN / "base-tiny-llama", source)
    tensors = load_file(source / "model.safetensors")
    table = np.arange(4, dtype=np.float32)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = table
    save_file(tensors, source / "model.safetensors", {"format": "pt", "told": "by the writer"})
    qjax.save(load(source), tmp_path / "saved")
    with safe_open(tmp_path / "saved" / "model.safetensors", "numpy") as file:
        found = file.get_tensor("model.layers.0.self_attn.rotary_emb.inv_freq")
        assert file.metadata() == {"format": "pt", "told": "by the writer"}
    np.testing.assert_array_equal(found, table)


def test_writer_aligns_every_element_type(tmp_path):
    tensors = {
        "a": np.arange(3, dtype=np.uint8),
        "b": np.arange(5, dtype=np.float32).reshape(5, 1),
        "c": np.ones((), np.float64),
        "d": np.zeros((2, 0), np.int16),
        "e": np.array([1, 2, 3]).astype(ml_dtypes.bfloat16)[::2],
        "f": np.ones((2, 3), ml_dtypes.float8_e4m3fn),
    }
    writer = SafetensorsWriter(tmp_path, {"format": "pt"})
    for name, array in tensors.items():
        writer.add(name, array)
    with pytest.raises(ValueError, match="twice"):
        writer.add("a", np.zeros(1))
    with pytest.raises(UnsupportedError, match="no elements of type float4"):
        writer.add("g", np.zeros(2, ml_dtypes.float4_e2m1fn))
    writer.close()
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    data = (tmp_path / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    assert length % 8 == 0
    for name, entry in json.loads(data[8 : 8 + length]).items():
        if name != "__metadata__":
            assert entry["data_offsets"][0] % tensors[name].dtype.itemsize == 0
    found = raw_file(tmp_path / "model.safetensors")
    assert found == {name: array.tobytes() for name, array in tensors.items()}
    with safe_open(tmp_path / "model.safetensors", "numpy") as file:
        for name in "abcde":
            read = file.get_tensor(name)
            assert (read.dtype, read.shape) == (tensors[name].dtype, tensors[name].shape)
