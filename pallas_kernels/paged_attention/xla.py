"""The portable implementation: gathers each sequence's pages and masks what a token may not see.

Queries go one tile of tokens at a time, so that the gathered keys and the scores of a long prompt
stay small.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from pallas_kernels.kv_update.pages import Basis, Pages, decode, turned, turns_values
from pallas_kernels.kv_update.places import heads_of, places
from pallas_kernels.paged_attention.spec import AttentionSpec

_TILE = 64  # tokens whose scores are in memory together


def attend(
    q: jax.Array,
    k_pages: Pages,
    v_pages: Pages,
    *,
    spec: AttentionSpec,
    block_table: jax.Array,
    query_start_loc: jax.Array,
    seq_lens: jax.Array,
    rope: tuple[jax.Array, jax.Array] | None,
    q_norm: jax.Array | None,
    norm_eps: float,
    sinks: jax.Array | None,
    k_scale: jax.Array | None,
    v_scale: jax.Array | None,
    basis: Basis | None,
) -> jax.Array:
    """See `pallas_kernels.paged_attention.after_update.after_update`."""
    tokens, page_size = q.shape[0], k_pages.page_size
    q = heads_of(
        q, spec.head_dim, k_pages.dtype, rope, q_norm, norm_eps, k_scale, basis and basis.queries
    )
    at = places(tokens, k_pages, block_table, query_start_loc, seq_lens)

    keys_at = jnp.arange(block_table.shape[1] * page_size)
    group = spec.num_heads // spec.num_kv_heads

    def attend(tile: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        q, owner, position = tile  # [M, Hq, D], [M], [M]

        def gathered(pages: Pages, scale: jax.Array | None) -> jax.Array:
            taken = jax.tree.map(lambda a: a[block_table[owner]].swapaxes(2, 3), pages)
            rows = decode(taken, scale).reshape(len(q), -1, spec.num_kv_heads, spec.head_dim)
            return rows.swapaxes(1, 2)

        q = q.reshape(len(q), spec.num_kv_heads, group, spec.head_dim) * spec.scale
        precision = jax.lax.Precision.HIGHEST
        scores = jnp.einsum("mhgd,mhkd->mhgk", q, gathered(k_pages, k_scale), precision=precision)
        if spec.soft_cap is not None:
            scores = spec.soft_cap * jnp.tanh(scores / spec.soft_cap)
        visible = keys_at <= position[:, None]
        if spec.sliding_window is not None:
            visible &= keys_at > position[:, None] - spec.sliding_window
        scores = jnp.where(visible[:, None, None], scores, -jnp.inf)
        if sinks is None:
            weights = jax.nn.softmax(scores, axis=-1)
        else:
            sink = jnp.broadcast_to(sinks.reshape(1, -1, group, 1), (*scores.shape[:3], 1))
            weights = jax.nn.softmax(jnp.concatenate([scores, sink], -1), axis=-1)[..., :-1]
        out = jnp.einsum(
            "mhgk,mhkd->mhgd", weights, gathered(v_pages, v_scale), precision=precision
        )
        return (turned(out) if turns_values(v_pages.dtype) else out).reshape(len(q), -1)

    tile = math.gcd(tokens, _TILE) if tokens > _TILE else tokens
    # Padding looks at position 0 of the last sequence: finite, and thrown away.
    tiles = [x.reshape(tokens // tile, tile, *x.shape[1:]) for x in (q, at.owner, at.position)]
    out = jax.lax.map(attend, tuple(tiles)).reshape(tokens, -1)
    return jnp.where(at.real[:, None], out, 0.0)
