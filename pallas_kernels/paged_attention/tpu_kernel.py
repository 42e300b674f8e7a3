"""The kernel of attention over a paged cache on TPUs."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.kv_update.pages import Pages, zero_points
from pallas_kernels.paged_attention.spec import AttentionSpec
from pallas_kernels.paged_attention.tiles import Tiles

LANES = 128
VMEM = 64 << 20  # bytes that the compiler may take


class _Refs(NamedTuple):
    """tiles and table are scalars; q and sinks are blocks in VMEM; the others stay in HBM."""

    tiles: Tiles
    table: Any
    q: Any
    sinks: Any
    k: Pages
    v: Pages


class _Scratch(NamedTuple):
    """Two blocks of keys and of values; scales and zero points of the one at hand; what goes on
    while one tile is worked on; and the buffer that the next block of it is in."""

    k: Pages
    v: Pages
    arrived: Any
    side: Any
    top: Any
    total: Any
    offset: Any
    turn: Any


def attend(
    q: jax.Array,
    tiles: Tiles,
    block_table: jax.Array,
    k_pages: Pages,
    v_pages: Pages,
    *,
    sinks: jax.Array | None,
    spec: AttentionSpec,
    per_tile: int,
    block_pages: int,
    interpret: bool,
) -> jax.Array:
    """Attention of tiles of queries over pages.

    Args:
      q: [N, Hkv, parts, per_tile * group, head_dim / parts], scaled; parts is 2 for int4 pages.
      tiles: of N tiles.
      block_table: int32 [S, B], B a multiple of `block_pages`.
      sinks: float32 [Hkv, group].

    Returns:
      float32 of the shape of q: sums of codes, of those that have no scale of their own.
    """
    count, heads, _, rows, _ = q.shape
    padded = -(-rows // 16) * 16
    q = jnp.pad(q, ((0, 0),) * 3 + ((0, padded - rows), (0, 0)))
    if sinks is not None:
        sinks = jnp.pad(jnp.tile(sinks, (1, per_tile)), ((0, 0), (0, padded - rows)))
        sinks = jnp.broadcast_to(sinks[..., None], (heads, padded, LANES))
    page_size, keys = k_pages.page_size, block_pages * k_pages.page_size

    def of_keys(x: jax.Array) -> jax.Array:
        """Scales or zero points: pages as they are, of whole lanes, or each sequence in a row."""
        if page_size % LANES == 0:
            return x
        rows = x[block_table]
        return rows.swapaxes(1, 2).reshape(len(block_table), heads, -1)

    def buffers(pages: Pages) -> Pages:
        of_values = pltpu.VMEM((2, block_pages, *pages.values.shape[1:]), pages.values.dtype)
        side = (None if x is None else pltpu.VMEM((2, heads, keys), x.dtype) for x in pages[1:])
        return Pages(of_values, *side)

    k_pages, v_pages = (
        Pages(x.values, *jax.tree.map(of_keys, tuple(x[1:]))) for x in (k_pages, v_pages)
    )
    operands = _Refs(tiles, block_table.reshape(-1), q, sinks, k_pages, v_pages)
    scalars = len(jax.tree.leaves(operands[:2]))
    whole = pl.BlockSpec((None, *q.shape[1:]), lambda i, *_: (i, 0, 0, 0, 0))
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    specs = [whole]
    if sinks is not None:
        specs.append(pl.BlockSpec((heads, padded, LANES), lambda i, *_: (0, 0, 0)))
    specs += [anywhere] * len(jax.tree.leaves((k_pages, v_pages)))
    running = pltpu.VMEM((heads, padded, LANES), jnp.float32)
    scratch = _Scratch(
        k=buffers(k_pages),
        v=buffers(v_pages),
        arrived=pltpu.SemaphoreType.DMA((2,)),
        side=pltpu.VMEM((4, heads, keys), jnp.float32),
        top=running,
        total=running,
        offset=running,
        turn=pltpu.SMEM((1,), jnp.int32),
    )
    flat, tree = jax.tree.flatten(operands)
    shapes, tree_of_scratch = jax.tree.flatten(scratch)

    def kernel(*refs):
        own, out, rest = refs[: len(flat)], refs[len(flat)], refs[len(flat) + 1 :]
        work = partial(_kernel, spec=spec, per_tile=per_tile, blocks_of=block_table.shape[1])
        work(jax.tree.unflatten(tree, own), out, jax.tree.unflatten(tree_of_scratch, rest))

    out = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=scalars,
            grid=(count,),
            in_specs=specs,
            out_specs=whole,
            scratch_shapes=shapes,
        ),
        out_shape=jax.ShapeDtypeStruct(q.shape, jnp.float32),
        interpret=interpret,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",), vmem_limit_bytes=VMEM
        ),
        name="paged_attention",
    )(*flat)
    return out[..., :rows, :]


def _kernel(refs: _Refs, out_ref, scratch: _Scratch, *, spec: AttentionSpec, per_tile, blocks_of):
    tile, num_tiles = pl.program_id(0), pl.num_programs(0)
    block_pages, page_size = scratch.k.values.shape[1], scratch.k.values.shape[3]
    keys = block_pages * page_size

    def seen(tile):
        """The positions that a tile sees, from one to before another."""
        position = refs.tiles.position[tile]
        low = jnp.maximum(0, position - (spec.sliding_window or position + 1) + 1)
        return low, position + refs.tiles.count[tile]

    def span(tile):
        """The blocks of keys that a tile goes over."""
        low, high = seen(tile)
        return _blocks(low, keys), _blocks(high + keys - 1, keys)

    def copies(tile, block, buffer, act):
        """Starts copies of one block into a buffer, or waits for them."""
        low, high = seen(tile)
        sequence = refs.tiles.sequence[tile]
        begin = block * block_pages
        both = (refs.k, scratch.k), (refs.v, scratch.v)

        def copy(source, target):
            act(pltpu.make_async_copy(source, target, scratch.arrived.at[buffer]))

        def copy_page(index, _):
            page, at = refs.table[sequence * blocks_of + index], index - begin
            lanes = pl.ds(pl.multiple_of(at * page_size, page_size), page_size)
            for pages, buffers in both:
                copy(pages.values.at[page], buffers.values.at[buffer, at])
                if page_size % LANES == 0:
                    for x, into in _side(pages, buffers):
                        copy(x.at[page], into.at[buffer, :, lanes])
            return 0

        lax.fori_loop(
            jnp.maximum(begin, _blocks(low, page_size)),
            jnp.minimum(begin + block_pages, _blocks(high + page_size - 1, page_size)),
            copy_page,
            0,
        )
        if page_size % LANES:
            lanes = pl.ds(pl.multiple_of(block * keys, keys), keys)
            for pages, buffers in both:
                for x, into in _side(pages, buffers):
                    copy(x.at[sequence, :, lanes], into.at[buffer])

    @pl.when(tile == 0)
    def _():
        scratch.turn[0] = 0

        @pl.when(refs.tiles.count[0] > 0)
        def _():
            copies(0, span(0)[0], 0, lambda copy: copy.start())

    @pl.when(refs.tiles.count[tile] > 0)
    def _():
        first, end = span(tile)
        turn = scratch.turn[0]
        _begin(refs, out_ref, scratch)

        def step(block, _):
            buffer = (turn + block - first) & 1
            last = block + 1 == end
            following = jnp.where(last, jnp.minimum(tile + 1, num_tiles - 1), tile)

            @pl.when(~last | ((tile + 1 < num_tiles) & (refs.tiles.count[following] > 0)))
            def _():
                then = jnp.where(last, span(following)[0], block + 1)
                copies(following, then, 1 - buffer, lambda copy: copy.start())

            copies(tile, block, buffer, lambda copy: copy.wait())
            update = partial(_update, refs, out_ref, scratch, spec=spec, per_tile=per_tile)
            update(tile, seen(tile), block * keys, buffer)
            return 0

        lax.fori_loop(first, end, step, 0)
        scratch.turn[0] = (turn + end - first) & 1
        total = scratch.total[:, :, :1]
        for part in range(out_ref.shape[1]):
            x = out_ref[:, part]
            if refs.k.zero is not None:
                x += scratch.offset[:, :, :1]
            out_ref[:, part] = x / total


def _blocks(x: jax.Array, size: int) -> jax.Array:
    """x // size of x >= 0, without asking for its sign."""
    return lax.div(x, jnp.int32(size))


def _side(*pages: Pages) -> list[tuple[Any, ...]]:
    """Scales and zero points, where there are any, of some pages side by side."""
    return [both for both in zip(*(x[1:] for x in pages), strict=True) if both[0] is not None]


def _begin(refs: _Refs, out_ref, scratch: _Scratch):
    """Nothing seen but a sink: a score of each head without a value."""
    shape = scratch.top.shape
    scratch.top[...] = jnp.full(shape, -jnp.inf) if refs.sinks is None else refs.sinks[...]
    scratch.total[...] = jnp.full(shape, 0.0 if refs.sinks is None else 1.0)
    scratch.offset[...] = jnp.zeros(shape, jnp.float32)
    out_ref[...] = jnp.zeros(out_ref.shape, jnp.float32)


def _update(refs, out_ref, scratch, tile, seen, first_key, buffer, *, spec, per_tile):
    """Adds what one block of keys brings to all heads."""
    block_pages, heads, page_size, width = scratch.k.values.shape[1:]
    keys, rows = block_pages * page_size, out_ref.shape[2]
    parts, group = out_ref.shape[1], spec.num_heads // spec.num_kv_heads
    exact = refs.q.dtype == jnp.float32
    dot = partial(
        lax.dot_general,
        precision=lax.Precision.HIGHEST if exact else None,
        preferred_element_type=jnp.float32,
    )
    low, high = seen
    key = first_key + lax.broadcasted_iota(jnp.int32, (1, keys), 1)
    known = (key >= low) & (key < high)
    known_row = first_key + lax.broadcasted_iota(jnp.int32, (keys, 1), 0)
    known_row = (known_row >= low) & (known_row < high)
    row = lax.broadcasted_iota(jnp.int32, (rows, 1), 0)
    own = refs.tiles.position[tile] + _blocks(row, group)
    visible = known & (key <= own)
    if spec.sliding_window is not None:
        visible &= key > own - spec.sliding_window

    def load(pages, head):
        x = pages.values[buffer, :, head]
        if parts == 2:
            x = x.astype(jnp.int32).reshape(keys, width)
            halves = [x & 15, x >> 4]
        else:
            halves = [x.astype(jnp.float32).reshape(keys, width)]
        return [half.astype(jnp.float32) for half in halves]

    # Rows of numbers narrower than 32 bits lie two or four to a row, which no head can pick.
    for index, (k, v) in enumerate(_side(scratch.k, scratch.v)):
        wide = zero_points if index else partial(jnp.asarray, dtype=jnp.float32)
        scratch.side[2 * index] = wide(k[buffer])
        scratch.side[2 * index + 1] = wide(v[buffer])

    def side(index, head):
        """Of the block, [1, keys]: scales of keys, of values, zero points of keys, of values."""
        return jnp.where(known, scratch.side[index, pl.ds(head, 1), :], 0.0)

    def one(head, _):
        q = [refs.q[head, part] for part in range(parts)]
        k = [x.astype(q[0].dtype) for x in load(scratch.k, head)]
        score = sum(dot(x, y, (((1,), (1,)), ((), ()))) for x, y in zip(q, k, strict=True))
        if refs.k.zero is not None:
            q_sum = sum(x.astype(jnp.float32).sum(1, keepdims=True) for x in q)
            score += q_sum * side(2, head)
        if refs.k.scale is not None:
            score *= side(0, head)
        if spec.soft_cap is not None:
            score = spec.soft_cap * jnp.tanh(score / spec.soft_cap)
        score = jnp.where(visible, score, -jnp.inf)
        top = scratch.top[head][:, :1]
        new_top = jnp.maximum(top, score.max(1, keepdims=True))
        finite = jnp.where(new_top == -jnp.inf, 0.0, new_top)  # nothing visible yet
        weight = jnp.exp(score - finite)
        fade = jnp.exp(top - finite)
        whole = (rows, LANES)
        scratch.top[head] = jnp.broadcast_to(new_top, whole)
        total = fade * scratch.total[head][:, :1] + weight.sum(1, keepdims=True)
        scratch.total[head] = jnp.broadcast_to(total, whole)
        if refs.k.scale is not None:
            weight *= side(1, head)
        weight = weight.astype(q[0].dtype)
        if refs.k.zero is not None:
            offset = (weight.astype(jnp.float32) * side(3, head)).sum(1, keepdims=True)
            offset += fade * scratch.offset[head][:, :1]
            scratch.offset[head] = jnp.broadcast_to(offset, whole)
        for part, x in enumerate(load(scratch.v, head)):
            x = jnp.where(known_row, x, 0.0).astype(weight.dtype)
            new = dot(weight, x, (((1,), (0,)), ((), ())))
            out_ref[head, part] = fade * out_ref[head, part] + new
        return 0

    lax.fori_loop(0, heads, one, 0)
