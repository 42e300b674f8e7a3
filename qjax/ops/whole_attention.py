"""Attention of whole sequences without a cache, in plain array operations, which have gradients.

(Kernels have none, and neither does it pay to take gradients through pages.) Queries go by tiles,
each with the keys that it may see: what none of them sees is not computed, and the scores of a tile
stay in a processor's cache.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.kv_update.turn import turn
from pallas_kernels.paged_attention import AttentionSpec

_TILE, _TILES = 64, 4  # queries of one, at least; how many there are, at most: each is compiled


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
    q = q.reshape(sequences, length, spec.num_kv_heads, group, size).transpose(0, 2, 3, 1, 4)
    k, v = (x.reshape(sequences, length, -1, size).swapaxes(1, 2) for x in (k, v))

    def tile(first: int, end: int) -> jax.Array:
        """Of the queries from first to end: [sequences, num_kv_heads, group, end - first, D]."""
        start = 0 if spec.sliding_window is None else max(0, first - spec.sliding_window + 1)
        keys, values = k[:, :, start:end], v[:, :, start:end]
        scores = jnp.einsum("shgqd,shkd->shgqk", q[:, :, :, first:end], keys, precision="highest")
        if spec.soft_cap is not None:
            scores = spec.soft_cap * jnp.tanh(scores / spec.soft_cap)
        distance = jnp.arange(first, end)[:, None] - jnp.arange(start, end)
        visible = distance >= 0
        if spec.sliding_window is not None:
            visible &= distance < spec.sliding_window
        scores = jnp.where(visible, scores, -jnp.inf)
        if sinks is None:
            weights = jax.nn.softmax(scores, axis=-1)
        else:
            sink = jnp.broadcast_to(sinks.reshape(-1, group, 1, 1), (*scores.shape[:-1], 1))
            weights = jax.nn.softmax(jnp.concatenate([scores, sink], -1), axis=-1)[..., :-1]
        return jnp.einsum("shgqk,shkd->shgqd", weights, values, precision="highest")

    step = max(_TILE, -(-length // _TILES))
    tiles = [tile(first, min(first + step, length)) for first in range(0, length, step)]
    return jnp.concatenate(tiles, 3).transpose(0, 3, 1, 2, 4).reshape(sequences * length, -1)
