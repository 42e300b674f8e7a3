"""The portable implementation: a scatter of encoded rows."""

from __future__ import annotations

from functools import partial

import jax

from pallas_kernels.kv_update.pages import Basis, Pages, encode
from pallas_kernels.kv_update.places import Places, heads_of, places, values_of


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
    basis: Basis | None = None,
) -> tuple[Pages, Pages]:
    """See `pallas_kernels.kv_update.api.kv_update`."""
    head_dim = k.shape[1] // k_pages.values.shape[1]
    at = places(len(k), k_pages, block_table, query_start_loc, seq_lens)
    keys = heads_of(
        k, head_dim, k_pages.dtype, rope, k_norm, norm_eps, k_scale, basis and basis.keys
    )
    values = values_of(v, head_dim, v_pages.dtype)
    new = encode(keys, k_pages.dtype, k_scale), encode(values, v_pages.dtype, v_scale)
    return jax.tree.map(partial(scatter, at), (k_pages, v_pages), new)


def scatter(at: Places, array: jax.Array, new: jax.Array) -> jax.Array:
    """An array [P, H, page_size, ...] of pages, with what is new of each token, [T, H, ...]."""
    return array.at[at.page, :, at.slot].set(new, mode="drop")
