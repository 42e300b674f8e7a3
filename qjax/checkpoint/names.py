"""Checkpoint tensor names as Hugging Face parameter names, and fused tensors as their parts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache

from qjax.models.config import ModelConfig

_BLOCK = re.compile(r"blk\.(\d+)\.(.+)\.(weight|bias|scale|input_scale)")

_GGUF_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
    "output.scale": "lm_head.scale",
    "output.input_scale": "lm_head.input_scale",
}
_GGUF_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_a": "self_attn.q_a_proj",
    "attn_q_a_norm": "self_attn.q_a_layernorm",
    "attn_q_b": "self_attn.q_b_proj",
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
    "attn_kv_a_norm": "self_attn.kv_a_layernorm",
    "attn_kv_b": "self_attn.kv_b_proj",
    "attn_k_b": "self_attn.k_b_proj",
    "attn_v_b": "self_attn.v_b_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Of a layer with experts, below the module that `MoEConfig` names.
_GGUF_EXPERTS = {
    "ffn_gate_inp": "{router}",
    "ffn_gate_exps": "experts.gate_proj",
    "ffn_up_exps": "experts.up_proj",
    "ffn_down_exps": "experts.down_proj",
    "ffn_gate_inp_shexp": "{shared}_gate",
    "ffn_gate_shexp": "{shared}.gate_proj",
    "ffn_up_shexp": "{shared}.up_proj",
    "ffn_down_shexp": "{shared}.down_proj",
}
# Gemma has a norm before and one after, and names the one after attention as others name the one
# before the feed-forward network.
_GGUF_POST_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_GGUF_GPT_OSS = {"post_attention_norm": "post_attention_layernorm"}

# The models whose q and k rows GGUF files hold pair by pair.
ROTATED_PAIRS = ("llama", "mistral", "mixtral")

_PREFIXES = (
    ("model.language_model.", "model."),
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
)
_MIXTRAL = re.compile(r"(?<=\.block_sparse_moe)(\.experts\.\d+\.)(w[123])(?=\.)")
_MIXTRAL_PARTS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
_STACKED = (".experts.gate_up_proj", ".experts.down_proj")
# Likewise, with what is stored of them joined by "_": "experts.down_proj_blocks".
_STACKED_PART = re.compile(r"(\.experts\.(?:gate_up|down)_proj)_(blocks|scales|bias)")
_STACKED_SCALE = re.compile(r"(\.experts\.(?:gate_up|down)_proj)_(scale_inv|activation_scale)")
_SCALES = {"scale_inv": "weight_scale_inv", "activation_scale": "activation_scale"}
_BARE = ("embed_tokens.", "layers.", "norm.")
# The eyes of a multimodal model; what is loaded here is its language model.
_VISION = re.compile(r"(model\.)?(vision_tower|multi_modal_projector)\.")
_LAYER = re.compile(r"model\.layers\.(\d{1,4})\.")


def gguf_name(name: str, config: ModelConfig) -> str | None:
    """The Hugging Face name of a GGUF tensor, or None for one that no supported model has."""
    if name in _GGUF_TOP:
        return _GGUF_TOP[name]
    match = _BLOCK.fullmatch(name)
    if match is None:
        return None
    layer, part, kind = match.groups()
    names = _GGUF_LAYER | _GGUF_POST_NORMS if config.post_norms else _GGUF_LAYER
    if config.model_type == "gpt_oss":
        if part == "attn_sinks":
            return f"model.layers.{layer}.self_attn.sinks"
        names = _GGUF_LAYER | _GGUF_GPT_OSS
    if config.moe is not None and part in _GGUF_EXPERTS:
        moe = config.moe
        inside = _GGUF_EXPERTS[part].format(router=moe.router_name, shared=moe.shared_name)
        return f"model.layers.{layer}.{moe.module}.{inside}.{kind}"
    if config.moe is not None and (part, kind) == ("exp_probs_b", "bias"):
        return f"model.layers.{layer}.mlp.gate.e_score_correction_bias"
    if config.model_type == "phi3" and part == "ffn_up":
        return f"model.layers.{layer}.mlp.gate_up_proj.{kind}"
    return f"model.layers.{layer}.{names[part]}.{kind}" if part in names else None


# What says more than a name of `_GGUF_LAYER` where both would do.
_GGUF_PARTS = (*_GGUF_POST_NORMS, *_GGUF_EXPERTS, "attn_sinks", "exp_probs_b", *_GGUF_LAYER)


@lru_cache(maxsize=8192)
def gguf_tensor(name: str, config: ModelConfig) -> str | None:
    """The GGUF name of a parameter (or of what it is a part of, where such models are stored with
    joined layers); None where a GGUF file has no place for it.
    """
    for stored, known in _GGUF_TOP.items():
        if known == name:
            return stored
    match = _LAYER.match(name)
    module, _, kind = name.rpartition(".")
    if match is None:
        return None
    joined = fused_into(module, config) if config.model_type == "phi3" else []
    last = {"sinks": "weight", "e_score_correction_bias": "bias"}.get(kind, kind)
    places = [f"blk.{match[1]}.{part}.{last}" for part in _GGUF_PARTS]
    found = {gguf_name(place, config): place for place in reversed(places)}
    wanted = [*(f"{module}.{kind}" for module in joined), name]
    return next((found[one] for one in wanted if one in found), None)


def hf_name(name: str, config: ModelConfig) -> str:
    """A safetensors name without the wrappers that multimodal and headless models put around it,
    and with one name for what tools name differently.
    """
    for wrapped, plain in _PREFIXES:
        if name.startswith(wrapped):
            return plain + name.removeprefix(wrapped)
    name = "model." + name if name.startswith(_BARE) else name
    if name.endswith(_STACKED):  # parameters without a module of their own
        name += ".weight"
    name = _STACKED_PART.sub(r"\1.\2", name)
    name = _STACKED_SCALE.sub(lambda match: f"{match[1]}.{_SCALES[match[2]]}", name)
    if config.model_type == "mixtral":  # transformers 5 calls it so in memory, GPTQModel in files
        name = name.replace(".mlp.", ".block_sparse_moe.", 1)
    return _MIXTRAL.sub(lambda match: match[1] + _MIXTRAL_PARTS[match[2]], name)


def is_ignored(name: str, config: ModelConfig) -> bool:
    """Whether a safetensors tensor (by its plain name) is known and needed by no text model."""
    # Llama 2 files hold the table of inverse frequencies; tied models may hold the head twice.
    return (
        name.endswith(".rotary_emb.inv_freq")
        or (name == "lm_head.weight" and config.tie_word_embeddings)
        or (config.model_type == "gemma3_text" and _VISION.match(name) is not None)
        or _predicts_further(name, config)
    )


def _predicts_further(name: str, config: ModelConfig) -> bool:
    """Whether it belongs to a layer behind the last, that drafts tokens after the next one."""
    match = _LAYER.match(name)
    if match is None:
        return False
    return 0 <= int(match[1]) - config.num_layers < config.num_nextn_predict_layers


# Modules that some checkpoints store joined: the joined name, and its parts from top to bottom.
_FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}


def fused_into(module: str, config: ModelConfig) -> list[str]:
    """The joined modules that may hold a module."""
    parent, _, last = module.rpartition(".")
    return [
        f"{parent}.{joined}"
        for joined, parts in _FUSED.items()
        if last in parts and not (config.mla and joined == "qkv_proj")
    ]


# Model types whose classes have them so.
_JOINED = {"phi3": ("qkv_proj", "gate_up_proj"), "gpt_oss": ("gate_up_proj",)}
_MIXTRAL_NAMES = {part: name for name, part in _MIXTRAL_PARTS.items()}


def joined_module(module: str, config: ModelConfig) -> str | None:
    """The joined module that holds a module in its Hugging Face class; None where it is alone."""
    found = fused_into(module, config)
    wanted = _JOINED.get(config.model_type, ())
    return next((name for name in found if name.rpartition(".")[2] in wanted), None)


def stored_name(module: str, last: str, config: ModelConfig) -> str:
    """What safetensors of its Hugging Face class call a parameter: the way back of `hf_name`."""
    if are_gpt_oss_experts(module, config):
        return module if last == "weight" else f"{module}_{last}"
    if config.model_type == "mixtral" and ".experts." in module:
        parent, _, part = module.rpartition(".")
        module = f"{parent}.{_MIXTRAL_NAMES[part]}"
    return f"{module}.{last}"


def rows_of(
    module: str, fused: str, config: ModelConfig, expected: Mapping[str, tuple[int, ...]]
) -> tuple[slice, int]:
    """The rows of a joined module that are one of its parts, and how many it has in all."""
    parent, _, joined = fused.rpartition(".")
    sizes = [expected[f"{parent}.{part}.weight"][-2] for part in _FUSED[joined]]
    index = _FUSED[joined].index(module.rpartition(".")[2])
    if are_gpt_oss_experts(parent, config):
        return slice(index, None, len(sizes)), sum(sizes)
    start = sum(sizes[:index])
    return slice(start, start + sizes[index]), sum(sizes)


def are_gpt_oss_experts(module: str, config: ModelConfig) -> bool:
    """Whether these are experts as gpt-oss stores them: plain weights as (experts, in, out), the
    rows of gate and up in turn."""
    return config.model_type == "gpt_oss" and ".experts" in module


def expert_modules(module: str, count: int) -> list[str]:
    """Where experts are stored one by one: "mlp.experts.gate_proj" as "mlp.experts.0.gate_proj"."""
    parent, _, last = module.rpartition(".")
    return [f"{parent}.{expert}.{last}" for expert in range(count)]
