"""Importance matrices, against files that llama-imatrix wrote."""

import os
import struct
import subprocess
from functools import cache

import numpy as np
import pytest

from qjax.checkpoint.gguf_io import read_gguf
from qjax.checkpoint.imatrix import Squares, read_imatrix, write_imatrix
from qjax.errors import CheckpointError, UnsupportedError
from qjax.models.config import model_config

DOWN = "model.layers.0.mlp.experts.down_proj"


@cache
def config(model_type="qwen3_moe", **more):
    sizes = {"hidden_size": 128, "intermediate_size": 256, "vocab_size": 512, "head_dim": 32}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    return model_config({"model_type": model_type} | sizes | more)


def entry(data, name):
    """(calls, values) of an entry of a ".dat" file, found by its name."""
    at = data.index(name) + len(name)
    calls, count = struct.unpack_from("<ii", data, at)
    return calls, np.frombuffer(data, "<f4", count, at + 8)


def test_the_kind_of_today(golden):
    path = golden / "imatrix-qwen3moe" / "imatrix.gguf"
    found = read_imatrix(path, config())
    with read_gguf(path) as file:
        sums = np.array(file.array("blk.0.ffn_down_exps.weight.in_sum2"))
        counts = np.array(file.array("blk.0.ffn_down_exps.weight.counts"))
    # Of 256 tokens, each goes to two experts of eight.
    assert counts.shape == (8, 1)
    assert counts.sum() == 2 * 256
    np.testing.assert_array_equal(found[DOWN].rows, counts[:, 0])
    np.testing.assert_allclose(found[DOWN].mean, sums / counts, rtol=1e-6)
    assert found["lm_head"].rows == 256
    idle = found[DOWN.replace("0", "1")]
    assert (idle.mean[idle.rows == 0] == 1).all()
    assert (idle.rows == 0).any()
    q, k, v = (found[f"model.layers.0.self_attn.{part}_proj"].mean for part in "qkv")
    assert q.shape == (128,)
    np.testing.assert_array_equal(q, k)
    np.testing.assert_array_equal(q, v)


def test_the_older_kind(golden):
    path = golden / "imatrix-qwen3moe" / "imatrix.dat"
    found = read_imatrix(path, config())
    calls, values = entry(path.read_bytes(), b"blk.0.ffn_down_exps.weight")
    np.testing.assert_allclose(found[DOWN].mean, values.reshape(8, 64) / calls, rtol=1e-6)
    of_today = read_imatrix(path.with_suffix(".gguf"), config())
    assert found.keys() == of_today.keys()
    for module in found:
        np.testing.assert_allclose(found[module].mean, of_today[module].mean, rtol=1e-6)


def test_written_as_it_was_read(golden, tmp_path):
    path = golden / "imatrix-qwen3moe" / "imatrix.gguf"
    found = read_imatrix(path, config())
    write_imatrix(tmp_path / "new.gguf", found, config(), datasets=["t.txt"], chunk_size=64)
    with read_gguf(path) as theirs, read_gguf(tmp_path / "new.gguf") as ours:
        assert ours.tensors.keys() == theirs.tensors.keys()
        for name, record in theirs.tensors.items():
            assert ours.tensors[name].shape == record.shape
            np.testing.assert_allclose(ours.array(name), theirs.array(name), rtol=1e-6)
        assert ours.metadata["imatrix.chunk_count"] == theirs.metadata["imatrix.chunk_count"] == 4
        assert ours.metadata.keys() == theirs.metadata.keys()
    with pytest.raises(CheckpointError, match="exists: nothing written"):
        write_imatrix(tmp_path / "new.gguf", found, config())


def test_an_expert_without_rows(tmp_path):
    mean, rows = np.full((8, 64), 3.0), np.arange(8)
    write_imatrix(tmp_path / "i.gguf", {DOWN: Squares(mean, rows)}, config())
    found = read_imatrix(tmp_path / "i.gguf", config())[DOWN]
    assert found.mean[:, 0].tolist() == [1, *[3] * 7]
    assert found.rows.tolist() == list(range(8))


def test_of_another_model(golden, tmp_path):
    path = golden / "imatrix-qwen3moe" / "imatrix.gguf"
    with pytest.raises(CheckpointError, match=r"ffn_down_exps.weight: has no place in a qwen3 "):
        read_imatrix(path, config("qwen3", num_experts=None))
    with pytest.raises(CheckpointError, match=r"ffn_down_exps.weight: has 512 values of 8"):
        read_imatrix(path, config(moe_intermediate_size=32))
    with pytest.raises(UnsupportedError, match="vision: GGUF files of qwen3_moe have no place"):
        write_imatrix(tmp_path / "i.gguf", {"vision": Squares(np.ones(4), np.ones(()))}, config())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kept", [0, 3, 9, 40, 5000])
@pytest.mark.parametrize("kind", ["gguf", "dat"])
def test_cut_files(golden, tmp_path, kind, kept):
    data = (golden / "imatrix-qwen3moe" / f"imatrix.{kind}").read_bytes()
    (tmp_path / "cut").write_bytes(data[:kept])
    with pytest.raises(CheckpointError):
        read_imatrix(tmp_path / "cut", config())


def test_files_of_something_else(golden, tmp_path):
    with pytest.raises(CheckpointError, match="no such file"):
        read_imatrix(tmp_path / "none", config())
    with pytest.raises(CheckpointError, match="but no importance matrix"):
        read_imatrix(golden / "gguf-mixtral-F32" / "model.gguf", config())
    (tmp_path / "text").write_text("Once upon a time there was a file that was only text.")
    with pytest.raises(CheckpointError, match="no importance matrix"):
        read_imatrix(tmp_path / "text", config())


@pytest.mark.peer
def test_llama_quantize_takes_it(golden, tmp_path):
    """Run with the program that QJAX_LLAMA_QUANTIZE names."""
    import qjax
    from qjax.checkpoint.gguf_writer import write

    params = qjax.load(golden / "base-tiny-qwen3moe")
    write(params, tmp_path / "model.gguf", metadata={"tokenizer.ggml.model": "none"})
    found = read_imatrix(golden / "imatrix-qwen3moe" / "imatrix.gguf", params.config)
    write_imatrix(tmp_path / "i.gguf", found, params.config, datasets=["t.txt"])
    quantize = os.environ.get("QJAX_LLAMA_QUANTIZE", "llama-quantize")
    files = (str(tmp_path / name) for name in ("i.gguf", "model.gguf", "q.gguf"))
    command = [quantize, "--imatrix", *files, "IQ4_NL"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with read_gguf(tmp_path / "q.gguf") as made:
        assert made.metadata["quantize.imatrix.dataset"] == "t.txt"
        assert made.metadata["quantize.imatrix.entries_count"] == len(found)
        assert made.tensors["blk.0.ffn_up_exps.weight"].qtype == "iq4_nl"
