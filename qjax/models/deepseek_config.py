"""What DeepSeek's configs say beyond those of other models: the sizes and scale of their attention.

The keys are those of DeepSeek-V2 and V3 (and R1, which is a V3).
"""

from __future__ import annotations

import math

from qjax.layers.mla import MLAConfig
from qjax.layers.rope import RopeConfig
from qjax.models.fields import Fields

MODEL_TYPES = ("deepseek_v2", "deepseek_v3")

_MAX_RANK = 1 << 16


def read_mla(fields: Fields, num_heads: int) -> MLAConfig:
    """Sizes of latent attention.

    Raises CheckpointError where one is missing or out of range, or where keys have other heads than
    queries, which latent attention cannot have.
    """
    num_kv_heads = fields.integer("num_key_value_heads", 1, 1024, num_heads)
    if num_kv_heads != num_heads:
        raise fields.error("num_key_value_heads", f"{num_kv_heads} differs from {num_heads} heads")
    rope = fields.integer("qk_rope_head_dim", 2, 4096)
    if rope % 2:
        raise fields.error("qk_rope_head_dim", f"{rope} dimensions make no pairs")
    return MLAConfig(
        q_lora_rank=fields.integer("q_lora_rank", 1, _MAX_RANK, None),
        kv_lora_rank=fields.integer("kv_lora_rank", 1, _MAX_RANK),
        qk_nope_head_dim=fields.integer("qk_nope_head_dim", 1, 4096),
        qk_rope_head_dim=rope,
        v_head_dim=fields.integer("v_head_dim", 1, 4096),
        rope_interleave=fields.flag("rope_interleave", True),
    )


def query_scale(fields: Fields, mla: MLAConfig, rope: RopeConfig) -> float:
    """Factor on the attention scores: yarn enters by its square, being for queries and for keys."""
    scale = mla.qk_head_dim**-0.5
    name = next((n for n in ("rope_parameters", "rope_scaling") if n in fields), None)
    if name is None or rope.rope_type == "default" or rope.factor <= 1:
        return scale
    weight = fields.section(name).number("mscale_all_dim", -1e-9, 1e6, 0.0)
    return scale * (0.1 * weight * math.log(rope.factor) + 1.0) ** 2
