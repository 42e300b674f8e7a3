"""Queries as the kernels for accelerators take them, and outputs from what they give."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.kv_update.pages import Basis, turned, turns_values
from pallas_kernels.kv_update.places import heads_of
from pallas_kernels.paged_attention.spec import AttentionSpec


def is_exact(spec: AttentionSpec, dtype: str) -> bool:
    """Whether products with pages of `dtype` are of float32, of which nothing is rounded."""
    return spec.exact or dtype == "float32"


def scaled_queries(
    q: jax.Array,
    dtype: str,
    spec: AttentionSpec,
    rope: tuple[jax.Array, jax.Array] | None,
    weight: jax.Array | None,
    eps: float,
    k_scale: jax.Array | None,
    basis: Basis | None,
) -> jax.Array:
    """Queries that meet the numbers, or codes, in pages of `dtype`: normed, turned, and times the
    scale of the scores and `k_scale`, which is [1] or [num_kv_heads].

    Returns:
      [T, num_kv_heads, group, head_dim], float32 where products are exact, otherwise bfloat16. The
      kernels' products are of this type.
    """
    heads = heads_of(q, spec.head_dim, dtype, rope, weight, eps, k_scale, basis and basis.queries)
    heads = heads.reshape(len(q), spec.num_kv_heads, -1, spec.head_dim) * spec.scale
    if k_scale is not None:
        heads = heads * k_scale[:, None, None]
    return heads if is_exact(spec, dtype) else heads.astype(jnp.bfloat16)


def outputs(
    out: jax.Array, dtype: str, spec: AttentionSpec, v_scale: jax.Array | None
) -> jax.Array:
    """What attention gives, from sums of what pages of `dtype` hold, float32 [T, num_heads *
    head_dim]: times `v_scale`, which is [1] or [num_kv_heads], and turned back."""
    heads = out.reshape(len(out), spec.num_kv_heads, -1, spec.head_dim)
    if v_scale is not None:
        heads = heads * v_scale[:, None, None]
    return (turned(heads) if turns_values(dtype) else heads).reshape(out.shape)
