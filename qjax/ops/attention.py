"""Attention over the paged cache."""

from __future__ import annotations

from dataclasses import replace

import jax

from pallas_kernels import paged_attention as kernels
from pallas_kernels.kv_update.pages import FP8
from pallas_kernels.kv_update.turn import turn
from pallas_kernels.paged_attention import AttentionSpec
from qjax.kv_cache import Batch, LayerCache
from qjax.ops.whole_attention import attend_whole


def paged_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    layer_cache: LayerCache | None,
    batch: Batch,
    spec: AttentionSpec,
    *,
    rope: tuple[jax.Array, jax.Array] | None = None,
    q_norm: jax.Array | None = None,
    k_norm: jax.Array | None = None,
    norm_eps: float = 0.0,
    cache_scales: tuple[jax.Array, jax.Array] | None = None,
    sinks: jax.Array | None = None,
) -> tuple[jax.Array, LayerCache | None]:
    """Writes k and v of the batch's tokens to the cache and attends with q.

    Args:
      q: float32 [T, num_heads * head_dim]. k, v: float32 [T, num_kv_heads * head_dim].
      layer_cache: of this layer; None where nothing is cached and the batch is of whole sequences
        of one length: see `whole_attention`, which has gradients.
      rope: (cos, sin), float32 [T, rotary_dim / 2].
      q_norm, k_norm: float32 [head_dim], norms of each head before rope, with `norm_eps`.
      cache_scales: of k and of v, float32 [1] or [num_kv_heads], for a cache of an 8-bit float;
        others do without.
      sinks: float32 [num_heads], see the kernel.

    Returns:
      float32 [T, num_heads * head_dim], and the layer's cache.
    """
    if layer_cache is None:
        heads = {"rope": rope, "q_norm": q_norm, "k_norm": k_norm, "norm_eps": norm_eps}
        return attend_whole(q, k, v, len(batch.seq_lens), spec, sinks=sinks, **heads), None
    k_scale = v_scale = None
    if layer_cache.keys.dtype in FP8:
        k_scale, v_scale = cache_scales or (None, None)
    out, k_pages, v_pages = kernels.paged_attention(
        q,
        k,
        v,
        layer_cache.keys,
        layer_cache.values,
        spec=replace(spec, exact=batch.numerics == "exact"),
        block_table=batch.block_table,
        query_start_loc=batch.query_start_loc,
        seq_lens=batch.seq_lens,
        rope=rope,
        q_norm=q_norm,
        k_norm=k_norm,
        norm_eps=norm_eps,
        sinks=sinks,
        k_scale=k_scale,
        v_scale=v_scale,
        basis=layer_cache.basis,
    )
    seen = layer_cache.seen
    if seen is not None:
        seen = tuple(
            turn(x.reshape(len(x), -1, spec.head_dim), None, weight, norm_eps)
            for x, weight in ((k, k_norm), (q, q_norm))
        )
    return out, layer_cache._replace(keys=k_pages, values=v_pages, seen=seen)


def rotate(heads: jax.Array, rope: tuple[jax.Array, jax.Array]) -> jax.Array:
    """heads float32 [T, H, D] by (cos, sin), float32 [T, D / 2], pairs half apart, where attention
    itself is not to rotate all of a head."""
    return turn(heads, rope)
