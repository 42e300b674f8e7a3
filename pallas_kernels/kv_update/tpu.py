"""Cache update on TPUs: pages that get new tokens go through VMEM once each, and are blended there.

A row of a page is a part of a tile of memory, which cannot be written alone. Pages are to come in
row-major order: XLA, left alone, lays arrays out without padding, and where head_dim, or for scales
page_size, is no multiple of 128, copies them whole before and after. Pages of 128 tokens suit a TPU
best.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import platform
from pallas_kernels.kv_update.pages import Basis, Pages, encode
from pallas_kernels.kv_update.places import heads_of, owners, values_of


class Windows(NamedTuple):
    """Pages that get new tokens, int32 [W]; there are more than any batch of these shapes needs.

    Attributes:
      page: each one once; where a window is not needed, the page of the one before it.
      low, high: slots that are new; none where the window is not needed.
      first: the token that goes to slot 0, if that were new, too.
    """

    page: jax.Array
    low: jax.Array
    high: jax.Array
    first: jax.Array


def windows(
    tokens: int,
    page_size: int,
    block_table: jax.Array,
    query_start_loc: jax.Array,
    seq_lens: jax.Array,
) -> Windows:
    """See `paged_attention.api` for the arguments."""
    sequences = len(seq_lens)
    bound = min(tokens, (tokens + min(tokens, sequences) * (2 * page_size - 2)) // page_size)
    begin = seq_lens - jnp.diff(query_start_loc)
    first_block = begin // page_size
    needed = jnp.where(begin < seq_lens, -(-seq_lens // page_size) - first_block, 0)
    ends = jnp.cumsum(needed)
    index = jnp.arange(bound)
    used = index < ends[-1]
    index = jnp.minimum(index, jnp.maximum(ends[-1] - 1, 0))
    owner = owners(ends, index)
    block = first_block[owner] + index - (ends - needed)[owner]
    block = jnp.clip(block, 0, block_table.shape[1] - 1)
    start = block * page_size
    low = jnp.maximum(begin[owner] - start, 0)
    high = jnp.where(used, jnp.minimum(seq_lens[owner] - start, page_size), 0)
    first = query_start_loc[owner] + start - begin[owner]
    fields = (x.astype(jnp.int32) for x in (block_table[owner, block], low, high, first))
    return Windows(*fields)


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
    interpret = platform.interprets("tpu")
    tokens, dtype, page_size = len(k), k_pages.dtype, k_pages.page_size
    head_dim = k.shape[1] // k_pages.values.shape[1]
    if not tokens:
        return k_pages, v_pages
    keys = heads_of(k, head_dim, dtype, rope, k_norm, norm_eps, k_scale, basis and basis.keys)
    values = values_of(v, head_dim, dtype)
    new = encode(keys, dtype, k_scale), encode(values, dtype, v_scale)
    at = windows(tokens, page_size, block_table, query_start_loc, seq_lens)
    token = jnp.clip(at.first[:, None] + jnp.arange(page_size), 0, tokens - 1)
    rows = jax.tree.map(lambda x: x[token].swapaxes(1, 2), new)  # [W, H, page_size, ...]
    from pallas_kernels.kv_update import tpu_kernel

    flat, tree = jax.tree.flatten((k_pages, v_pages))
    flat = tpu_kernel.blend(at.page, at.low, at.high, jax.tree.leaves(rows), flat, interpret)
    return jax.tree.unflatten(tree, flat)
