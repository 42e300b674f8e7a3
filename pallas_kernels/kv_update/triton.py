"""Cache update on GPUs: one program a token quantizes its keys and values and stores them.

Norm, rope and the Hadamard transform are left to XLA, which fuses them with those of the queries.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels import platform
from pallas_kernels.kv_update.places import heads_of, places
from pallas_kernels.paged_attention.pages import Pages, encode_parts


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
    interpret = platform.interprets("gpu")
    tokens, heads = len(k), k_pages.values.shape[1]
    head_dim = k.shape[1] // heads
    at = places(tokens, k_pages, block_table, query_start_loc, seq_lens)
    keys = heads_of(k, head_dim, k_pages.dtype, rope, k_norm, norm_eps)
    scales = [jnp.ones(1) if scale is None else scale for scale in (k_scale, v_scale)]
    scales = [jnp.broadcast_to(scale, heads) for scale in scales]
    flat, tree = jax.tree.flatten((k_pages, v_pages))
    before = [at.page, at.slot, keys, v.reshape(keys.shape), *scales]
    out = pl.pallas_call(
        partial(_kernel, dtype=k_pages.dtype, tree=tree),
        grid=(tokens,),
        out_shape=[jax.ShapeDtypeStruct(a.shape, a.dtype) for a in flat],
        input_output_aliases={len(before) + i: i for i in range(len(flat))},
        interpret=interpret,
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=1),
        name="kv_update",
    )(*before, *flat)
    return jax.tree.unflatten(tree, out)


def _kernel(page_ref, slot_ref, k_ref, v_ref, k_scale_ref, v_scale_ref, *refs, dtype, tree):
    heads, head_dim = k_ref.shape[1:]
    token = pl.program_id(0)
    page, slot = page_ref[token], slot_ref[token]
    parts = 2 if dtype == "int4" else 1
    width = head_dim // parts
    head = jnp.arange(pl.next_power_of_2(heads))
    column = jnp.arange(pl.next_power_of_2(width))
    # Arrays have powers of two for sizes: what is beyond repeats the last element, which changes
    # no maximum, and is not stored.
    near_head, near_column = jnp.minimum(head, heads - 1), jnp.minimum(column, width - 1)
    shape = len(head), len(column)
    out_refs = jax.tree.unflatten(tree, refs[len(refs) // 2 :])
    cached = page < out_refs[0].values.shape[0]
    row_mask = (head < heads) & cached
    mask = row_mask[:, None] & (column < width)[None]

    def grid(rows, columns):
        return jnp.broadcast_to(rows[:, None], shape), jnp.broadcast_to(columns[None], shape)

    inputs = (k_ref, k_scale_ref), (v_ref, v_scale_ref)
    for (ref, scale_ref), pages in zip(inputs, out_refs, strict=True):
        rows = [
            plt.load(ref.at[(token, *grid(near_head, near_column + i * width))])
            for i in range(parts)
        ]
        new = encode_parts(rows, dtype, plt.load(scale_ref.at[near_head]))
        rows_at, columns_at = grid(head, column)
        plt.store(pages.values.at[page, rows_at, slot, columns_at], new.values, mask=mask)
        for target, value in zip(pages[1:], new[1:], strict=True):
            if target is not None:
                plt.store(target.at[page, head, slot], value, mask=row_mask)
