"""What a GGUF file says of its model, made from a `ModelConfig`: the way back of `gguf_config`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from qjax.checkpoint.gguf_config import ROPE_TENSORS
from qjax.checkpoint.gguf_deepseek import deepseek_metadata
from qjax.errors import UnsupportedError
from qjax.models.config import FULL, SLIDING, ModelConfig

if TYPE_CHECKING:
    from qjax.layers.rope import RopeConfig

# model_type -> architecture.
ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "mixtral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "phi3": "phi3",
    "gpt_oss": "gpt-oss",
    "deepseek_v2": "deepseek2",
    "deepseek_v3": "deepseek2",
}
# llama.cpp's numbers for mixes of types (llama.h, llama_ftype), as "general.file_type" has them.
FILE_TYPES = {
    "F32": 0,
    "F16": 1,
    "Q4_0": 2,
    "Q4_1": 3,
    "Q8_0": 7,
    "Q5_0": 8,
    "Q5_1": 9,
    "Q2_K": 10,
    "Q3_K_S": 11,
    "Q3_K_M": 12,
    "Q3_K_L": 13,
    "Q4_K_S": 14,
    "Q4_K_M": 15,
    "Q5_K_S": 16,
    "Q5_K_M": 17,
    "Q6_K": 18,
    "IQ2_XXS": 19,
    "IQ2_XS": 20,
    "Q2_K_S": 21,
    "IQ3_XS": 22,
    "IQ3_XXS": 23,
    "IQ1_S": 24,
    "IQ4_NL": 25,
    "IQ3_S": 26,
    "IQ3_M": 27,
    "IQ2_S": 28,
    "IQ2_M": 29,
    "IQ4_XS": 30,
    "IQ1_M": 31,
    "BF16": 32,
    "TQ1_0": 36,
    "TQ2_0": 37,
    "MXFP4_MOE": 38,
    "NVFP4": 39,
    "Q1_0": 40,
    "Q2_0": 41,
}

# The length of the runs of layers whose last one sees everything, as llama.cpp knows it by heart.
_PERIODS = {"gemma2": 2, "gemma3_text": 6, "gpt_oss": 2}


def model_metadata(config: ModelConfig) -> dict[str, Any]:
    """The keys below "<architecture>." and the architecture itself.

    Raises:
      UnsupportedError: a model that GGUF files do not describe so.
    """
    if config.model_type not in ARCHITECTURES:
        raise UnsupportedError(
            f"GGUF files of {config.model_type} are not written; those of these models are: "
            f"{', '.join(ARCHITECTURES)}"
        )
    architecture = ARCHITECTURES[config.model_type]
    fields: dict[str, Any] = {
        "block_count": config.num_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "vocab_size": config.vocab_size,
    }
    fields |= _window(config) | _rope(config)
    fields |= _experts(config) if config.mla is None else deepseek_metadata(config)
    if config.attn_soft_cap is not None:
        fields["attn_logit_softcapping"] = float(config.attn_soft_cap)
    if config.final_soft_cap is not None:
        fields["final_logit_softcapping"] = float(config.final_soft_cap)
    if config.mla is None:
        _check_query_scale(config)
    described = {f"{architecture}.{key}": value for key, value in fields.items()}
    return {"general.architecture": architecture} | described


def file_type(stored: Mapping[str, tuple[str, int]]) -> int:
    """The number of the mix that a file seems to be.

    Args:
      stored: type and bytes of each matrix, by its name.
    """
    nbytes: Counter[str] = Counter()
    of_part: dict[str, set[str]] = {}
    for name, (qtype, size) in stored.items():
        nbytes[qtype] += size
        of_part.setdefault(name.split(".")[-2], set()).add(qtype)
    most = nbytes.most_common(1)[0][0].upper()
    letter = "S"
    if most == "Q3_K":
        larger = {"q4_k": "M", "q5_k": "L"}
        letter = next((larger[q] for q in of_part.get("attn_output", ()) if q in larger), "S")
    elif "q6_k" in of_part.get("attn_v", set()) | of_part.get("ffn_down", set()):
        letter = "M"
    names = (most, f"{most}_{letter}", f"{most}_MOE")
    return next(FILE_TYPES[name] for name in names if name in FILE_TYPES)


def rope_tensors(config: ModelConfig) -> dict[str, np.ndarray]:
    """Tensors of divisors of rope's frequencies, float32, which some extensions are told by."""
    kind = FULL if FULL in dict(config.rope) else SLIDING
    rope = config.rope_for(kind)
    everywhere, short, long = ROPE_TENSORS
    if rope.rope_type == "llama3":
        return {everywhere: config.frequency_divisors(kind).astype(np.float32)}
    if rope.rope_type == "longrope":
        return {
            long: np.asarray(rope.long_factor, np.float32),
            short: np.asarray(rope.short_factor, np.float32),
        }
    return {}


def _window(config: ModelConfig) -> dict[str, Any]:
    window = config.sliding_window
    if window is None:
        return {}
    if config.model_type == "mistral":  # has none in llama.cpp: it may not see further than one
        return {"context_length": min(window, config.max_position_embeddings)}
    if config.model_type == "phi3":
        return {"attention.sliding_window": window}
    usual = _PERIODS.get(config.model_type, 1)
    periods = (usual,) if config.model_type != "gemma3_text" else (usual, *range(2, 513))
    for period in periods:
        runs = tuple(SLIDING if (i + 1) % period else FULL for i in range(config.num_layers))
        if runs == config.layer_types:
            own = {} if period == usual else {"attention.sliding_window_pattern": period}
            return {"attention.sliding_window": window} | own
    raise UnsupportedError(
        f"GGUF files of {config.model_type} cannot say which layers have a sliding window here"
    )


def _rope(config: ModelConfig) -> dict[str, Any]:
    ropes = dict(config.rope)
    rope = ropes.get(FULL) or ropes[SLIDING]
    fields: dict[str, Any] = {
        "rope.dimension_count": rope.rotary_dim,
        "rope.freq_base": float(rope.theta),
    }
    if config.model_type == "gemma3_text" and SLIDING in ropes:
        fields["rope.freq_base_swa"] = float(ropes[SLIDING].theta)
    elif len({*ropes.values()}) > 1:
        raise UnsupportedError(f"GGUF files of {config.model_type} have one rope for all layers")
    return fields | _scaling(rope)


def _scaling(rope: RopeConfig) -> dict[str, Any]:
    if rope.rope_type in ("default", "llama3"):
        return {}
    if rope.rope_type not in ("linear", "yarn", "longrope"):
        raise UnsupportedError(f"GGUF files cannot say that rope is of the type {rope.rope_type}")
    prefix = "rope.scaling."
    if rope.rope_type == "longrope":
        return {
            prefix + "original_context_length": rope.original_length,
            prefix + "attn_factor": float(rope.attention_factor),
        }
    fields: dict[str, Any] = {
        prefix + "type": rope.rope_type,
        prefix + "factor": float(rope.factor),
    }
    if rope.rope_type == "linear":
        return fields
    grown = 0.1 * np.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0
    return fields | {
        prefix + "original_context_length": rope.original_length,
        prefix + "attn_factor": float(rope.attention_factor / grown),
        prefix + "yarn_beta_fast": float(rope.beta_fast),
        prefix + "yarn_beta_slow": float(rope.beta_slow),
    }


def _experts(config: ModelConfig) -> dict[str, Any]:
    moe = config.moe
    if moe is None:
        return {}
    if not all(moe.layers):
        raise UnsupportedError(
            f"GGUF files of {config.model_type} have experts in every layer; here some have none"
        )
    if moe.router.normalize != (config.model_type != "qwen2_moe"):
        raise UnsupportedError(
            f"GGUF files of {config.model_type} cannot say whether the weights of the chosen "
            "experts are divided by their sum as here"
        )
    fields: dict[str, Any] = {
        "expert_count": moe.router.num_experts,
        "expert_used_count": moe.router.top_k,
    }
    if config.model_type != "mixtral":
        fields["expert_feed_forward_length"] = moe.intermediate_size
    if moe.shared_size:
        fields["expert_shared_feed_forward_length"] = moe.shared_size
    return fields


def _check_query_scale(config: ModelConfig) -> None:
    """llama.cpp knows by heart what queries are scaled by."""
    wide = {"gemma2": 46, "gemma3_text": 62}.get(config.model_type) == config.num_layers
    width = config.hidden_size // config.num_heads if wide else config.head_dim
    if abs(config.query_scale - width**-0.5) > 1e-6 * config.query_scale:
        raise UnsupportedError(
            f"GGUF files of {config.model_type} with {config.num_layers} layers scale queries by "
            f"{width} ** -0.5, this model by {config.query_scale:.6g}"
        )
