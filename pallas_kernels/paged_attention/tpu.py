"""Attention over a paged cache on TPUs: flash attention over pages that are copied by hand.

One core does a tile of queries after the other, with all heads, over blocks of pages: while one
block is computed with, the next one is on its way. Nothing would be gained from splitting a
sequence. `triton.py` has the arithmetic, which is the same here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import platform, tuning
from pallas_kernels.kv_update.pages import Basis, Pages
from pallas_kernels.kv_update.places import owners
from pallas_kernels.paged_attention.queries import outputs, scaled_queries
from pallas_kernels.paged_attention.spec import AttentionSpec
from pallas_kernels.paged_attention.tiles import tiles, tokens_per_tile

LANES = 128
ROWS = 128  # of queries that meet a block of keys, where there are so many
KEYS = 256  # of a block
MAX_BUFFER = 8 << 20  # bytes of VMEM that blocks of keys and values may take


class Blocks(NamedTuple):
    """Sizes that the kernel runs with: rows of queries, at most, and keys that meet at a time."""

    rows: int
    keys: int


def blocks(spec: AttentionSpec, page_size: int, itemsize: int) -> Blocks:
    """What fits VMEM, in whole pages and whole lanes of keys.

    Raises:
      NotImplementedError: pages are of a size that no block can be made of.
    """
    if page_size % 8:
        raise NotImplementedError(f"pages of {page_size} tokens, not a multiple of 8")
    unit = math.lcm(page_size, LANES)
    most = MAX_BUFFER // _bytes_of_key(spec, itemsize) // unit * unit
    if not most:
        raise NotImplementedError(
            f"{spec.num_kv_heads} kv heads of {spec.head_dim}, with pages of {page_size} tokens: "
            f"blocks of {unit} keys take more than {MAX_BUFFER} bytes of VMEM"
        )
    return Blocks(ROWS, min(most, max(unit, KEYS // unit * unit)))


def candidates(kind: str, rows: int, n: int, k: int) -> Iterator[dict[str, int]]:
    """Block sizes worth measuring for `rows` tokens, n kv heads and k slots of a sequence."""
    del kind, n
    for tile in (ROWS,) if rows == 1 else (64, 128, 256):
        for keys in (128, 256, 512, 1024):
            if keys <= max(k, 128):
                yield Blocks(tile, keys)._asdict()


def _bytes_of_key(spec: AttentionSpec, itemsize: int) -> int:
    """Two blocks of keys and two of values are there, in rows of whole lanes."""
    return 4 * spec.num_kv_heads * -(-spec.head_dim // LANES) * LANES * itemsize


def _sizes(spec: AttentionSpec, pages: Pages, tokens: int, slots: int) -> Blocks:
    """Those measured best, where they can be had, otherwise the defaults."""
    itemsize = pages.values.dtype.itemsize
    default = blocks(spec, pages.page_size, itemsize)
    kind = tuning.attention_kind(pages.dtype, spec.head_dim)
    found = tuning.blocks(
        "paged_attention", "tpu", kind, max(tokens, 1), spec.num_kv_heads, max(slots, 1)
    )
    known = {name: size for name, size in (found or {}).items() if name in Blocks._fields}
    sizes = default._replace(**known)
    fits = sizes.keys * _bytes_of_key(spec, itemsize) <= MAX_BUFFER
    whole = sizes.keys % math.lcm(pages.page_size, LANES) == 0
    return sizes if fits and whole else default


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
    interpret = platform.interprets("tpu")
    dtype, tokens = k_pages.dtype, len(q)
    sizes = _sizes(spec, k_pages, tokens, block_table.shape[1] * k_pages.page_size)
    block_pages = sizes.keys // k_pages.page_size
    queries = scaled_queries(q, dtype, spec, rope, q_norm, norm_eps, k_scale, basis)
    group = spec.num_heads // spec.num_kv_heads
    per_tile = tokens_per_tile(tokens, len(seq_lens), group, sizes.rows)
    table, first_tile = tiles(tokens, per_tile, query_start_loc, seq_lens)
    blocks_of = jnp.pad(block_table, ((0, 0), (0, -block_table.shape[1] % block_pages)))
    from pallas_kernels.paged_attention import tpu_kernel

    # [N, per_tile, Hkv, group, parts, width] -> [N, Hkv, parts, per_tile * group, width]
    parts = 2 if dtype == "int4" else 1
    token = jnp.clip(table.first[:, None] + jnp.arange(per_tile), 0, tokens - 1)
    rows = queries.reshape(*queries.shape[:3], parts, -1)[token].transpose(0, 2, 4, 1, 3, 5)
    rows = rows.reshape(*rows.shape[:3], per_tile * group, -1)
    out = tpu_kernel.attend(
        rows, table, blocks_of, k_pages, v_pages,
        sinks=None if sinks is None else sinks.reshape(spec.num_kv_heads, group),
        spec=spec, per_tile=per_tile, block_pages=block_pages, interpret=interpret,
    )  # fmt: skip
    out = out.reshape(*out.shape[:3], per_tile, group, -1)
    index = jnp.arange(tokens)
    owner = owners(query_start_loc[1:], index)
    after = index - query_start_loc[owner]
    tile = jnp.clip(first_tile[owner] + after // per_tile, 0, len(out) - 1)
    # [T, Hkv, parts, group, width] -> [T, Hkv, group, parts, width]
    out = out[tile, :, :, after % per_tile].swapaxes(2, 3).reshape(tokens, -1)
    real = index < query_start_loc[-1]
    return jnp.where(real[:, None], outputs(out, dtype, spec, v_scale), 0.0)
