"""The kernel of attention over a paged cache on GPUs."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels import words
from pallas_kernels.kv_update.pages import Pages, zero_points
from pallas_kernels.paged_attention.spec import AttentionSpec
from pallas_kernels.paged_attention.tiles import Tiles

if TYPE_CHECKING:
    from pallas_kernels.paged_attention.triton import Blocks


class _Operands(NamedTuple):
    tiles: Tiles
    block_table: Any
    q: Any
    sinks: Any
    k_pages: Pages
    v_pages: Pages


def attend(
    q: jax.Array,
    tiles: Tiles,
    block_table: jax.Array,
    k_pages: Pages,
    v_pages: Pages,
    *,
    sinks: jax.Array | None,
    spec: AttentionSpec,
    sizes: Blocks,
    per_tile: int,
    segments: tuple[int, int],
    interpret: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Attention of tiles of queries over segments of their keys, each with its own maximum.

    Args:
      q: [T, num_heads, head_dim], scaled.
      tiles: of up to `per_tile` tokens.
      sinks: float32 [num_heads].
      segments: their number C, and the keys of each.

    Returns:
      The maximum of the scores [C, T, num_heads], -inf where there are none; the sum of their
      exponentials, less the maximum, likewise; and the sum of values by them (of codes, where those
      have no scale of their own) [C, T, num_heads, head_dim]. All float32; of tokens in no tile,
      unspecified.
    """
    count, length = segments
    flat, tree = jax.tree.flatten(_Operands(tiles, block_table, q, sinks, k_pages, v_pages))
    shape = (count, *q.shape[:2])
    return pl.pallas_call(
        partial(
            _kernel,
            tree=tree,
            spec=spec,
            dtype=k_pages.dtype,
            sizes=sizes,
            per_tile=per_tile,
            length=length,
            by_words=not interpret and q.dtype == jnp.float16,
        ),
        grid=(len(tiles.count), spec.num_kv_heads, count),
        out_shape=[
            jax.ShapeDtypeStruct(shape, jnp.float32),
            jax.ShapeDtypeStruct(shape, jnp.float32),
            jax.ShapeDtypeStruct((*shape, spec.head_dim), jnp.float32),
        ],
        interpret=interpret,
        compiler_params=plt.CompilerParams(num_warps=sizes.num_warps, num_stages=sizes.num_stages),
        name="paged_attention",
    )(*flat)


def _kernel(*refs, tree, spec, dtype, sizes, per_tile, length, by_words):
    refs, (top_ref, total_ref, out_ref) = jax.tree.unflatten(tree, refs[:-3]), refs[-3:]
    tile, head, segment = (pl.program_id(axis) for axis in range(3))
    sequence, first, count, position = (ref[tile] for ref in refs.tiles)
    group = spec.num_heads // spec.num_kv_heads
    parts = 2 if dtype == "int4" else 1
    width = spec.head_dim // parts
    page_size = refs.k_pages.values.shape[2]
    precision = lax.Precision.HIGHEST if refs.q.dtype == jnp.float32 else None
    dot = partial(plt.dot, precision=precision)

    # Sizes are powers of two, and at least 16 where they meet in a product.
    row = jnp.arange(max(16, pl.next_power_of_2(per_tile * group)))
    column = jnp.arange(max(16, pl.next_power_of_2(width)))
    token, q_head = row // group, head * group + row % group
    real = token < count
    q_mask = real[:, None] & (column < width)[None]

    def grid(rows, part):
        shape = len(rows), len(column)
        columns = column + part * width
        return jnp.broadcast_to(rows[:, None], shape), jnp.broadcast_to(columns[None], shape)

    def query(part):
        tokens, columns = grid(first + token, part)
        heads = jnp.broadcast_to(q_head[:, None], tokens.shape)
        return plt.load(refs.q.at[tokens, heads, columns], mask=q_mask, other=0)

    q = [query(part) for part in range(parts)]
    q_sum = sum((x.astype(jnp.float32).sum(1) for x in q), jnp.zeros(row.shape))
    seen_from = jnp.maximum(0, position - (spec.sliding_window or position + 1) + 1)
    seen_to = position + count

    def load(pages, page, slot, mask):
        """Codes of a block of keys, and the scale and the zero point of each."""
        scale, zero = (
            None if ref is None else plt.load(ref.at[page, head, slot], mask=mask, other=0)
            for ref in (pages.scale, pages.zero)
        )
        mask = mask[:, None] & (column < width)[None]
        at, columns = grid(page, 0)
        slots, _ = grid(slot, 0)
        other = jnp.zeros((), pages.values.dtype)
        values = plt.load(pages.values.at[at, head, slots, columns], mask=mask, other=other)
        if dtype == "int4" and by_words:
            values = words.nibbles(values)
        elif dtype == "int8" and by_words:
            values = [words.signed(values)]
        elif dtype == "int4":
            codes = values.astype(jnp.int32)
            values = [codes & 15, codes >> 4]
        else:
            values = [values]
        values = [x.astype(q[0].dtype) for x in values]
        scale = None if scale is None else scale.astype(jnp.float32)
        return values, scale, None if zero is None else zero_points(zero)

    def step(block, carry):
        top, total, offset, out = carry
        key = block * sizes.keys + jnp.arange(sizes.keys)
        mask = (key >= seen_from) & (key < seen_to)
        at = jnp.broadcast_to(sequence, key.shape), key // page_size
        page = plt.load(refs.block_table.at[at], mask=mask, other=0)
        keys, scale, zero = load(refs.k_pages, page, key % page_size, mask)
        score = sum(dot(x, y, trans_b=True) for x, y in zip(q, keys, strict=True))
        if zero is not None:
            score += q_sum[:, None] * zero[None]
        if scale is not None:
            score *= scale[None]
        if spec.soft_cap is not None:
            score = spec.soft_cap * jnp.tanh(score / spec.soft_cap)
        own = (position + token)[:, None]
        visible = mask[None] & (key[None] <= own)
        if spec.sliding_window is not None:
            visible &= key[None] > own - spec.sliding_window
        score = jnp.where(visible, score, -jnp.inf)
        new_top = jnp.maximum(top, score.max(1))
        finite = jnp.where(new_top == -jnp.inf, 0.0, new_top)  # nothing visible yet
        weight = jnp.exp(score - finite[:, None])
        fade = jnp.exp(top - finite)
        total = fade * total + weight.sum(1)
        values, scale, zero = load(refs.v_pages, page, key % page_size, mask)
        if scale is not None:
            weight *= scale[None]
        weight = weight.astype(values[0].dtype)
        if zero is not None:
            offset = fade * offset + (weight.astype(jnp.float32) * zero[None]).sum(1)
        out = [fade[:, None] * x + dot(weight, y) for x, y in zip(out, values, strict=True)]
        return new_top, total, offset, out

    begin = jnp.maximum(seen_from, segment * length) // sizes.keys
    end = pl.cdiv(jnp.minimum(seen_to, (segment + 1) * length), sizes.keys)
    top, total = jnp.full(row.shape, -jnp.inf), jnp.zeros(row.shape)
    if refs.sinks is not None:
        # A score without a value, once.
        sink = plt.load(refs.sinks.at[q_head], mask=real, other=0)
        top = jnp.where(segment == 0, sink, top)
        total = jnp.where(segment == 0, 1.0, total)
    out = [jnp.zeros((len(row), len(column)))] * parts
    top, total, offset, out = lax.fori_loop(begin, end, step, (top, total, total * 0, out))
    at = jnp.broadcast_to(segment, row.shape), first + token, q_head
    plt.store(top_ref.at[at], top, mask=real)
    plt.store(total_ref.at[at], total, mask=real)
    for part, x in enumerate(out):
        if dtype == "int4":
            x += offset[:, None]
        tokens, columns = grid(first + token, part)
        at = (jnp.broadcast_to(i, tokens.shape) for i in (segment, tokens, q_head[:, None]))
        plt.store(out_ref.at[(*at, columns)], x, mask=q_mask)
