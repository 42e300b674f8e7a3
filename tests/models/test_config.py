"""Configs as Hugging Face writes them, and configs that nobody should believe."""

import math
import subprocess
import sys

import pytest

from qjax.errors import CheckpointError, UnsupportedError
from qjax.models import config as configs
from qjax.models.config import FULL, SLIDING, model_config, register_model_type

SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def config_of(model_type: str, **fields):
    return model_config({"model_type": model_type, **SIZES, **fields}, file="config.json")


def test_llama():
    config = config_of("llama", rms_norm_eps=1e-5, rope_theta=5e5, max_position_embeddings=8192)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (4, 2, 16)
    assert config.query_scale == 0.25
    assert config.layer_types == (FULL,) * 4
    assert config.rope_for(FULL).theta == 5e5
    assert config.rope_for(FULL).rotary_dim == 16
    assert not config.tie_word_embeddings
    assert not config.attention_bias
    assert not config.qk_norm
    assert hash(config) == hash(
        config_of("llama", rms_norm_eps=1e-5, rope_theta=5e5, max_position_embeddings=8192)
    )


def test_old_and_new_rope_keys_mean_the_same():
    scaling = {"rope_type": "linear", "factor": 2.0}
    old = config_of("llama", rope_theta=1e5, rope_scaling=scaling, torch_dtype="bfloat16")
    new = config_of("llama", rope_parameters={"rope_theta": 1e5, **scaling}, dtype="bfloat16")
    assert old == new
    assert old.rope_for(FULL).factor == 2.0


def test_head_count_of_kv_defaults_to_that_of_queries():
    assert config_of("llama", num_key_value_heads=None).num_kv_heads == 4


def test_biases():
    llama = config_of("llama", attention_bias=True, mlp_bias=True)
    assert (llama.attention_bias, llama.attention_output_bias, llama.mlp_bias) == (True, True, True)
    qwen2 = config_of("qwen2")
    assert (qwen2.attention_bias, qwen2.attention_output_bias) == (True, False)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [({}, 4096), ({"sliding_window": None}, None), ({"sliding_window": 32}, 32)],
)
def test_mistral_window(fields, expected):
    config = config_of("mistral", **fields)
    assert [config.window_for(layer) for layer in range(4)] == [expected] * 4


def test_qwen_windows_only_when_switched_on():
    fields = {"sliding_window": 32, "max_window_layers": 3}
    off = config_of("qwen3", use_sliding_window=False, **fields)
    on = config_of("qwen3", use_sliding_window=True, **fields)
    assert off.layer_types == (FULL,) * 4
    assert off.sliding_window is None
    assert on.layer_types == (FULL, FULL, FULL, SLIDING)
    assert on.qk_norm
    assert on.head_dim == 128


def test_gemma2():
    config = config_of("gemma2", head_dim=16, query_pre_attn_scalar=64)
    assert config.layer_types == (SLIDING, FULL, SLIDING, FULL)
    assert (config.attn_soft_cap, config.final_soft_cap) == (50.0, 30.0)
    assert config.query_scale == 0.125
    assert config.embedding_scale == 8.0
    assert config.hidden_act == "gelu_tanh"
    assert config.post_norms
    assert config.tie_word_embeddings
    assert not config.qk_norm
    assert config_of("gemma2", head_dim=16, final_logit_softcapping=None).final_soft_cap is None


def test_gemma3_inside_a_multimodal_config():
    # The published 4B file names little more than this; the rest are defaults of its class.
    text = {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 12}
    text |= {"sliding_window": 1024, "rope_scaling": {"factor": 8.0, "rope_type": "linear"}}
    config = model_config({"model_type": "gemma3", "text_config": text, "vision_config": {}})
    assert config.model_type == "gemma3_text"
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (8, 4, 256)
    assert config.vocab_size == 262_208
    assert config.layer_types == ((SLIDING,) * 5 + (FULL,)) * 2
    full, sliding = config.rope_for(FULL), config.rope_for(SLIDING)
    assert (full.theta, full.rope_type, full.factor) == (1e6, "linear", 8.0)
    assert (sliding.theta, sliding.rope_type) == (1e4, "default")
    assert config.qk_norm
    assert config.attn_soft_cap is None


def test_gemma3_rope_by_layer_type():
    rope = {SLIDING: {"rope_theta": 2e4, "rope_type": "default"}, FULL: {"rope_theta": 3e6}}
    config = config_of("gemma3_text", layer_types=[SLIDING, FULL, FULL, FULL], rope_parameters=rope)
    assert config.rope_for(SLIDING).theta == 2e4
    assert config.rope_for(FULL).theta == 3e6
    assert [config.window_for(layer) for layer in range(4)] == [4096, None, None, None]


def test_phi3_partial_rotation_and_original_length_outside_the_section():
    scaling = {"type": "su", "short_factor": [1.0] * 6, "long_factor": [2.0] * 6}
    config = config_of(
        "phi3",
        partial_rotary_factor=0.75,
        rope_scaling=scaling,
        original_max_position_embeddings=1024,
        max_position_embeddings=4096,
    )
    rope = config.rope_for(FULL)
    assert (rope.rotary_dim, rope.rope_type, rope.original_length) == (12, "longrope", 1024)
    assert rope.attention_factor == pytest.approx(math.sqrt(1 + math.log(4) / math.log(1024)))


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"model_type": "mamba"}, "mamba"),
        ({"hidden_act": "relu"}, "relu"),
        ({"rope_scaling": {"type": "mrope"}}, "mrope"),
        ({"layer_types": ["chunked_attention"] * 4}, "chunked_attention"),
        ({"num_local_experts": 8}, "num_local_experts"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ],
)
def test_unsupported_names_the_value(fields, named):
    with pytest.raises(UnsupportedError, match=named) as caught:
        config_of(fields.pop("model_type", "llama"), **fields)
    assert "config.json" in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_attention_heads", 0),
        ("num_attention_heads", -4),
        ("num_attention_heads", 4.0),
        ("num_attention_heads", "4"),
        ("num_attention_heads", True),
        ("num_attention_heads", 6),
        pytest.param("num_attention_heads", 10**5000, id="huge"),
        ("num_key_value_heads", 3),
        ("num_key_value_heads", [2, 2]),
        ("num_hidden_layers", 513),
        ("num_hidden_layers", None),
        ("hidden_size", 1 << 40),
        ("vocab_size", 0),
        ("intermediate_size", {}),
        ("head_dim", 0),
        ("rms_norm_eps", math.nan),
        ("rms_norm_eps", -1e-6),
        ("rms_norm_eps", "1e-6"),
        pytest.param("rms_norm_eps", 10**4000, id="no-float"),
        ("max_position_embeddings", 1 << 40),
        ("rope_theta", math.inf),
        ("rope_theta", 0),
        ("partial_rotary_factor", 0.2),
        ("tie_word_embeddings", "yes"),
        ("hidden_act", 7),
        ("layer_types", [FULL]),
        ("layer_types", [SLIDING] * 4),
        pytest.param("layer_types", [10**4000] * 4, id="unprintable-names"),
        pytest.param("hidden_act", [10**4500], id="unprintable"),
    ],
)
def test_hostile_values_name_file_and_field(field, value):
    with pytest.raises(CheckpointError) as caught:
        config_of("llama", **{field: value})
    assert caught.value.file == "config.json"
    assert caught.value.field == field
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("scaling", "field"),
    [
        ({"type": "linear"}, "rope_scaling.factor"),
        ({"type": "linear", "factor": -1}, "rope_scaling.factor"),
        ({"type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4},
         "rope_scaling.high_freq_factor"),
        ({"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]},
         "rope_scaling.short_factor"),
        ({"type": "yarn", "factor": 4, "beta_fast": math.nan}, "rope_scaling.beta_fast"),
        ("linear", "rope_scaling"),
    ],
)  # fmt: skip
def test_hostile_rope_sections(scaling, field):
    with pytest.raises(CheckpointError) as caught:
        config_of("llama", rope_scaling=scaling)
    assert caught.value.field == field


def test_a_model_type_is_needed():
    with pytest.raises(CheckpointError, match="model_type"):
        model_config(SIZES)


def test_reading_a_config_takes_no_model_library():
    code = "import sys, qjax.models.config; print('flax' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"


def test_model_types_may_be_registered(monkeypatch):
    monkeypatch.setattr(configs, "_readers", {})
    with pytest.raises(UnsupportedError, match="'seed_oss' is not supported"):
        config_of("seed_oss")

    @register_model_type("seed_oss")
    def seed_oss(config, file):
        assert file == "config.json"
        return model_config({**config, "model_type": "qwen2"}, file=file)

    assert config_of("seed_oss", rope_theta=1e7) == config_of("qwen2", rope_theta=1e7)
    with pytest.raises(UnsupportedError, match=r"phi3.*seed_oss"):
        config_of("another")
    with pytest.raises(ValueError, match="'gemma3' is one that qjax reads itself"):
        register_model_type("gemma3")
