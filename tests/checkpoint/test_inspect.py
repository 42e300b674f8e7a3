"""Summaries of files whose contents are known from the tools that wrote them."""

import json
import shutil
from dataclasses import replace

import pytest

from qjax.checkpoint.inspect import TypeUse, summarize
from qjax.checkpoint.loader import load
from qjax.errors import CheckpointError
from tests.checkpoint.gguf_bytes import STRING, gguf, pair, tensor


def test_gguf(golden):
    summary = summarize(golden / "gguf-Q4_1")
    assert summary.architecture == "llama"
    assert summary.problem is None
    # Two layers of width 256 with 4 heads, 2 of them for keys and values, of 64; vocabulary of 512.
    layer = 256 * (256 + 128 + 128 + 256) + 3 * 256 * 512
    assert summary.types == (
        TypeUse("q4_1", 15, 2 * layer + 512 * 256, (2 * layer + 512 * 256) // 32 * 20),
        TypeUse("q6_k", 1, 512 * 256, 512 * 210),
        TypeUse("f32", 5, 5 * 256, 5 * 1024),
    )
    assert summary.parameters == 2 * layer + 2 * 512 * 256 + 5 * 256
    assert summary.quantized is not None
    assert {kind.qtype: kind.layers for kind in summary.quantized.kinds} == {"q4_1": 15, "q6_k": 1}
    assert summary.memory == summary.nbytes
    assert summary.nbytes == sum(use.nbytes for use in summary.types)
    assert 5 < summary.bits_per_weight < 6
    assert summary.context_length == 512
    assert summary.kv_bytes_per_token == 2 * 2 * 2 * 64 * 2
    assert summary.cache is not None
    assert (summary.cache.auto, summary.cache.scales) == ("bfloat16", 0)
    # 64 codes and a scale of a head in 2 bytes, for int4 two codes a byte and a zero point too.
    sizes = {"float32": 256, "bfloat16": 128, "fp8_e4m3": 64, "fp8_e5m2": 64}
    sizes |= {"int8": 66, "int4": 35}
    assert summary.cache.bytes_per_token == {d: 2 * 2 * 2 * n for d, n in sizes.items()}
    known = replace(summary, free_memory=summary.nbytes + 10_000)
    assert known.tokens_that_fit == 9
    assert replace(known, free_memory=1000).tokens_that_fit == 0
    assert replace(known, free_memory=None).tokens_that_fit is None


def test_safetensors(golden, tmp_path):
    summary = summarize(golden / "base-tiny-llama")
    assert (summary.architecture, summary.problem) == ("llama", None)
    assert [use.qtype for use in summary.types] == ["bf16"]
    assert summary.bits_per_weight == 16
    config = json.loads((golden / "base-tiny-llama" / "config.json").read_text())
    per_layer = config["num_key_value_heads"] * config["head_dim"]
    assert summary.kv_bytes_per_token == 2 * config["num_hidden_layers"] * per_layer * 2

    shutil.copy(golden / "base-tiny-llama" / "model.safetensors", tmp_path)
    assert "no config.json" in str(summarize(tmp_path).problem)
    (tmp_path / "config.json").write_text('{"model_type": "llama"')
    with pytest.raises(CheckpointError, match=r"config\.json.*not valid JSON"):
        summarize(tmp_path)


def test_quantized_folder(golden):
    folder = golden / "gptq-4b-g32-desc"
    summary = summarize(folder)
    params = load(folder)
    layer = 128 * (128 + 64 + 64 + 128) + 3 * 128 * 256  # as in the base model's config
    assert summary.problem is None
    assert summary.quantized is not None
    assert summary.quantized.method == "gptq"
    assert summary.quantized.settings["bits"] == 4
    (kind,) = summary.quantized.kinds
    assert (kind.layers, kind.qtype, kind.group) == (21, "uint4b8", (1, 32))
    assert set(kind.role.split(", ")) == {f"{name}_proj" for name in "qkvo"} | {
        "gate_proj",
        "up_proj",
        "down_proj",
    }
    # Codes, scales in 2 bytes, and the order of the columns.
    assert kind.nbytes == 3 * (layer // 2 + layer // 32 * 2 + 4 * (6 * 128 + 256))
    assert summary.parameters == sum(use.weights for use in params.summary().uses)
    assert 0.98 <= summary.memory / params.nbytes <= 1.02
    assert kind.kernel in ("native", "xla")
    if kind.kernel == "xla":
        assert kind.refused["native"]


def test_cache_with_scales(golden):
    """Three layers with 2 heads of 32 for keys and values; the scales were made for e4m3."""
    cache = summarize(golden / "ct-fp8-kv8").cache
    assert cache is not None
    assert (cache.auto, cache.scales) == ("fp8_e4m3", 1)
    assert cache.bytes_per_token["fp8_e4m3"] == 3 * 2 * 2 * 32
    assert "fp8_e5m2" not in cache.bytes_per_token


@pytest.mark.parametrize("name", ["ct-fp8-kv8", "gptoss-mxfp4"])
def test_memory_is_what_loading_takes(golden, name):
    """Scales of the cache, experts: what only the loader's own plan finds a place for."""
    summary, params = summarize(golden / name), load(golden / name)
    assert summary.problem is None
    assert 0.98 <= summary.memory / params.nbytes <= 1.02


def test_what_cannot_run_is_still_described(tmp_path):
    path = tmp_path / "m.gguf"
    pairs = [
        pair("general.architecture", STRING, "llamarama"),
        pair("general.license", STRING, "mit"),
    ]
    path.write_bytes(gguf(pairs, [tensor("t", [256, 2], 16, 0)], bytes(132)))
    summary = summarize(path)
    assert summary.types == (TypeUse("iq2_xxs", 1, 512, 132),)
    assert (summary.architecture, summary.license) == ("llamarama", "mit")
    assert "llamarama" in str(summary.problem)
    assert summary.kv_bytes_per_token is None
    assert summary.tokens_that_fit is None
