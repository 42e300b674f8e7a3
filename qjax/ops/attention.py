"""Attention over the paged cache."""

from __future__ import annotations

import jax

from pallas_kernels import paged_attention as kernels
from pallas_kernels.paged_attention import AttentionSpec
from qjax.kv_cache import Batch


def paged_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    layer_cache: tuple[jax.Array, jax.Array],
    batch: Batch,
    spec: AttentionSpec,
    *,
    rope: tuple[jax.Array, jax.Array] | None = None,
    q_norm: jax.Array | None = None,
    k_norm: jax.Array | None = None,
    norm_eps: float = 0.0,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Writes k and v of the batch's tokens to the cache and attends with q.

    Args:
      q: float32 [T, num_heads * head_dim]. k, v: float32 [T, num_kv_heads * head_dim].
      layer_cache: (k_pages, v_pages) of this layer.
      rope: (cos, sin), float32 [T, rotary_dim / 2].
      q_norm, k_norm: float32 [head_dim], norms of each head before rope, with `norm_eps`.

    Returns:
      float32 [T, num_heads * head_dim], and the layer's cache.
    """
    out, k_pages, v_pages = kernels.paged_attention(
        q,
        k,
        v,
        *layer_cache,
        spec=spec,
        block_table=batch.block_table,
        query_start_loc=batch.query_start_loc,
        seq_lens=batch.seq_lens,
        rope=rope,
        q_norm=q_norm,
        k_norm=k_norm,
        norm_eps=norm_eps,
    )
    return out, (k_pages, v_pages)
