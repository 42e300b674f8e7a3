"""Models of GGUF files as folders that Hugging Face's tools read: weights, config, tokenizer."""

import json
import warnings

import numpy as np
import pytest

import qjax
from qjax.checkpoint import saver
from qjax.checkpoint.gguf_io import GGUFFile, read_gguf
from qjax.checkpoint.hf_config import hf_config
from qjax.checkpoint.loader import load
from qjax.checkpoint.tokenizer_json import write_tokenizer
from qjax.errors import CheckpointError, UnsupportedError
from tests.checkpoint.test_save_by_name import same_numbers, stored

# Their bases of the hub's kind, where these lie here too.
MODELS = {
    "gguf-Q4_1": None,
    "gguf-gemma3-Q5_0": "base-tiny-gemma3",
    "gguf-qwen2-Q4_0": "base-tiny-qwen2",
    "gguf-mixtral-F32": None,
    "gguf-gptoss-F32": None,
    "gguf-qwen2moe-F32": None,
}


@pytest.mark.parametrize("name", MODELS)
def test_the_same_model(name, golden, tmp_path):
    """Norms of Gemma less one, experts one by one, gate and up of gpt-oss in turn."""
    params = load(golden / name)
    saved = saver.save(params, tmp_path / "saved", "safetensors")
    assert not saved.rounded
    found = load(tmp_path / "saved")
    assert same_numbers(found, params)
    assert found.config == params.config
    base = MODELS[name]
    if base is not None:
        theirs = {n: (dtype, shape) for n, (dtype, shape, _) in stored(golden / base).items()}
        ours = {n: ("BF16", shape) for n, (_, shape, _) in stored(tmp_path / "saved").items()}
        assert ours == theirs
        fields = json.loads((golden / base / "config.json").read_text())
        written = json.loads((tmp_path / "saved" / "config.json").read_text())
        for key in ("architectures", "model_type", "eos_token_id", "bos_token_id"):
            assert written.get(key) == fields.get(key), key


def test_names_of_experts(golden, tmp_path):
    qjax.save(load(golden / "gguf-mixtral-F32"), tmp_path / "a", "dense", dtype="bfloat16")
    tensors = stored(tmp_path / "a")
    name = "model.layers.1.block_sparse_moe.experts.5.w2.weight"
    assert tensors[name][:2] == ("BF16", (32, 32))
    assert "model.layers.0.block_sparse_moe.gate.weight" in tensors
    qjax.save(load(golden / "gguf-gptoss-F32"), tmp_path / "b", "dense")
    tensors = stored(tmp_path / "b")
    name = "model.layers.0.mlp.experts.gate_up_proj"
    assert tensors[name][:2] == ("F32", (6, 32, 64))  # columns before rows
    assert tensors[f"{name}_bias"][:2] == ("F32", (6, 64))
    assert tensors["model.layers.0.self_attn.sinks"][:2] == ("F32", (4,))


def test_blocks_of_integers_are_codes_of_other_formats(golden, tmp_path):
    """Q4_0 and Q8_0 are what others call symmetric groups of 32 with float16 scales."""
    params = load(golden / "gguf-qwen2-Q4_0")
    with pytest.raises(UnsupportedError, match=r"embed_tokens: GPTQ.*dense=\['model\.embed_tokens"):
        qjax.save(params, tmp_path / "a", "gptq")
    for method in ("gptq", "awq", "compressed-tensors"):
        saved = saver.save(params, tmp_path / method, method, dense=["Embedding"])
        assert not saved.rounded
        assert same_numbers(load(saved.folder), params)
    config = json.loads((tmp_path / "gptq" / "config.json").read_text())["quantization_config"]
    assert (config["bits"], config["group_size"], config["sym"]) == (4, 32, True)


def test_what_stays_gguf(golden, tmp_path):
    params = load(golden / "gguf-Q2_K")
    with pytest.raises(UnsupportedError, match=r"q6_k.*could be saved as: gguf, safetensors"):
        qjax.save(params, tmp_path / "a", "compressed-tensors")
    with pytest.raises(UnsupportedError, match=r"end in \.gguf"):
        qjax.save(params, tmp_path / "a")
    file = qjax.save(params, tmp_path / "a.gguf")
    assert same_numbers(load(file), params)
    with pytest.raises(CheckpointError, match="nothing written"):
        qjax.save(params, file)
    with pytest.raises(UnsupportedError, match=r"deepseek_v3.*cannot be saved"):
        qjax.save(load(golden / "gguf-deepseek-v3-F32"), tmp_path / "b", "dense")


def test_bands_of_llama_3_by_their_name():
    """The factors that llama.cpp's converter stores for Llama 3.2: divisors of frequencies."""
    frequencies = 500_000.0 ** -(np.arange(0, 64, 2) / 64)
    wavelengths = 2 * np.pi / frequencies
    smooth = np.clip((8192 / wavelengths - 1) / 3, 0, 1)
    factors = 1 / (smooth + (1 - smooth) / 32)
    fields = config_with(factors.astype(np.float32))
    assert fields["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    assert config_with(np.full(32, 2, np.float32))["rope_scaling"]["rope_type"] == "longrope"


def config_with(factors: np.ndarray) -> dict:
    tokens = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": list("ab")}
    sizes = {"block_count": 1, "embedding_length": 128, "feed_forward_length": 128,
             "attention.head_count": 2, "attention.layer_norm_rms_epsilon": 1e-5,
             "rope.freq_base": 500_000.0, "context_length": 131_072}  # fmt: skip
    metadata = {f"llama.{key}": value for key, value in sizes.items()}

    class File(GGUFFile):
        def array(self, name: str) -> np.ndarray:
            return factors

    from qjax.checkpoint.mapped import TensorRecord

    shapes = {"token_embd.weight": (2, 128), "rope_freqs.weight": (32,)}
    tensors = {n: TensorRecord(n, "f32", s, "some.gguf", 0, 0) for n, s in shapes.items()}
    return hf_config(
        File("some.gguf", {}, tensors, {"general.architecture": "llama"} | metadata | tokens)
    )


@pytest.fixture(scope="module")
def torture(golden) -> dict:
    return json.loads((golden / "tokenizer_torture.json").read_text("utf-8"))


def library(folder):
    """The tokenizer that transformers makes of a folder, as a function from text to ids."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own, about what is not installed
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("name", ["gguf-Q4_1", "spm-bpe", "unigram"])
def test_transformers_reads_the_tokenizer(name, torture, golden, tmp_path):
    """The ids that other tools give to awkward texts; the template, and where a text begins."""
    if name == "gguf-Q4_1":
        with read_gguf(golden / name / "model.gguf") as file:
            write_tokenizer(file, tmp_path)
    else:
        kind = {"spm-bpe": "llama", "unigram": "t5"}[name]
        vocabulary = torture["vocabularies"][name]
        fields = {"tokens": vocabulary["tokens"], "scores": np.array(vocabulary["scores"])}
        fields |= {"token_type": np.array(vocabulary["types"])}
        fields |= {"model": kind, "bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0}
        fields |= {"remove_extra_whitespaces": True} if name == "unigram" else {}
        metadata = {f"tokenizer.ggml.{key}": value for key, value in fields.items()}
        write_tokenizer(GGUFFile("some.gguf", {}, {}, metadata), tmp_path)
    tokenizer = library(tmp_path)
    for text, ids in zip(torture["texts"], torture["ids"][name], strict=True):
        if ids is not None:
            assert tokenizer.encode(text, add_special_tokens=False) == ids, repr(text)
    if name == "gguf-Q4_1":
        assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")
        message = [{"role": "user", "content": "Hi"}]
        text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    elif name == "spm-bpe":
        assert tokenizer.encode("a")[0] == 1  # SentencePiece's models begin with <s>
