"""What a model is: sizes, switches and rope, read from a Hugging Face `config.json` dict.

GGUF metadata reaches this through `qjax.checkpoint.gguf_config`, which writes the same kind of
dict. Every model type is a set of switches on one decoder: a config is all that tells Gemma 3 from
Llama.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from qjax.errors import UnsupportedError
from qjax.layers.mla_config import MLAConfig
from qjax.layers.moe_config import MoEConfig
from qjax.layers.rope import RopeConfig, frequency_divisors
from qjax.models import deepseek_config, experts_config
from qjax.models.experts_config import read_experts
from qjax.models.fields import Fields
from qjax.models.rope_config import read_rope
from qjax.registry import load_plugins

FULL, SLIDING = "full_attention", "sliding_attention"

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3")
MODEL_TYPES += (*experts_config.MODEL_TYPES, *deepseek_config.MODEL_TYPES)

# `gemma3` is the multimodal wrapper of the text model, with the sizes in its `text_config`.
_ALIASES = {"gemma3": "gemma3_text"}

_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}

# What the config classes of transformers fill in for keys that a config.json leaves out. Sizes are
# here only for Gemma 3, whose published files omit them.
_GEMMA_DEFAULTS = {
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "gemma2": _GEMMA_DEFAULTS,
    "gemma3_text": _GEMMA_DEFAULTS
    | {
        "vocab_size": 262_208,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 131_072,
    },
    "qwen3": {"head_dim": 128},
}

_MAX_SIZE = 1 << 24


@dataclass(frozen=True)
class ModelConfig:
    """Everything static about a decoder; hashable, to be a static argument of `jax.jit`.

    Attributes:
      model_type: one of `MODEL_TYPES`.
      num_heads, num_kv_heads, head_dim: of attention; query head h reads kv head
        h // (num_heads / num_kv_heads).
      attention_bias: q, k and v have biases; attention_output_bias: so has the output projection.
      hidden_act: "silu" or "gelu_tanh", the activation of the gate in the feed-forward network.
      layer_types: for each layer "full_attention" or "sliding_attention" (a query sees the last
        `sliding_window` positions).
      rope: (layer type, RopeConfig) for each layer type in use.
      query_scale: factor on the attention scores, usually head_dim ** -0.5.
      attn_soft_cap, final_soft_cap: cap * tanh(x / cap) on attention scores and on logits, or None.
      embedding_scale: factor on the token embeddings.
      qk_norm: RMS norm of each head of q and k before rope.
      post_norms: the outputs of attention and feed-forward are normed too, before they join the
        residual.
      mla: sizes of latent attention, where the model has it; num_kv_heads and head_dim are then
        those of the cache.
      moe: what experts it has; None for a dense model.
      attention_sinks: each head has a score that takes a share of its attention.
      kv_scales: how many scales each layer has for its keys and for its values, which are rounded
        to 8-bit floats before they are cached: 0 for none, 1, or one a kv head.
      num_nextn_predict_layers: layers behind the last that predict further tokens; a checkpoint may
        hold them, the model does not.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    layer_types: tuple[str, ...]
    sliding_window: int | None
    rope: tuple[tuple[str, RopeConfig], ...]
    query_scale: float
    hidden_act: str = "silu"
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    attention_output_bias: bool = False
    mlp_bias: bool = False
    attn_soft_cap: float | None = None
    final_soft_cap: float | None = None
    embedding_scale: float = 1.0
    qk_norm: bool = False
    post_norms: bool = False
    mla: MLAConfig | None = None
    moe: MoEConfig | None = None
    num_nextn_predict_layers: int = 0
    kv_scales: int = 0
    attention_sinks: bool = False

    def rope_for(self, layer_type: str) -> RopeConfig:
        return dict(self.rope)[layer_type]

    def frequency_divisors(self, layer_type: str) -> np.ndarray:
        """[rotary_dim / 2] float64: what rope's extension divides its frequencies by."""
        return frequency_divisors(self.rope_for(layer_type))

    def window_for(self, layer: int) -> int | None:
        """Number of positions that layer number `layer` attends to, or None for all."""
        return self.sliding_window if self.layer_types[layer] == SLIDING else None


Reader = Callable[[Mapping[str, Any], str | None], ModelConfig]

_readers: dict[str, Reader] = {}


def register_model_type(name: str) -> Callable[[Reader], Reader]:
    """Decorator: makes a function the reader of configs of a model type that qjax does not know.

    The function gets the config dict, and the path of its file or None, and gives a `ModelConfig`:
    that of a known type, which it asks `model_config` for, where parameters have the same names.

    Args:
      name: the `model_type` in config.json.

    Raises:
      ValueError: qjax itself reads this type.
    """
    if name in MODEL_TYPES or name in _ALIASES:
        raise ValueError(f"the model type {name!r} is one that qjax reads itself")

    def register(reader: Reader) -> Reader:
        _readers[name] = reader
        return reader

    return register


def model_config(
    config: Mapping[str, Any],
    *,
    file: str | None = None,
    shown: Mapping[str, str] | None = None,
) -> ModelConfig:
    """Reads a Hugging Face config dict, of transformers 4 or 5.

    Args:
      config: the parsed `config.json`.
      file: its path, for error messages.
      shown: names of fields in error messages where the file has other names for them.

    Raises:
      CheckpointError: a field is missing, of the wrong type, out of range, or contradicts another.
      UnsupportedError: the model type, activation or rope type is not one that qjax runs.
    """
    outer = Fields(config, file)
    if "text_config" in outer:
        section = outer.section("text_config")
        inherited = {k: v for k, v in config.items() if k in ("model_type", "tie_word_embeddings")}
        outer = Fields({**inherited, **section.values}, file, section.prefix)
    model_type = outer.text("model_type")
    model_type = _ALIASES.get(model_type, model_type)
    if model_type not in MODEL_TYPES:
        load_plugins()
        if model_type in _readers:
            return _readers[model_type](outer.values, file)
        raise UnsupportedError(
            f"{file or 'config'}: model_type {model_type!r:.80} is not supported; supported are "
            + ", ".join((*MODEL_TYPES, *_readers))
        )
    fields = Fields(outer.values, file, outer.prefix, _DEFAULTS.get(model_type, {}), shown or {})
    gemma = model_type in ("gemma2", "gemma3_text")
    _refuse_variants(fields, model_type)

    num_layers = fields.integer("num_hidden_layers", 1, 512)
    num_heads = fields.integer("num_attention_heads", 1, 1024)
    num_kv_heads = fields.integer("num_key_value_heads", 1, 1024, num_heads)
    hidden_size = fields.integer("hidden_size", 1, _MAX_SIZE)
    if num_heads % num_kv_heads:
        raise fields.error(
            "num_key_value_heads", f"{num_kv_heads} does not divide {num_heads} heads"
        )
    mla = None
    if model_type in deepseek_config.MODEL_TYPES:
        mla = deepseek_config.read_mla(fields, num_heads)
        head_dim, rotated = mla.cache_head_dim, mla.qk_rope_head_dim
        num_kv_heads = 1 if mla.split else num_heads
    else:
        named = "head_dim" in fields or "head_dim" in fields.defaults
        if not named and hidden_size % num_heads:
            raise fields.error("num_attention_heads", f"{num_heads} does not divide {hidden_size=}")
        head_dim = rotated = fields.integer("head_dim", 2, 4096, hidden_size // num_heads)
    max_position_embeddings = fields.integer("max_position_embeddings", 1, 1 << 30, 2048)
    sliding_window = _sliding_window(fields, model_type)
    layer_types = _layer_types(fields, model_type, num_layers, sliding_window)
    attention_bias = _attention_bias(fields, model_type)
    rope = tuple(
        (kind, read_rope(fields, kind, model_type, rotated, max_position_embeddings))
        for kind in sorted(set(layer_types))
    )
    if mla is None:
        scalar = fields.number("query_pre_attn_scalar", 0, 1e6) if gemma else head_dim
        query_scale = scalar**-0.5
    else:
        query_scale = deepseek_config.query_scale(fields, mla, rope[0][1])

    return ModelConfig(
        model_type=model_type,
        vocab_size=fields.integer("vocab_size", 1, _MAX_SIZE),
        hidden_size=hidden_size,
        intermediate_size=fields.integer("intermediate_size", 1, _MAX_SIZE),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=fields.number(
            "rms_norm_eps", 0, 1, 1e-5 if model_type in ("phi3", "mixtral") else 1e-6
        ),
        max_position_embeddings=max_position_embeddings,
        layer_types=layer_types,
        sliding_window=sliding_window if SLIDING in layer_types else None,
        rope=rope,
        query_scale=query_scale,
        hidden_act=_activation(fields, "hidden_activation" if gemma else "hidden_act")
        if model_type != "gpt_oss"
        else _clipped_swiglu(fields),
        tie_word_embeddings=fields.flag("tie_word_embeddings", False),
        attention_bias=attention_bias,
        attention_output_bias=attention_bias and not model_type.startswith("qwen2"),
        mlp_bias=model_type in ("llama", "deepseek_v2") and fields.flag("mlp_bias", False),
        attn_soft_cap=_soft_cap(fields, "attn_logit_softcapping", model_type, 50.0),
        final_soft_cap=_soft_cap(fields, "final_logit_softcapping", model_type, 30.0),
        embedding_scale=hidden_size**0.5 if gemma else 1.0,
        qk_norm=model_type in ("qwen3", "qwen3_moe", "gemma3_text"),
        post_norms=gemma,
        mla=mla,
        moe=read_experts(fields, model_type, num_layers),
        attention_sinks=model_type == "gpt_oss",
        num_nextn_predict_layers=(
            fields.integer("num_nextn_predict_layers", 0, 64, 1)
            if model_type == "deepseek_v3"
            else 0
        ),
    )


def _refuse_variants(fields: Fields, model_type: str) -> None:
    """Refuses the keys that turn a supported model type into another architecture."""
    for name in ("use_bidirectional_attention", "num_local_experts", "num_experts"):
        if fields.get(name, None) and (
            model_type not in experts_config.MODEL_TYPES or "experts" not in name
        ):
            raise UnsupportedError(
                f"{fields.file or 'config'}: {name} is set, but only dense causal decoders are "
                "supported"
            )


def _attention_bias(fields: Fields, model_type: str) -> bool:
    if model_type == "qwen2_moe":
        return fields.flag("qkv_bias", True)
    return model_type == "qwen2" or fields.flag("attention_bias", False)


def _clipped_swiglu(fields: Fields) -> str:
    """The gate of gpt-oss, whose limits are the same in all its models."""
    for name, only in (("swiglu_limit", 7.0), ("swiglu_alpha", 1.702)):
        value = fields.number(name, 0, 1e6, only)
        if value != only:
            raise UnsupportedError(
                f"{fields.file or 'config'}: {name} {value}; {only} is supported"
            )
    return "clipped_swiglu"


def _activation(fields: Fields, name: str) -> str:
    value = fields.text(name, "silu")
    if value not in _ACTIVATIONS:
        raise UnsupportedError(
            f"{fields.file or 'config'}: {name} {value!r:.80} is not supported; supported are "
            + ", ".join(_ACTIVATIONS)
        )
    return _ACTIVATIONS[value]


def _soft_cap(fields: Fields, name: str, model_type: str, gemma2_default: float) -> float | None:
    if model_type not in ("gemma2", "gemma3_text"):
        return None
    # An explicit null switches the cap off; only a missing key means Gemma 2's default.
    missing = model_type == "gemma2" and name not in fields.values
    return fields.number(name, 0, 1e6, gemma2_default if missing else None)


def _sliding_window(fields: Fields, model_type: str) -> int | None:
    if model_type == "llama" or model_type in deepseek_config.MODEL_TYPES:
        return None
    if model_type.startswith("qwen") and not fields.flag("use_sliding_window", False):
        return None
    # An explicit null means none, but a Mistral config without the key 4096, as in transformers.
    missing = model_type == "mistral" and "sliding_window" not in fields.values
    return fields.integer("sliding_window", 1, 1 << 30, 4096 if missing else None)


def _layer_types(
    fields: Fields, model_type: str, num_layers: int, window: int | None
) -> tuple[str, ...]:
    given = fields.get("layer_types", None)
    if given is not None:
        if not isinstance(given, list | tuple) or len(given) != num_layers:
            raise fields.error("layer_types", f"must be a list of {num_layers} names")
        for kind in given:
            if not isinstance(kind, str):
                raise fields.error("layer_types", f"must be a list of {num_layers} names")
            if kind not in (FULL, SLIDING):
                raise UnsupportedError(
                    f"{fields.file or 'config'}: layer_types {kind!r:.80} is not supported; "
                    f"supported are {FULL}, {SLIDING}"
                )
            if kind == SLIDING and window is None:
                raise fields.error("layer_types", f"{SLIDING} needs sliding_window")
        return tuple(given)
    if window is None:
        return (FULL,) * num_layers
    if model_type in ("qwen2", "qwen3"):
        first = fields.integer("max_window_layers", 0, 1 << 30, 28)
        return tuple(SLIDING if i >= first else FULL for i in range(num_layers))
    if model_type == "qwen2_moe":
        last = fields.integer("max_window_layers", 0, 1 << 30, 28)
        return tuple(FULL if i % 2 or i >= last else SLIDING for i in range(num_layers))
    if model_type == "gpt_oss":
        return tuple(FULL if i % 2 else SLIDING for i in range(num_layers))
    if model_type in ("gemma2", "gemma3_text"):
        # In each run of `period` layers the last one sees everything.
        period = (
            2 if model_type == "gemma2" else fields.integer("sliding_window_pattern", 1, 512, 6)
        )
        return tuple(SLIDING if (i + 1) % period else FULL for i in range(num_layers))
    return (SLIDING,) * num_layers
