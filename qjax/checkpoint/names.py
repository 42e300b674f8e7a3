"""Checkpoint tensor names as Hugging Face parameter names, and fused tensors as their parts."""

from __future__ import annotations

import re

from qjax.models.config import ModelConfig

_BLOCK = re.compile(r"blk\.(\d+)\.(.+)\.(weight|bias)")

_GGUF_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_GGUF_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Gemma has a norm before and one after, and names the one after attention as others name the one
# before the feed-forward network.
_GGUF_POST_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}

_PREFIXES = (
    ("model.language_model.", "model."),
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
)
_BARE = ("embed_tokens.", "layers.", "norm.")
# The eyes of a multimodal model; what is loaded here is its language model.
_VISION = re.compile(r"(model\.)?(vision_tower|multi_modal_projector)\.")


def gguf_name(name: str, config: ModelConfig) -> str | None:
    """The Hugging Face name of a GGUF tensor, or None for one that no supported model has."""
    if name in _GGUF_TOP:
        return _GGUF_TOP[name]
    match = _BLOCK.fullmatch(name)
    if match is None:
        return None
    layer, part, kind = match.groups()
    names = _GGUF_LAYER | _GGUF_POST_NORMS if config.post_norms else _GGUF_LAYER
    if config.model_type == "phi3" and part == "ffn_up":
        return f"model.layers.{layer}.mlp.gate_up_proj.{kind}"
    return f"model.layers.{layer}.{names[part]}.{kind}" if part in names else None


def hf_name(name: str) -> str:
    """A safetensors name without the wrappers that multimodal and headless models put around it."""
    for wrapped, plain in _PREFIXES:
        if name.startswith(wrapped):
            return plain + name.removeprefix(wrapped)
    return "model." + name if name.startswith(_BARE) else name


def is_ignored(name: str, config: ModelConfig) -> bool:
    """Whether a safetensors tensor (by its plain name) is known and needed by no text model."""
    # Llama 2 files hold the table of inverse frequencies; tied models may hold the head twice.
    return (
        name.endswith(".rotary_emb.inv_freq")
        or (name == "lm_head.weight" and config.tie_word_embeddings)
        or (config.model_type == "gemma3_text" and _VISION.match(name) is not None)
    )


def split_fused(name: str, config: ModelConfig) -> list[tuple[str, slice | None]]:
    """The parameters inside a tensor: (name, its rows), or the tensor itself with None for all."""
    if ".self_attn.qkv_proj." in name:
        q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        bounds = {"q_proj": (0, q), "k_proj": (q, q + kv), "v_proj": (q + kv, q + 2 * kv)}
        return [(name.replace("qkv_proj", part), slice(*rows)) for part, rows in bounds.items()]
    if ".mlp.gate_up_proj." in name:
        size = config.intermediate_size
        bounds = {"gate_proj": (0, size), "up_proj": (size, 2 * size)}
        return [(name.replace("gate_up_proj", part), slice(*rows)) for part, rows in bounds.items()]
    return [(name, None)]
