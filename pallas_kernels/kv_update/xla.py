"""The portable implementation: a scatter of encoded rows."""

from __future__ import annotations

import jax

from pallas_kernels.kv_update.places import heads_of, places
from pallas_kernels.paged_attention.pages import Pages, encode


def kv_update(
    k: jax.Array,
    v: jax.Array,
    k_pages: Pages,
    v_pages: Pages,
    *,
    block_table: jax.Array,
    query_start_loc: jax.Array,
    seq_lens: jax.Array,
    rope: tuple[jax.Array, jax.Array] | None,
    k_norm: jax.Array | None,
    norm_eps: float,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
) -> tuple[Pages, Pages]:
    """See `pallas_kernels.kv_update.api.kv_update`."""
    head_dim = k.shape[1] // k_pages.values.shape[1]
    at = places(len(k), k_pages, block_table, query_start_loc, seq_lens)
    keys = heads_of(k, head_dim, k_pages.dtype, rope, k_norm, norm_eps)

    def stored(pages: Pages, x: jax.Array, scale: jax.Array | None) -> Pages:
        def put(array: jax.Array, new: jax.Array) -> jax.Array:
            return array.at[at.page, :, at.slot].set(new, mode="drop")

        return jax.tree.map(put, pages, encode(x, pages.dtype, scale))

    values = v.reshape(keys.shape)
    return stored(k_pages, keys, k_scale), stored(v_pages, values, v_scale)
