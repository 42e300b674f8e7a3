"""Scales of a quantized key-value cache, under the names that the tools give them.

All mean the same: what is cached is x / scale, rounded, and x is about the cached value * scale.
They belong to no linear layer, so that formats need not know them.
"""

from __future__ import annotations

import re

# Tool and name, below "...self_attn.":
#   LLM Compressor               k_scale, v_scale (one number, or one a head)
#   ModelOpt                     k_proj.k_scale, v_proj.v_scale
#   Quark, AutoFP8               k_proj.output_scale, v_proj.output_scale
#   joined projections           qkv_proj.k_scale, qkv_proj.v_scale
#   older ones                   kv_scale, for both
#   HunYuan                      k_cache.scale, v_cache.scale
_NAMES = (
    re.compile(r"(?P<attention>.+\.self_attn)\.(?P<which>[kv])_scale"),
    re.compile(r"(?P<attention>.+\.self_attn)\.(?P<which>[kv])_proj\.(?P=which)_scale"),
    re.compile(r"(?P<attention>.+\.self_attn)\.(?P<which>[kv])_proj\.output_scale"),
    re.compile(r"(?P<attention>.+\.self_attn)\.qkv_proj\.(?P<which>[kv])_scale"),
    re.compile(r"(?P<attention>.+\.self_attn)\.(?P<which>[kv])_cache\.scale"),
    re.compile(r"(?P<attention>.+\.self_attn)\.(?P<which>kv)_scale"),
)
# Scales of what is not cached, and which is therefore not rounded here.
_OTHERS = re.compile(
    r".+\.self_attn\.(q_scale|q_proj\.(q_scale|output_scale)|qkv_proj\.q_scale|q\.scale|prob_scale|"
    r"prob_output_scale)"
)
_ZERO_POINT = re.compile(r".+\.self_attn\.([qkv]_zero_point|k_proj\.k_bias|v_proj\.v_bias)")


def canonical(name: str) -> str | None:
    """ "...self_attn.k_scale", v_scale or kv_scale for a tensor that is one; None for others.

    Args:
      name: a stored tensor, by its Hugging Face name.
    """
    for pattern in _NAMES:
        match = pattern.fullmatch(name)
        if match:
            return f"{match['attention']}.{match['which']}_scale"
    return None


def is_other(name: str) -> bool:
    """Whether a tensor is a scale of queries or of attention weights."""
    return _OTHERS.fullmatch(name) is not None


def is_zero_point(name: str) -> bool:
    """Whether a tensor is a zero point of LLM Compressor's queries, keys or values, or what
    ModelOpt takes from keys and values first."""
    return _ZERO_POINT.fullmatch(name) is not None
