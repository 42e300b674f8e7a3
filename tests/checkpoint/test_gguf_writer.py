"""Models written as GGUF files: read back, and read by llama.cpp."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

import qjax
from pallas_kernels import codes, unpack
from qjax import ops
from qjax.checkpoint.gguf_io import read_gguf
from qjax.checkpoint.gguf_metadata import FILE_TYPES, file_type
from qjax.checkpoint.gguf_writer import write
from qjax.errors import CheckpointError, UnsupportedError
from qjax.qarray import QArray
from tests.programs import forward

NO_TOKENIZER = {"tokenizer.ggml.model": "none"}
# A base, and the file that llama.cpp's converter and llama-quantize made of it.
CONVERTED = {
    "base-tiny-gemma3": "gguf-gemma3-Q5_0",
    "base-tiny-llama": "gguf-h128-Q4_K_M-fallback",
}


def is_weight(leaf):
    return isinstance(leaf, QArray)


def numbers(leaf):
    """A parameter as float32, decoded by numpy: nothing to compile."""
    if not is_weight(leaf):
        return np.asarray(leaf)
    w = ops.unprepare(jax.tree.map(np.asarray, leaf))
    if w.scale is None:
        return unpack.dequantize(np.asarray(w.qvalue), w.qtype, np)
    zero, total = w.zero_point, w.aux.get("global_scale")
    parts = (np.asarray(w.qvalue), w.qtype, w.shape, w.group, w.scale, zero, total)
    return codes.dequantize(*parts, additive=w.additive, xp=np)


def dense(params):
    return jax.tree.map(numbers, params.tree, is_leaf=is_weight)


def assert_same_numbers(params, again):
    jax.tree.map(np.testing.assert_array_equal, dense(params), dense(again))


@pytest.mark.parametrize(
    "name",
    [
        "gguf-h128-Q4_K_M-fallback",
        "gguf-gemma3-Q5_0",
        "gguf-deepseek-v3-F32",
        "gguf-gptoss-F32",
        "gguf-qwen2moe-F32",
    ],
)
def test_a_gguf_file_comes_back_byte_by_byte(golden, tmp_path, name):
    source = golden / name / "model.gguf"
    file = write(qjax.load(source), tmp_path / "new" / "model.gguf")
    assert file.read_bytes() == source.read_bytes()
    assert [path.name for path in file.parent.iterdir()] == ["model.gguf"]


@pytest.mark.parametrize("name", CONVERTED)
def test_metadata_are_those_of_the_converter(golden, tmp_path, name):
    params = qjax.load(golden / name)
    written = read_gguf(write(params, tmp_path / "model.gguf"))
    theirs = read_gguf(golden / CONVERTED[name] / "model.gguf")
    assert written.tensors.keys() == theirs.tensors.keys()
    for tensor, record in theirs.tensors.items():
        assert written.tensors[tensor].shape == record.shape
        if record.qtype == "f32":
            np.testing.assert_array_equal(written.array(tensor), theirs.array(tensor))
    assert theirs.metadata.keys() - written.metadata.keys() == {"general.size_label"}
    for key, value in theirs.metadata.items():
        if key not in ("general.size_label", "general.name", "general.file_type"):
            np.testing.assert_array_equal(written.metadata[key], value, err_msg=key)
            assert written.value_types[key] == theirs.value_types[key], key
    assert written.metadata["general.file_type"] == FILE_TYPES["BF16"]
    assert_same_numbers(params, qjax.load(tmp_path / "model.gguf"))


@pytest.mark.parametrize(
    "name",
    [
        *("base-tiny-mixtral", "base-tiny-phi3", "base-tiny-qwen3", "base-tiny-qwen3moe"),
        *("tiny-llama-yarn", "tiny-mistral", "gptoss-mxfp4"),
    ],
)
def test_a_folder_becomes_the_same_model(golden, tmp_path, name):
    source = golden / name
    params = qjax.load(source)
    own = {} if (source / "tokenizer.json").exists() else NO_TOKENIZER
    again = qjax.load(write(params, tmp_path / "model.gguf", metadata=own))
    assert_same_numbers(params, again)
    if name != "tiny-mistral":  # which sees no further than its window
        kept = {"rms_norm_eps": params.config.rms_norm_eps}
        if name == "gptoss-mxfp4":  # llama.cpp's yarn always has bands of whole pairs
            kept["rope"] = params.config.rope
        assert replace(again.config, **kept) == params.config
    else:
        assert again.config.max_position_embeddings == params.config.sliding_window
    if not own:
        text = "The cat sat on 12 mats; <|im_start|>it's l'été\n\n  日本"
        assert again.tokenizer.encode(text) == params.tokenizer.encode(text)
        messages = [{"role": "user", "content": "Hello"}]
        assert again.tokenizer.apply_chat_template(messages) == (
            params.tokenizer.apply_chat_template(messages)
        )


def test_rope_factors_are_a_tensor(golden, tmp_path):
    """Llama 3's bands: the divisors that the reader makes frequencies of give its tables."""
    params = qjax.load(golden / "tiny-llama-llama3")
    file = write(params, tmp_path / "model.gguf", metadata=NO_TOKENIZER)
    with np.load(golden / "tiny-llama-llama3" / "reference.npz") as reference:
        ids, logits = (reference[f"{key}_0"] for key in ("ids", "logits"))
    found = np.asarray(forward(qjax.load(file), ids))
    np.testing.assert_allclose(found, logits, atol=2e-4)


@pytest.mark.parametrize(
    ("name", "qtype"),
    [
        ("autoawq-gemv-g32", "q5_0"),  # a code less its zero point: -15 to 15
        ("ct-qwen3moe-w4a16-g32", "q4_0"),
        ("ct-mxfp4", "mxfp4"),
        ("quark-int8", "q8_0"),
    ],
)
def test_codes_are_held_exactly(golden, tmp_path, name, qtype):
    params = qjax.load(golden / name, quantize_activations=False)
    file = write(params, tmp_path / "model.gguf")
    assert read_gguf(file).tensors["blk.0.attn_q.weight"].qtype == qtype
    assert_same_numbers(params, qjax.load(file))


def test_columns_in_another_order_are_refused(golden, tmp_path):
    params = qjax.load(golden / "gptq-4b-g32-desc")
    with pytest.raises(UnsupportedError, match=r"down_proj: .* GGUF has no place for its perm"):
        write(params, tmp_path / "model.gguf", metadata=NO_TOKENIZER)
    assert list(tmp_path.iterdir()) == []


def test_what_no_type_holds_goes_to_encode(golden, tmp_path):
    params = qjax.load(golden / "fgfp8-block-64-ue8m0", quantize_activations=False)
    file = tmp_path / "model.gguf"
    with pytest.raises(UnsupportedError, match=r"holds fp8_e4m3 .* exactly: .* are no integers"):
        write(params, file)
    assert list(tmp_path.iterdir()) == []
    seen = []

    def encode(module, weight):
        seen.append(module)
        return QArray.from_dense(numbers(weight))

    write(params, file, encode=encode)
    assert "model.layers.0.mlp.down_proj" in seen
    assert "model.embed_tokens" not in seen
    assert_same_numbers(params, qjax.load(file))


def test_rounded_inputs_are_refused(golden, tmp_path):
    params = qjax.load(golden / "fgfp8-block-64-ue8m0")
    with pytest.raises(UnsupportedError, match="quantize_activations=False"):
        write(params, tmp_path / "model.gguf")


def test_nothing_is_overwritten(golden, tmp_path):
    file = tmp_path / "model.gguf"
    file.write_bytes(b"kept")
    with pytest.raises(CheckpointError, match="exists: nothing written"):
        write(qjax.load(golden / "gguf-mixtral-F32" / "model.gguf"), file)
    assert file.read_bytes() == b"kept"


def test_a_model_without_a_source(golden, tmp_path):
    params = qjax.load(golden / "gguf-mixtral-F32" / "model.gguf")
    params = replace(params, host=replace(params.host, origin=None))
    with pytest.raises(UnsupportedError, match="made in memory"):
        write(params, tmp_path / "model.gguf")


@pytest.mark.parametrize("name", ["gguf-Q2_K", "gguf-Q4_1", "gguf-gemma3-Q5_0"])
def test_mixes_are_told_by_their_types(golden, name):
    with read_gguf(golden / name / "model.gguf") as file:
        types = {n: (r.qtype, r.nbytes) for n, r in file.tensors.items() if len(r.shape) > 1}
        assert file_type(types) == file.metadata["general.file_type"]


@pytest.mark.parametrize(
    "mix", ["Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_K_S", "Q4_K_M", "Q5_K_M", "Q8_0"]
)
def test_mixes_of_many_layers_are_told_by_their_types(golden, mix):
    said = json.loads((golden / "gguf_mixes.json").read_text())
    parts = said["llama-24-gqa4"][f"{mix}/plain"]
    types = {
        f"blk.{layer}.{part}.weight": (said["types"][ord(letter) - ord("a")], 1)
        for part, letters in parts.items()
        for layer, letter in enumerate(letters)
    }
    assert file_type(types) == FILE_TYPES[mix]


LLAMA_CPP = """
import sys
import llama_cpp, numpy as np
file, ids, out = sys.argv[1:]
ids = np.load(ids).tolist()
model = llama_cpp.Llama(file, n_ctx=64, logits_all=True, verbose=False, type_k=0, type_v=0)
model.eval(ids)
np.save(out, np.array(model.scores[: len(ids)], np.float32))
"""


@pytest.mark.peer
@pytest.mark.parametrize(
    "name",
    [
        *("base-tiny-llama", "base-tiny-qwen2", "base-tiny-qwen3", "base-tiny-gemma3"),
        *("base-tiny-mixtral", "base-tiny-qwen3moe", "base-tiny-phi3", "tiny-llama-llama3"),
    ],
)
def test_llama_cpp_gives_our_logits(golden, tmp_path, name):
    """Of float32 weights, since it rounds activations for every other type.

    Run by the Python that QJAX_LLAMA_CPP_PYTHON names, where it is another.
    """
    params = qjax.load(golden / name)
    tree = jax.tree.map(
        lambda leaf: QArray.from_dense(numbers(leaf)) if is_weight(leaf) else leaf,
        params.tree,
        is_leaf=is_weight,
    )
    # Models of some names get other token types from llama.cpp.
    own = {"general.name": "tiny"}
    own |= {} if (golden / name / "tokenizer.json").exists() else NO_TOKENIZER
    file = write(replace(params, tree=tree), tmp_path / "model.gguf", metadata=own)
    ids = np.random.default_rng(0).integers(4, params.config.vocab_size, 24)
    np.save(tmp_path / "ids.npy", ids)
    python = os.environ.get("QJAX_LLAMA_CPP_PYTHON", sys.executable)
    script = [python, "-c", LLAMA_CPP, *(tmp_path / f for f in ("model.gguf", "ids.npy", "o.npy"))]
    subprocess.run(list(map(str, script)), check=True, cwd=Path(python).parent)
    ours = np.asarray(forward(qjax.load(file), ids))
    np.testing.assert_allclose(np.load(tmp_path / "o.npy"), ours, atol=1e-3)
