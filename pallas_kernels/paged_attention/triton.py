"""Attention over a paged cache on GPUs: flash attention that reads pages through the block table.

A program has a tile of the queries of one sequence, all that read one kv head, and goes over a
segment of its keys with a running maximum and sum (FlashAttention, arXiv 2205.14135). Where there
are few tokens, segments of one sequence run side by side and are put together afterwards. Segments
are of a length that depends on shapes only, and start at fixed positions, so that a sequence gets
the same numbers whatever else is in its batch.

Codes meet queries and weights as they are; scales and zero points go on scores and weights:
score_j = s_j (q . code_j + zero_j sum(q)), and out = sum_j (p_j s_j) (code_j + zero_j).
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels import platform
from pallas_kernels.kv_update import triton as kv_update
from pallas_kernels.kv_update.places import heads_of
from pallas_kernels.paged_attention.pages import Pages
from pallas_kernels.paged_attention.spec import AttentionSpec
from pallas_kernels.paged_attention.tiles import Tiles, tiles, tokens_per_tile

SEGMENT = 512  # keys
MAX_SEGMENTS = 64
MAX_SPLIT_TOKENS = 256  # more fill a GPU, and their partial sums would be large


class Blocks(NamedTuple):
    """Sizes that a kernel runs with: rows of queries and keys that meet at a time."""

    rows: int
    keys: int
    num_warps: int
    num_stages: int


def blocks(head_dim: int, dtype: str) -> Blocks:
    """What fits the registers and shared memory of a multiprocessor."""
    if dtype == "float32":
        return Blocks(32, 32, 4, 1)
    if head_dim > 128:
        return Blocks(64, 32, 8, 2)
    return Blocks(64, 64, 4, 2)


def segments(tokens: int, keys: int) -> tuple[int, int]:
    """How many segments the keys of a sequence, at most `keys`, fall into, and of how many each."""
    if tokens > MAX_SPLIT_TOKENS or keys <= SEGMENT:
        return 1, keys
    length = SEGMENT * -(-keys // (SEGMENT * MAX_SEGMENTS))
    return -(-keys // length), length


class _Operands(NamedTuple):
    tiles: Tiles
    block_table: Any
    q: Any
    sinks: Any
    k_scale: Any
    v_scale: Any
    k_pages: Pages
    v_pages: Pages


def paged_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    k_pages: Pages,
    v_pages: Pages,
    *,
    spec: AttentionSpec,
    block_table: jax.Array,
    query_start_loc: jax.Array,
    seq_lens: jax.Array,
    rope: tuple[jax.Array, jax.Array] | None,
    q_norm: jax.Array | None,
    k_norm: jax.Array | None,
    norm_eps: float,
    sinks: jax.Array | None = None,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
) -> tuple[jax.Array, Pages, Pages]:
    """See `pallas_kernels.paged_attention.api.paged_attention`."""
    interpret = platform.interprets("gpu")
    dtype = k_pages.dtype
    k_pages, v_pages = kv_update.kv_update(
        k,
        v,
        k_pages,
        v_pages,
        block_table=block_table,
        query_start_loc=query_start_loc,
        seq_lens=seq_lens,
        rope=rope,
        k_norm=k_norm,
        norm_eps=norm_eps,
        k_scale=k_scale,
        v_scale=v_scale,
    )
    queries = heads_of(q, spec.head_dim, dtype, rope, q_norm, norm_eps)
    if dtype != "float32":
        queries = queries.astype(jnp.bfloat16)
    tokens, group = len(q), spec.num_heads // spec.num_kv_heads
    sizes = blocks(spec.head_dim, dtype)
    per_tile = tokens_per_tile(tokens, len(seq_lens), group, sizes.rows)
    table, _ = tiles(tokens, per_tile, query_start_loc, seq_lens)
    count, length = segments(tokens, block_table.shape[1] * k_pages.page_size)
    k_scale, v_scale = (
        None if s is None else jnp.broadcast_to(s, spec.num_kv_heads) for s in (k_scale, v_scale)
    )
    flat, tree = jax.tree.flatten(
        _Operands(table, block_table, queries, sinks, k_scale, v_scale, k_pages, v_pages)
    )
    partial_shape = (count, tokens, spec.num_heads)
    total, top, out = pl.pallas_call(
        partial(
            _kernel,
            tree=tree,
            spec=spec,
            dtype=dtype,
            sizes=sizes,
            per_tile=per_tile,
            length=length,
        ),
        grid=(len(table.count), spec.num_kv_heads, count),
        out_shape=[
            jax.ShapeDtypeStruct(partial_shape, jnp.float32),
            jax.ShapeDtypeStruct(partial_shape, jnp.float32),
            jax.ShapeDtypeStruct((*partial_shape, spec.head_dim), jnp.float32),
        ],
        interpret=interpret,
        compiler_params=plt.CompilerParams(num_warps=sizes.num_warps, num_stages=sizes.num_stages),
        name="paged_attention",
    )(*flat)
    real = jnp.arange(tokens) < query_start_loc[-1]
    return jnp.where(real[:, None], _together(total, top, out), 0.0), k_pages, v_pages


def _together(total: jax.Array, top: jax.Array, out: jax.Array) -> jax.Array:
    """Softmax over all segments: their sums, total [C, T, H] and out [C, T, H, D], are of
    exponentials less their own maximum, top [C, T, H]."""
    weight = jnp.exp(top - top.max(0))
    out = (weight[..., None] * out).sum(0) / (weight * total).sum(0)[..., None]
    return out.reshape(len(out), -1)


def _kernel(*refs, tree, spec, dtype, sizes, per_tile, length):
    refs, (total_ref, top_ref, out_ref) = jax.tree.unflatten(tree, refs[:-3]), refs[-3:]
    tile, head, segment = (pl.program_id(axis) for axis in range(3))
    sequence, first, count, position = (ref[tile] for ref in refs.tiles)
    group = spec.num_heads // spec.num_kv_heads
    parts = 2 if dtype == "int4" else 1
    width = spec.head_dim // parts
    page_size = refs.k_pages.values.shape[2]
    precision = lax.Precision.HIGHEST if dtype == "float32" else None
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
        if dtype == "int4":
            codes = values.astype(jnp.int32)
            values = [codes & 15, codes >> 4]
        else:
            values = [values]
        values = [x.astype(q[0].dtype) for x in values]
        return values, *(None if x is None else x.astype(jnp.float32) for x in (scale, zero))

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
        if refs.k_scale is not None:
            score *= refs.k_scale[head]
        score *= spec.scale
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
        if refs.v_scale is not None:
            x *= refs.v_scale[head]
        tokens, columns = grid(first + token, part)
        at = (jnp.broadcast_to(i, tokens.shape) for i in (segment, tokens, q_head[:, None]))
        plt.store(out_ref.at[(*at, columns)], x, mask=q_mask)
