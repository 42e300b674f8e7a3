"""Attention over the paged cache."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels import paged_attention as kernels
from pallas_kernels.paged_attention import AttentionSpec
from qjax.kv_cache import Batch
from qjax.ops.activations import divide, rms_norm


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
    cache_scales: tuple[jax.Array, jax.Array] | None = None,
    sinks: jax.Array | None = None,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Writes k and v of the batch's tokens to the cache and attends with q.

    Args:
      q: float32 [T, num_heads * head_dim]. k, v: float32 [T, num_kv_heads * head_dim].
      layer_cache: (k_pages, v_pages) of this layer.
      rope: (cos, sin), float32 [T, rotary_dim / 2].
      q_norm, k_norm: float32 [head_dim], norms of each head before rope, with `norm_eps`.
      cache_scales: of k and of v, float32 [1] or [num_kv_heads]. Both are then rounded to
        float8_e4m3 in multiples of these on their way into the cache, k after rope.
      sinks: float32 [num_heads], see the kernel.

    Returns:
      float32 [T, num_heads * head_dim], and the layer's cache.
    """
    if cache_scales is not None:
        turn = partial(_turn, rope=rope, eps=norm_eps, head_dim=spec.head_dim)
        q, k = turn(q, weight=q_norm), turn(k, weight=k_norm)
        k, v = (
            _rounded(x, scale, spec.head_dim) for x, scale in zip((k, v), cache_scales, strict=True)
        )
        rope = q_norm = k_norm = None
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
        sinks=sinks,
    )
    return out, (k_pages, v_pages)


def _turn(
    x: jax.Array,
    rope: tuple[jax.Array, jax.Array] | None,
    weight: jax.Array | None,
    eps: float,
    head_dim: int,
) -> jax.Array:
    """RMSNorm of each head of x [T, H * head_dim], then rope, as the kernels do it."""
    heads = x.reshape(len(x), -1, head_dim)
    if weight is not None:
        heads = rms_norm(heads, weight, eps)
    if rope is not None:
        cos, sin = (table[:, None] for table in rope)
        half = cos.shape[-1]
        x1, x2, rest = heads[..., :half], heads[..., half : 2 * half], heads[..., 2 * half :]
        heads = jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin, rest], axis=-1)
    return heads.reshape(x.shape)


def _rounded(x: jax.Array, scale: jax.Array, head_dim: int) -> jax.Array:
    """x [T, H * head_dim] in multiples of the scales [1] or [H] that float8_e4m3 holds."""
    heads = x.reshape(len(x), -1, head_dim)
    scale = scale[:, None]
    small = jnp.clip(divide(heads, scale), -448, 448).astype(jnp.float8_e4m3fn)
    return (small.astype(jnp.float32) * scale).reshape(x.shape)
