"""The rope section of a Hugging Face config, with old keys or new ones, as a `RopeConfig`."""

from __future__ import annotations

import math
from typing import Any

from qjax.errors import UnsupportedError
from qjax.layers.rope import ROPE_TYPES, RopeConfig
from qjax.models.fields import Fields

# Gemma 3 has a base of its own for the layers with a sliding window, and extends only the others.
_GEMMA3_THETA = {"full_attention": 1e6, "sliding_attention": 1e4}


def read_rope(
    fields: Fields, layer_type: str, model_type: str, head_dim: int, max_length: int
) -> RopeConfig:
    """Rope of the layers of one type.

    Args:
      fields: the whole model config. transformers 5 keeps rope in `rope_parameters`, flat or by
        layer type; transformers 4 in `rope_theta`, `rope_scaling`, `partial_rotary_factor` and
        Gemma 3's `rope_local_base_freq`.
      layer_type: "full_attention" or "sliding_attention".
      max_length: max_position_embeddings.

    Raises:
      CheckpointError: a value is missing or out of range.
      UnsupportedError: an unknown rope type.
    """
    params, theta = _select(fields, layer_type, model_type)
    name = "rope_type" if "rope_type" in params else "type"
    rope_type = params.text(name, "default")
    if model_type == "phi3" and rope_type in ("su", "yarn"):
        rope_type = "longrope"  # its name in the first releases of Phi-3
    if rope_type not in ROPE_TYPES:
        raise UnsupportedError(
            f"{fields.file or 'config'}: {params.prefix}{name} {rope_type!r:.80} is not supported; "
            f"supported are {', '.join(ROPE_TYPES)}"
        )
    source = params if "partial_rotary_factor" in params else fields
    # The small addition keeps 100 * (29 / 100) from becoming 28.
    rotary_dim = int(head_dim * source.number("partial_rotary_factor", 0, 1, 1.0) + 1e-6)
    if rotary_dim < 2 or rotary_dim % 2:
        raise source.error(
            "partial_rotary_factor", f"rotates {rotary_dim} dimensions: not an even number"
        )
    common: dict[str, Any] = {"rotary_dim": rotary_dim, "theta": theta, "rope_type": rope_type}
    if rope_type == "default":
        return RopeConfig(**common)
    if rope_type == "linear":
        return RopeConfig(**common, factor=_factor(params))
    if rope_type == "dynamic":
        return RopeConfig(**common, factor=_factor(params), original_length=max_length)

    original_length = _original_length(fields, params, max_length)
    common["original_length"] = original_length
    if rope_type == "llama3":
        low = params.number("low_freq_factor", 0, 1e6)
        return RopeConfig(
            **common,
            factor=_factor(params),
            low_freq_factor=low,
            high_freq_factor=params.number("high_freq_factor", low, 1e6),
        )
    factor = _factor(params, max_length / original_length)
    if rope_type == "yarn":
        # beta_fast and beta_slow of 0 mean "not given", as in transformers.
        return RopeConfig(
            **common,
            factor=factor,
            attention_factor=_yarn_attention_factor(params, factor),
            beta_fast=params.number("beta_fast", -1e-9, 1e6, 32.0) or 32.0,
            beta_slow=params.number("beta_slow", -1e-9, 1e6, 1.0) or 1.0,
            truncate=params.flag("truncate", True),
        )
    grown = math.sqrt(1 + math.log(factor) / math.log(original_length)) if factor > 1 else 1.0
    return RopeConfig(
        **common,
        factor=factor,
        attention_factor=params.number("attention_factor", 0, 1e6, grown),
        short_factor=params.numbers("short_factor", rotary_dim // 2, 0, 1e12),
        long_factor=params.numbers("long_factor", rotary_dim // 2, 0, 1e12),
    )


def _select(fields: Fields, layer_type: str, model_type: str) -> tuple[Fields, float]:
    """The parameters that hold for this layer type, and theta."""
    name = "rope_parameters" if "rope_parameters" in fields else "rope_scaling"
    nested = False
    params = Fields({}, fields.file)
    if name in fields:
        params = fields.section(name)
        nested = any(kind in params.values for kind in _GEMMA3_THETA)
        if nested:
            params = params.section(layer_type)
        elif model_type == "gemma3_text" and layer_type == "sliding_attention":
            params = Fields({}, fields.file)
    default = 1e4
    if model_type == "gemma3_text":
        default = _GEMMA3_THETA[layer_type]
        if layer_type == "sliding_attention":
            default = fields.number("rope_local_base_freq", 1, 1e12, default)
            return params, params.number("rope_theta", 1, 1e12, default)
    source = params if "rope_theta" in params else fields
    return params, source.number("rope_theta", 1, 1e12, default)


def _factor(params: Fields, default: float | None = None) -> float:
    if default is None:
        return params.number("factor", 0, 1e6)
    return params.number("factor", 0, 1e6, default)


def _original_length(fields: Fields, params: Fields, max_length: int) -> int:
    # Phi-3 keeps it outside the rope section, and that one wins.
    name = "original_max_position_embeddings"
    source = fields if name in fields else params
    return source.integer(name, 2, 1 << 30, max_length)


def _yarn_attention_factor(params: Fields, factor: float) -> float:
    def growth(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    weight = params.number("mscale", -1e-9, 1e6, 0.0)
    weight_all = params.number("mscale_all_dim", -1e-9, 1e6, 0.0)
    default = growth(weight) / growth(weight_all) if weight and weight_all else growth(1.0)
    return params.number("attention_factor", 0, 1e6, default)
