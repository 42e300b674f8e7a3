"""GGUF metadata as a Hugging Face config dict, for the one reader that serves both.

GGUF leaves out what llama.cpp knows by heart: Gemma's layer pattern, the query scale of its 27B
models, and Llama 3's rope bands, which arrive as a tensor of factors. These are filled in here.
"""

from __future__ import annotations

import math
from typing import Any

from qjax.checkpoint.gguf_deepseek import deepseek_config, yarn_fields
from qjax.checkpoint.gguf_io import GGUFFile
from qjax.errors import CheckpointError, UnsupportedError
from qjax.models.fields import Fields

# GGUF architecture -> model_type. Mistral files say "llama", and so do those of Mixtral.
ARCHITECTURES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen2moe": "qwen2_moe",
    "qwen3moe": "qwen3_moe",
    "deepseek2": "deepseek_v2",
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
    "phi3": "phi3",
    "gpt-oss": "gpt_oss",
}

# Hugging Face field -> GGUF key below the architecture.
_KEYS = {
    "num_hidden_layers": "block_count",
    "max_position_embeddings": "context_length",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "num_local_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
    "moe_intermediate_size": "expert_feed_forward_length",
    "shared_expert_intermediate_size": "expert_shared_feed_forward_length",
    "head_dim": "attention.key_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "sliding_window": "attention.sliding_window",
    "sliding_window_pattern": "attention.sliding_window_pattern",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "rope_theta": "rope.freq_base",
    "rope_local_base_freq": "rope.freq_base_swa",
}
_REQUIRED = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads")

# The models that scale queries by hidden_size / num_heads, by their number of layers.
_WIDE_QUERY_LAYERS = {"gemma2": 46, "gemma3_text": 62}

# Tensors that say what the model is; the loader does not look for a place for them.
ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight")


def gguf_config(gguf: GGUFFile) -> tuple[dict[str, Any], dict[str, str]]:
    """Reads what a GGUF file says about its model.

    Returns:
      (config, shown): a dict like `config.json`, and for its fields the keys in the file, for error
      messages.

    Raises:
      CheckpointError: a key or the embedding is missing, or a value is out of range.
      UnsupportedError: the architecture is not one that qjax runs.
    """
    fields = Fields(gguf.metadata, gguf.path)
    architecture = fields.text("general.architecture")
    if architecture not in ARCHITECTURES:
        raise UnsupportedError(
            f"{gguf.path}: general.architecture {architecture!r:.80} is not supported; "
            f"supported are {', '.join(ARCHITECTURES)}"
        )
    model_type = ARCHITECTURES[architecture]
    shown = {field: f"{architecture}.{key}" for field, key in _KEYS.items()}
    for field in _REQUIRED:
        fields.get(shown[field])
    config = {field: fields.get(key, None) for field, key in shown.items()}
    if model_type == "llama" and config["num_local_experts"]:
        model_type = "mixtral"
    config["model_type"] = model_type
    config["vocab_size"] = _vocab_size(gguf)
    config["norm_topk_prob"] = model_type == "qwen3_moe"  # files of Qwen's do not say
    config["tie_word_embeddings"] = "output.weight" not in gguf.tensors
    config["attention_bias"] = config["qkv_bias"] = "blk.0.attn_q.bias" in gguf.tensors
    config["mlp_bias"] = "blk.0.ffn_gate.bias" in gguf.tensors
    config["rope_scaling"] = _rope_scaling(gguf, fields, f"{architecture}.rope.scaling.")
    if architecture == "deepseek2":
        del config["num_local_experts"]
        further, names = deepseek_config(gguf, f"{architecture}.")
        return config | further, shown | names

    hidden_size = fields.integer(shown["hidden_size"], 1, 1 << 24)
    num_heads = fields.integer(shown["num_attention_heads"], 1, 1024)
    head_dim = fields.integer(shown["head_dim"], 1, 4096, max(hidden_size // num_heads, 1))
    value_length = fields.integer(f"{architecture}.attention.value_length", 1, 4096, head_dim)
    if value_length != head_dim:
        raise fields.error(
            f"{architecture}.attention.value_length", f"is {value_length}, keys have {head_dim}"
        )
    if config["head_dim"] is not None or hidden_size % num_heads == 0:
        config["head_dim"] = head_dim
    wide = fields.get(shown["num_hidden_layers"]) == _WIDE_QUERY_LAYERS.get(model_type)
    config["query_pre_attn_scalar"] = hidden_size // num_heads if wide else head_dim
    if config["sliding_window"] == 0:  # Phi-3's way to say none
        config["sliding_window"] = None

    rotary_dim = fields.integer(f"{architecture}.rope.dimension_count", 1, head_dim, head_dim)
    config["partial_rotary_factor"] = rotary_dim / head_dim
    return config, shown


def _vocab_size(gguf: GGUFFile) -> int:
    name = "token_embd.weight"
    if name not in gguf.tensors:
        raise CheckpointError("tensor is missing", file=gguf.path, field=name)
    return gguf.tensors[name].shape[0]


def _rope_scaling(gguf: GGUFFile, fields: Fields, prefix: str) -> dict[str, Any] | None:
    kind = fields.text(prefix + "type", "none")
    if kind not in ("none", "linear", "yarn", "longrope"):
        raise UnsupportedError(
            f"{gguf.path}: {prefix}type {kind!r:.80} is not supported; supported are none, linear, "
            "yarn, longrope"
        )
    short, long = _factors(gguf)
    if short is not None:
        if kind in ("linear", "yarn"):
            raise UnsupportedError(f"{gguf.path}: {prefix}type {kind} beside tensors of factors")
        return {
            "rope_type": "longrope",
            "short_factor": short,
            "long_factor": long,
            "original_max_position_embeddings": fields.get(
                prefix + "original_context_length", None
            ),
            "attention_factor": fields.get(prefix + "attn_factor", 1.0),
        }
    if kind == "longrope":
        raise fields.error(prefix + "type", f"is longrope, but {ROPE_TENSORS[1]} is missing")
    if kind == "none":
        return None
    factor = fields.number(prefix + "factor", 0, 1e6)
    if kind == "linear":
        return {"rope_type": kind, "factor": factor}
    grown = 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
    return {
        "rope_type": kind,
        "factor": factor,
        "original_max_position_embeddings": fields.get(prefix + "original_context_length", None),
        "attention_factor": grown * fields.number(prefix + "attn_factor", 0, 1e6, 1.0),
        **(yarn_fields(fields, prefix) if prefix.startswith("deepseek2.") else {}),
        "beta_fast": fields.get(prefix + "yarn_beta_fast", None),
        "beta_slow": fields.get(prefix + "yarn_beta_slow", None),
    }


def _factors(gguf: GGUFFile) -> tuple[list[float] | None, list[float] | None]:
    """Divisors of the inverse frequencies for short and long sequences."""
    everywhere, short, long = (
        gguf.array(name).ravel().tolist() if name in gguf.tensors else None for name in ROPE_TENSORS
    )
    if everywhere is not None:
        return everywhere, everywhere
    if (short is None) != (long is None):
        missing = ROPE_TENSORS[1] if short is None else ROPE_TENSORS[2]
        raise CheckpointError("tensor is missing", file=gguf.path, field=missing)
    return short, long
