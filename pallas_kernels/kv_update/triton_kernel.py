"""The kernel of cache updates on GPUs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels.kv_update.pages import Pages, encode_parts


def store(
    page: jax.Array,
    slot: jax.Array,
    new: Sequence[tuple[jax.Array, jax.Array]],
    pages: tuple[Pages, Pages],
    interpret: bool,
) -> tuple[Pages, Pages]:
    """Encodes heads of tokens into their slots, in place.

    Args:
      page, slot: int32 [T]; a page beyond the last one for tokens that are not stored.
      new: of keys and of values, float32 [T, H, D], and the scale of each head, float32 [H].
    """
    flat, tree = jax.tree.flatten(pages)
    before = [page, slot, *(array for pair in new for array in pair)]
    out = pl.pallas_call(
        partial(_kernel, dtype=pages[0].dtype, tree=tree),
        grid=(len(page),),
        out_shape=[jax.ShapeDtypeStruct(a.shape, a.dtype) for a in flat],
        input_output_aliases={len(before) + i: i for i in range(len(flat))},
        interpret=interpret,
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=1),
        name="kv_update",
    )(*before, *flat)
    return jax.tree.unflatten(tree, out)


def _kernel(page_ref, slot_ref, k_ref, k_scale_ref, v_ref, v_scale_ref, *refs, dtype, tree):
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
        new = encode_parts(rows, dtype, plt.load(scale_ref.at[near_head]), width)
        rows_at, columns_at = grid(head, column)
        plt.store(pages.values.at[page, rows_at, slot, columns_at], new.values, mask=mask)
        for target, value in zip(pages[1:], new[1:], strict=True):
            if target is not None:
                plt.store(target.at[page, head, slot], value, mask=row_mask)
