"""What DeepSeek's configs say beyond those of other models: sizes of attention, choice of experts.

The keys are those of DeepSeek-V2 and V3 (and R1, which is a V3).
"""

from __future__ import annotations

import math

from qjax.errors import UnsupportedError
from qjax.layers.mla_config import MLAConfig
from qjax.layers.rope import RopeConfig
from qjax.layers.router import RouterConfig
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
        split=fields.flag("split_kv_b", False),  # of GGUF files
    )


def query_scale(fields: Fields, mla: MLAConfig, rope: RopeConfig) -> float:
    """Factor on the attention scores: yarn enters by its square, being for queries and for keys."""
    scale = mla.qk_head_dim**-0.5
    name = next((n for n in ("rope_parameters", "rope_scaling") if n in fields), None)
    if name is None or rope.rope_type == "default" or rope.factor <= 1:
        return scale
    weight = fields.section(name).number("mscale_all_dim", -1e-9, 1e6, 0.0)
    return scale * (0.1 * weight * math.log(rope.factor) + 1.0) ** 2


def sparse_layers(fields: Fields, model_type: str, num_layers: int) -> tuple[bool, ...]:
    """For each layer whether it has experts."""
    if not fields.get("n_routed_experts", None):
        return (False,) * num_layers
    default = 3 if model_type == "deepseek_v3" else 0
    first = fields.integer("first_k_dense_replace", 0, 1 << 30, default)
    period = fields.integer("moe_layer_freq", 1, 1 << 30, 1)
    return tuple(layer >= first and layer % period == 0 for layer in range(num_layers))


def read_router(fields: Fields, model_type: str) -> RouterConfig:
    """How tokens choose experts.

    Raises:
      CheckpointError: a number is missing or out of range, or groups do not divide the experts.
      UnsupportedError: another method than the model type has.
    """
    experts = fields.integer("n_routed_experts", 1, 1 << 14)
    top_k = fields.integer("num_experts_per_tok", 1, experts)
    scale = fields.number("routed_scaling_factor", 0, 1e6, 1.0)
    if model_type == "deepseek_v3":
        _choice(fields, "scoring_func", "sigmoid")
        _choice(fields, "topk_method", "noaux_tc")
        groups, top_groups = _groups(fields, experts, top_k)
        return RouterConfig(
            experts,
            top_k,
            "sigmoid",
            fields.flag("norm_topk_prob", True),
            scale,
            groups,
            top_groups,
            group_best=2,
            correction_bias=True,
        )
    _choice(fields, "scoring_func", "softmax")
    if fields.flag("norm_topk_prob", False):
        # Published code then leaves the scaling factor out; transformers does not normalize.
        raise UnsupportedError(f"{fields.file or 'config'}: norm_topk_prob of {model_type} is set")
    grouped = _choice(fields, "topk_method", "greedy", "group_limited_greedy") != "greedy"
    groups, top_groups = _groups(fields, experts, top_k) if grouped else (1, 1)
    # One score stands for a group, but for two in llama.cpp, as in V3.
    best = fields.integer("group_best", 1, 2, 1)
    return RouterConfig(experts, top_k, "softmax", False, scale, groups, top_groups, best)


def _choice(fields: Fields, name: str, *known: str) -> str:
    value = fields.text(name, known[0])
    if value not in known:
        raise UnsupportedError(
            f"{fields.file or 'config'}: {name} {value!r:.80} is not supported; supported are "
            + ", ".join(known)
        )
    return value


def _groups(fields: Fields, experts: int, top_k: int) -> tuple[int, int]:
    groups = fields.integer("n_group", 1, experts, 1)
    best = fields.integer("topk_group", 1, groups, groups)
    if experts % groups:
        raise fields.error("n_group", f"{groups} does not divide {experts} experts")
    size = experts // groups
    if top_k > best * size:
        raise fields.error("topk_group", f"{best} groups of {size} are fewer than {top_k} experts")
    if best < groups and size < 2:
        raise fields.error("n_group", "groups of one expert")
    return groups, best
