"""Attention of whole sequences without a cache, in plain array operations, which have gradients.

(Kernels have none, and neither does it pay to take gradients through pages.)
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.kv_update.turn import turn
from pallas_kernels.paged_attention import AttentionSpec


def attend_whole(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    sequences: int,
    spec: AttentionSpec,
    *,
    rope: tuple[jax.Array, jax.Array] | None,
    q_norm: jax.Array | None,
    k_norm: jax.Array | None,
    norm_eps: float,
    sinks: jax.Array | None,
) -> jax.Array:
    """Causal attention within each of `sequences` sequences of one length.

    Args:
      q: float32 [T, num_heads * head_dim]. k, v: float32 [T, num_kv_heads * head_dim]. One
        sequence lies after the other.
      rope, q_norm, k_norm, norm_eps, sinks: see `ops.paged_attention`.

    Returns:
      float32 [T, num_heads * head_dim].
    """
    size, group = spec.head_dim, spec.num_heads // spec.num_kv_heads
    q = turn(q.reshape(len(q), -1, size), rope, q_norm, norm_eps) * spec.scale
    k = turn(k.reshape(len(k), -1, size), rope, k_norm, norm_eps)
    length = len(q) // sequences
    q = q.reshape(sequences, length, spec.num_kv_heads, group, size)
    k, v = (x.reshape(sequences, length, spec.num_kv_heads, size) for x in (k, v))
    scores = jnp.einsum("sqhgd,skhd->shgqk", q, k, precision="highest")
    if spec.soft_cap is not None:
        scores = spec.soft_cap * jnp.tanh(scores / spec.soft_cap)
    distance = jnp.arange(length)[:, None] - jnp.arange(length)
    visible = distance >= 0
    if spec.sliding_window is not None:
        visible &= distance < spec.sliding_window
    scores = jnp.where(visible, scores, -jnp.inf)
    if sinks is None:
        weights = jax.nn.softmax(scores, axis=-1)
    else:
        sink = jnp.broadcast_to(sinks.reshape(-1, group, 1, 1), (*scores.shape[:-1], 1))
        weights = jax.nn.softmax(jnp.concatenate([scores, sink], -1), axis=-1)[..., :-1]
    out = jnp.einsum("shgqk,skhd->sqhgd", weights, v, precision="highest")
    return out.reshape(sequences * length, -1)
