"""GGUF metadata of DeepSeek-V2 and V3 as the fields of their config.json.

Both have the architecture "deepseek2"; the scores of experts tell them apart. Files of today hold
the matrices from the latent vector to keys and to values apart, and give the sizes of the heads
that they multiply with ("..._mla") beside those of the cache; older ones hold them joined.
"""

from __future__ import annotations

from typing import Any

from qjax.checkpoint.gguf_io import GGUFFile
from qjax.errors import UnsupportedError
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
