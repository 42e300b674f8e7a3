"""GGUF metadata of DeepSeek-V2 and V3 as the fields of their config.json.

Both have the architecture "deepseek2"; the scores of experts tell them apart. Files of today hold
the matrices from the latent vector to keys and to values apart, and give the sizes of the heads
that they multiply with ("..._mla") beside those of the cache; older ones hold them joined.
"""

from __future__ import annotations

import math
from typing import Any

from qjax.checkpoint.gguf_io import GGUFFile
from qjax.errors import UnsupportedError
from qjax.models.config import ModelConfig
from qjax.models.fields import Fields

_SOFTMAX, _SIGMOID = 1, 2

_KEYS = {
    "q_lora_rank": "attention.q_lora_rank",
    "kv_lora_rank": "attention.kv_lora_rank",
    "n_routed_experts": "expert_count",
    "n_shared_experts": "expert_shared_count",
    "first_k_dense_replace": "leading_dense_block_count",
    "norm_topk_prob": "expert_weights_norm",
    "n_group": "expert_group_count",
    "topk_group": "expert_group_used_count",
}


def deepseek_config(gguf: GGUFFile, prefix: str) -> tuple[dict[str, Any], dict[str, str]]:
    """What DeepSeek's models have beside others.

    Args:
      prefix: of the keys, "deepseek2.".

    Returns:
      (config, shown) as `gguf_config` does.

    Raises:
      CheckpointError: a key is missing or out of range.
      UnsupportedError: experts are scored in another way.
    """
    fields = Fields(gguf.metadata, gguf.path)
    shown = {field: prefix + key for field, key in _KEYS.items()}
    config = {field: fields.get(key, None) for field, key in shown.items()}
    scoring = fields.get(prefix + "expert_gating_func", _SOFTMAX)
    if scoring not in (_SOFTMAX, _SIGMOID):
        raise UnsupportedError(
            f"{gguf.path}: {prefix}expert_gating_func {scoring!r:.80} is not supported; supported "
            f"are {_SOFTMAX} (softmax), {_SIGMOID} (sigmoid)"
        )
    config["model_type"] = "deepseek_v3" if scoring == _SIGMOID else "deepseek_v2"
    if scoring == _SOFTMAX and (config["n_group"] or 1) > 1:
        config |= {"topk_method": "group_limited_greedy", "group_best": 2}
    scale = prefix + "expert_weights_scale"
    config["routed_scaling_factor"] = fields.number(scale, -1e-9, 1e6, 1.0) or 1.0  # 0: not given
    config["norm_topk_prob"] = bool(config["norm_topk_prob"])
    config["num_nextn_predict_layers"] = 0

    def size(name: str) -> int:
        key = f"{prefix}attention.{name}"
        return fields.integer(key + "_mla" if key + "_mla" in fields else key, 1, 1 << 16)

    rotated = fields.integer(prefix + "rope.dimension_count", 1, size("key_length") - 1)
    config["num_key_value_heads"] = fields.get(prefix + "attention.head_count")
    config["qk_rope_head_dim"] = rotated
    config["qk_nope_head_dim"] = size("key_length") - rotated
    config["v_head_dim"] = size("value_length")
    config["split_kv_b"] = "blk.0.attn_k_b.weight" in gguf.tensors
    return config, shown


def yarn_fields(fields: Fields, prefix: str) -> dict[str, Any]:
    """The weights of yarn's growth of attention, of which files hold one for both.

    Args:
      prefix: of the keys, "deepseek2.rope.scaling.".
    """
    weight = fields.number(prefix + "yarn_log_multiplier", 0, 1e3) / 0.1
    return {"mscale": weight, "mscale_all_dim": weight, "attention_factor": 1.0}


def deepseek_metadata(config: ModelConfig) -> dict[str, Any]:
    """The keys below "deepseek2." that `deepseek_config` reads; matrices of keys and values joined.

    Raises:
      UnsupportedError: a setting that has no key.
    """
    mla, moe = config.mla, config.moe
    assert mla is not None
    if not mla.rope_interleave or mla.split:
        raise UnsupportedError(f"GGUF files of {config.model_type} do not have this layout")
    fields: dict[str, Any] = {
        "attention.head_count_kv": config.num_heads,
        "attention.key_length": mla.qk_head_dim,
        "attention.value_length": mla.v_head_dim,
        "attention.kv_lora_rank": mla.kv_lora_rank,
        "rope.dimension_count": mla.qk_rope_head_dim,
    }
    if mla.q_lora_rank is not None:
        fields["attention.q_lora_rank"] = mla.q_lora_rank
    _, rope = config.rope[0]
    if rope.rope_type == "yarn":
        # Attention grows by its square, being for queries and for keys.
        grown = math.sqrt(config.query_scale * math.sqrt(mla.qk_head_dim))
        if rope.attention_factor != 1:
            raise UnsupportedError(
                f"GGUF files of {config.model_type} have one weight of yarn for tables and scores"
            )
        fields["rope.scaling.yarn_log_multiplier"] = (grown - 1) / math.log(rope.factor)
        fields["rope.scaling.attn_factor"] = 1.0
    if moe is None:
        return fields | {"leading_dense_block_count": config.num_layers}
    dense = moe.layers.index(True)
    router = moe.router
    if not all(moe.layers[dense:]) or (router.num_groups > 1 and router.group_best != 2):
        raise UnsupportedError(
            f"GGUF files of {config.model_type} have experts in every layer from one on, and "
            "groups of them are judged by the two best of each; this model differs"
        )
    sigmoid = router.scoring == "sigmoid"
    fields |= {
        "leading_dense_block_count": dense,
        "expert_count": router.num_experts,
        "expert_used_count": router.top_k,
        "expert_feed_forward_length": moe.intermediate_size,
        "expert_shared_count": moe.shared_size // moe.intermediate_size,
        "expert_weights_scale": float(router.weight_scale),
        "expert_weights_norm": router.normalize,
        "expert_gating_func": _SIGMOID if sigmoid else _SOFTMAX,
    }
    if router.num_groups > 1:
        fields["expert_group_count"] = router.num_groups
        fields["expert_group_used_count"] = router.top_groups
    return fields
