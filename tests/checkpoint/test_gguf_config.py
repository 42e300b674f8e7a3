"""GGUF metadata as model configs, for what no small checkpoint of the suite has."""

import math

import numpy as np
import pytest

from qjax.checkpoint.gguf_config import gguf_config
from qjax.checkpoint.gguf_io import read_gguf
from qjax.errors import CheckpointError, UnsupportedError
from qjax.models.config import FULL, SLIDING, ModelConfig, model_config
from tests.checkpoint.gguf_bytes import F32, STRING, U32, gguf, pair, tensor

SIZES = {
    "block_count": 4,
    "context_length": 4096,
    "embedding_length": 64,
    "feed_forward_length": 96,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "attention.layer_norm_rms_epsilon": 1e-6,
}


def kind_of(value) -> int:
    return {int: U32, float: F32, str: STRING}[type(value)]


def config_of(folder, architecture: str, keys=None, vectors=None) -> ModelConfig:
    """Writes a GGUF file of an embedding and some vectors, and reads its config."""
    values = {f"{architecture}.{k}": v for k, v in (SIZES | (keys or {})).items() if v is not None}
    values["general.architecture"] = architecture
    arrays = {"token_embd.weight": np.zeros((32, 64), np.float32)}
    arrays |= {name: np.asarray(v, np.float32) for name, v in (vectors or {}).items()}
    entries, data = [], b""
    for name, array in arrays.items():
        entries.append(tensor(name, array.shape[::-1], 0, len(data)))
        data += array.tobytes() + b"\0" * (-array.nbytes % 32)
    file = folder / "model.gguf"
    file.write_bytes(gguf([pair(k, kind_of(v), v) for k, v in values.items()], entries, data))
    with read_gguf(file) as opened:
        config, shown = gguf_config(opened)
        return model_config(config, file=opened.path, shown=shown)


def test_llama(tmp_path):
    config = config_of(tmp_path, "llama", {"rope.freq_base": 5e5, "rope.dimension_count": 16})
    assert (config.model_type, config.vocab_size, config.head_dim) == ("llama", 32, 16)
    assert config.tie_word_embeddings
    assert config.rope_for(FULL).theta == 5e5
    assert config.rope_for(FULL).rope_type == "default"


def test_llama3_bands_arrive_as_factors(tmp_path):
    factors = [1.0, 1.0, 1.0, 2.0, 4.0, 8.0, 8.0, 8.0]
    rope = config_of(tmp_path, "llama", vectors={"rope_freqs.weight": factors}).rope_for(FULL)
    assert rope.short_factor == rope.long_factor == tuple(factors)
    assert rope.attention_factor == 1.0
    assert not rope.depends_on_length


def test_phi3_longrope(tmp_path):
    keys = {"rope.dimension_count": 12, "rope.scaling.original_context_length": 1024}
    keys |= {"rope.scaling.attn_factor": 1.25, "attention.sliding_window": 0}
    vectors = {"rope_factors_short.weight": [1.0] * 6, "rope_factors_long.weight": [4.0] * 6}
    config = config_of(tmp_path, "phi3", keys, vectors)
    rope = config.rope_for(FULL)
    assert (rope.rotary_dim, rope.original_length, rope.attention_factor) == (12, 1024, 1.25)
    assert rope.depends_on_length
    assert config.sliding_window is None


def test_phi3_window(tmp_path):
    config = config_of(tmp_path, "phi3", {"attention.sliding_window": 2047})
    assert [config.window_for(layer) for layer in range(4)] == [2047] * 4


@pytest.mark.parametrize(("extra", "scale"), [({}, 1.0), ({"rope.scaling.attn_factor": 0.5}, 0.5)])
def test_qwen_yarn(tmp_path, extra, scale):
    keys = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, **extra}
    keys["rope.scaling.original_context_length"] = 1024
    rope = config_of(tmp_path, "qwen2", keys).rope_for(FULL)
    assert (rope.rope_type, rope.factor, rope.original_length) == ("yarn", 4.0, 1024)
    assert rope.attention_factor == pytest.approx(scale * (0.1 * math.log(4) + 1))


def test_qwen3_heads_default_to_the_width_and_not_to_transformers_128(tmp_path):
    assert config_of(tmp_path, "qwen3").head_dim == 16


def test_gemma3_pattern_local_rope_and_scaling_of_the_others_only(tmp_path):
    keys = {"block_count": 12, "attention.key_length": 16, "attention.value_length": 16}
    keys |= {"rope.freq_base": 1e6, "rope.scaling.type": "linear", "rope.scaling.factor": 8.0}
    config = config_of(tmp_path, "gemma3", keys | {"attention.sliding_window": 512})
    assert config.layer_types == ((SLIDING,) * 5 + (FULL,)) * 2
    assert (config.rope_for(FULL).theta, config.rope_for(FULL).factor) == (1e6, 8.0)
    assert (config.rope_for(SLIDING).theta, config.rope_for(SLIDING).rope_type) == (1e4, "default")
    assert config.query_scale == 0.25


@pytest.mark.parametrize(("layers", "scale"), [(46, 16**-0.5), (26, 32**-0.5)])
def test_gemma2_27b_scales_queries_by_the_width(tmp_path, layers, scale):
    keys = {"block_count": layers, "attention.key_length": 32, "attention.value_length": 32}
    keys |= {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    config = config_of(tmp_path, "gemma2", keys)
    assert config.query_scale == pytest.approx(scale)
    assert (config.attn_soft_cap, config.final_soft_cap) == (50.0, 30.0)
    assert config.layer_types[:2] == (SLIDING, FULL)


@pytest.mark.parametrize("key", ["block_count", "embedding_length", "attention.head_count"])
def test_missing_keys_have_the_names_of_the_file(tmp_path, key):
    with pytest.raises(CheckpointError, match="missing") as caught:
        config_of(tmp_path, "llama", {key: None})
    assert caught.value.field == f"llama.{key}"


@pytest.mark.parametrize(
    ("keys", "vectors", "field"),
    [
        ({"embedding_length": 62}, None, "llama.attention.head_count"),
        ({"attention.head_count": 2000}, None, "llama.attention.head_count"),
        ({"attention.value_length": 8}, None, "llama.attention.value_length"),
        ({"rope.dimension_count": 32}, None, "llama.rope.dimension_count"),
        ({"rope.scaling.type": "longrope"}, None, "llama.rope.scaling.type"),
        ({"rope.scaling.type": "linear"}, None, "llama.rope.scaling.factor"),
        ({}, {"rope_factors_long.weight": [1.0] * 8}, "rope_factors_short.weight"),
    ],
)
def test_contradictions(tmp_path, keys, vectors, field):
    with pytest.raises(CheckpointError) as caught:
        config_of(tmp_path, "llama", keys, vectors)
    assert caught.value.field == field


def test_factors_of_a_wrong_number(tmp_path):
    with pytest.raises(CheckpointError, match="8 numbers"):
        config_of(tmp_path, "llama", vectors={"rope_freqs.weight": [1.0] * 7})


@pytest.mark.parametrize(
    ("architecture", "keys", "named"),
    [
        ("mamba", {}, "mamba"),
        ("qwen2", {"expert_count": 8}, "expert"),
        ("llama", {"rope.scaling.type": "unheard"}, "unheard"),
    ],
)
def test_unsupported(tmp_path, architecture, keys, named):
    with pytest.raises(UnsupportedError, match=named):
        config_of(tmp_path, architecture, keys)


DEEPSEEK = {
    "attention.q_lora_rank": 20,
    "attention.kv_lora_rank": 24,
    "attention.key_length": 32,
    "attention.key_length_mla": 24,
    "attention.value_length": 24,
    "attention.value_length_mla": 12,
    "rope.dimension_count": 8,
    "leading_dense_block_count": 1,
    "expert_count": 8,
    "expert_used_count": 2,
    "expert_shared_count": 2,
    "expert_feed_forward_length": 16,
    "expert_group_count": 4,
    "expert_group_used_count": 2,
}


def test_deepseek_v2_and_v3(tmp_path):
    """One architecture: the scores of experts tell them apart."""
    v2 = config_of(tmp_path, "deepseek2", DEEPSEEK)
    v3 = config_of(tmp_path, "deepseek2", DEEPSEEK | {"expert_gating_func": 2})
    assert (v2.model_type, v3.model_type) == ("deepseek_v2", "deepseek_v3")
    assert v2.mla
    assert v2.moe
    assert v3.moe
    assert (v2.mla.qk_nope_head_dim, v2.mla.qk_rope_head_dim, v2.mla.v_head_dim) == (16, 8, 12)
    assert v2.moe.layers == (False, True, True, True)
    assert (v2.moe.intermediate_size, v2.moe.shared_size) == (16, 32)
    assert (v2.moe.router.num_groups, v2.moe.router.top_groups) == (4, 2)
    assert (v2.moe.router.scoring, v3.moe.router.scoring) == ("softmax", "sigmoid")
    assert (v2.moe.router.correction_bias, v3.moe.router.correction_bias) == (False, True)
    # Keys and values made by one matrix: without it, the cache is that of one latent head.
    assert (v2.num_kv_heads, v2.head_dim) == (4, 24)
    split = config_of(tmp_path, "deepseek2", DEEPSEEK, {"blk.0.attn_k_b.weight": np.ones(1)})
    assert (split.num_kv_heads, split.head_dim, split.query_scale) == (1, 32, 24**-0.5)


@pytest.mark.parametrize(
    ("keys", "error"),
    [
        ({"expert_gating_func": 3}, UnsupportedError),
        ({"attention.kv_lora_rank": None}, CheckpointError),
        ({"expert_feed_forward_length": None}, CheckpointError),
        ({"attention.key_length_mla": 8}, CheckpointError),
        ({"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}, CheckpointError),
    ],
)
def test_deepseek_that_contradicts_itself(tmp_path, keys, error):
    with pytest.raises(error, match="deepseek2"):
        config_of(tmp_path, "deepseek2", DEEPSEEK | keys)
