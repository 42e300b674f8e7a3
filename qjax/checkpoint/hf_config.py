"""config.json of a model that comes of a GGUF file, as its Hugging Face class reads it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from qjax.checkpoint.gguf_config import gguf_config
from qjax.checkpoint.gguf_io import GGUFFile
from qjax.checkpoint.tokenizer_gguf import GGUFVocabulary
from qjax.errors import UnsupportedError
from qjax.models.config import SLIDING, ModelConfig, model_config

_CLASSES = {
    "llama": "LlamaForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "gpt_oss": "GptOssForCausalLM",
}
_GEMMA = ("gemma2", "gemma3_text")
# Models whose class calls the number of experts so.
_NUM_EXPERTS = ("qwen2_moe", "qwen3_moe")
# Llama 3.1, 3.2 and 3.3: (factor, low_freq_factor, high_freq_factor, original length).
_LLAMA3 = ((8.0, 1.0, 4.0, 8192), (32.0, 1.0, 4.0, 8192))


def hf_config(gguf: GGUFFile) -> dict[str, Any]:
    """The fields of a config.json.

    Raises:
      UnsupportedError: no Hugging Face class has such a model; or its config could not say what it
        is.
    """
    read, shown = gguf_config(gguf)
    config = model_config(read, file=gguf.path, shown=shown)
    model_type = config.model_type
    if model_type not in _CLASSES:
        raise UnsupportedError(f"{gguf.path}: a {model_type} is not saved but as GGUF")
    fields: dict[str, Any] = {"architectures": [_CLASSES[model_type]]}
    fields |= {key: value for key, value in read.items() if value is not None}
    fields |= {"torch_dtype": "float32", "dtype": "float32", **_tokens(gguf)}
    fields["hidden_activation" if model_type in _GEMMA else "hidden_act"] = (
        "gelu_pytorch_tanh" if model_type in _GEMMA else "silu"
    )
    if model_type in _NUM_EXPERTS and "num_local_experts" in fields:
        fields["num_experts"] = fields.pop("num_local_experts")
    if fields.get("partial_rotary_factor") == 1.0:
        del fields["partial_rotary_factor"]
    if SLIDING in config.layer_types:
        fields["layer_types"] = list(config.layer_types)
        fields.pop("sliding_window_pattern", None)
    others = {
        "query_pre_attn_scalar": model_type in _GEMMA,
        "norm_topk_prob": config.moe is not None,
        "qkv_bias": model_type == "qwen2_moe",
    }
    fields = {key: value for key, value in fields.items() if others.get(key, True)}
    if "rope_scaling" in fields:
        fields |= _rope_scaling(config, fields)
    _require_same(config, fields, gguf.path)
    return fields


def _tokens(gguf: GGUFFile) -> dict[str, Any]:
    vocabulary = GGUFVocabulary(gguf.metadata, gguf.path)
    pad = gguf.metadata.get("tokenizer.ggml.padding_token_id", vocabulary.eos_id)
    named = {"bos": vocabulary.bos_id, "eos": vocabulary.eos_id, "pad": pad}
    return {f"{name}_token_id": found for name, found in named.items()}


def _rope_scaling(config: ModelConfig, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The section, with Llama 3's bands by their own name where the divisors are theirs."""
    kept = {key: value for key, value in fields["rope_scaling"].items() if value is not None}
    kind = config.layer_types[-1]
    for factor, low, high, length in _LLAMA3:
        bands = {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": low,
            "high_freq_factor": high,
            "original_max_position_embeddings": length,
        }
        found = model_config({**fields, "rope_scaling": bands}).frequency_divisors(kind)
        everywhere = kept.get("short_factor") == kept.get("long_factor")
        if everywhere and np.allclose(found, config.frequency_divisors(kind), rtol=1e-5, atol=0):
            return {"rope_scaling": bands}
    length = kept.get("original_max_position_embeddings")
    if config.model_type == "phi3" and length is not None:
        return {"rope_scaling": kept, "original_max_position_embeddings": length}
    return {"rope_scaling": kept}


def _require_same(config: ModelConfig, fields: dict[str, Any], file: str) -> None:
    """Raises UnsupportedError where these fields would be read as another model."""
    found = model_config(fields, file=file)
    # Llama 3's bands may have two names.
    one, other = (
        {name: getattr(each, name) for name in each.__dataclass_fields__ if name != "rope"}
        for each in (config, found)
    )
    if differing := [name for name, value in one.items() if other[name] != value]:
        name = differing[0]
        raise UnsupportedError(
            f"{file}: config.json cannot say what this model is: {name} {one[name]!r:.80} would be "
            f"read as {other[name]!r:.80}"
        )
