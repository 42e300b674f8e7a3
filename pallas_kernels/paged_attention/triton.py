"""Attention over a paged cache on GPUs: flash attention that reads pages through the block table.

A program has a tile of the queries of one sequence, all that read one kv head, and goes over a
segment of its keys with a running maximum and sum (FlashAttention, arXiv 2205.14135). Where there
are few tokens, segments of one sequence run side by side and are put together afterwards. Segments
start at fixed positions, and their length depends on shapes only, so that a sequence gets the same
numbers whatever else is in its batch.

Codes meet queries and weights as they are; scales and zero points go on scores and weights:
score_j = s_j (q . code_j + zero_j sum(q)), and out = sum_j (p_j s_j) (code_j + zero_j).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

import jax
import jax.numpy as jnp

from pallas_kernels import platform, tuning
from pallas_kernels.kv_update.pages import Basis, Pages
from pallas_kernels.paged_attention.queries import outputs, scaled_queries
from pallas_kernels.paged_attention.spec import AttentionSpec
from pallas_kernels.paged_attention.tiles import tiles, tokens_per_tile

SEGMENT = 512  # keys
MAX_SEGMENTS = 64
MAX_SPLIT_TOKENS = 256  # more fill a GPU, and their partial sums would be large


@dataclass(frozen=True)
class Blocks:
    """How the work is cut up.

    Attributes:
      rows: of queries in a tile, at most: heads of a token times tokens.
      keys: that meet them at a time.
      segment: keys of a sequence that one program goes over, where there are few tokens.
      num_warps, num_stages: of Triton.
    """

    rows: int
    keys: int
    segment: int
    num_warps: int
    num_stages: int


def blocks(head_dim: int, dtype: str) -> Blocks:
    """What fits the registers and shared memory of a multiprocessor."""
    if dtype == "float32":
        return Blocks(32, 32, SEGMENT, 4, 1)
    if head_dim > 128:
        return Blocks(64, 32, SEGMENT, 8, 2)
    return Blocks(64, 64, SEGMENT, 4, 2)


def candidates(kind: str, rows: int, n: int, k: int) -> Iterator[dict[str, int]]:
    """Block sizes worth measuring for `rows` tokens, n kv heads and k slots of a sequence."""
    del n
    dtype, head_dim = kind.split(" d")
    default = blocks(int(head_dim), dtype)
    splits = rows <= MAX_SPLIT_TOKENS
    for segment in (256, 512, 1024) if splits and k > 256 else (SEGMENT,):
        for keys in (default.keys // 2, default.keys, 2 * default.keys):
            for warps, stages in ((4, 1), (4, 2), (4, 3), (8, 2)):
                yield asdict(Blocks(default.rows, keys, segment, warps, stages))


def segments(tokens: int, keys: int, segment: int) -> tuple[int, int]:
    """How many segments the keys of a sequence, at most `keys`, fall into, and of how many each: of
    `segment`, or a multiple where they would be too many."""
    if tokens > MAX_SPLIT_TOKENS or keys <= segment:
        return 1, keys
    length = segment * -(-keys // (segment * MAX_SEGMENTS))
    return -(-keys // length), length


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
    interpret = platform.interprets("gpu")
    dtype = k_pages.dtype
    queries = scaled_queries(q, dtype, spec, rope, q_norm, norm_eps, k_scale, basis)
    if dtype not in ("float32", "bfloat16") and queries.dtype == jnp.bfloat16:
        # Which holds 8 bits too, and is what GPUs convert them to at full speed.
        most = jnp.finfo(jnp.float16).max
        queries = jnp.clip(queries.astype(jnp.float32), -most, most).astype(jnp.float16)
    tokens, group = len(q), spec.num_heads // spec.num_kv_heads
    slots = block_table.shape[1] * k_pages.page_size
    sizes = _sizes(spec, k_pages, tokens, slots)
    per_tile = tokens_per_tile(tokens, len(seq_lens), group, sizes.rows)
    table, _ = tiles(tokens, per_tile, query_start_loc, seq_lens)
    from pallas_kernels.paged_attention import triton_kernel  # jax has it on some systems only

    parts = triton_kernel.attend(
        queries.reshape(tokens, spec.num_heads, spec.head_dim), table, block_table, k_pages,
        v_pages, sinks=sinks, spec=spec, sizes=sizes, per_tile=per_tile,
        segments=segments(tokens, slots, sizes.segment), interpret=interpret,
    )  # fmt: skip
    out = outputs(_together(*parts), v_pages.dtype, spec, v_scale)
    real = jnp.arange(tokens) < query_start_loc[-1]
    return jnp.where(real[:, None], out, 0.0)


def _sizes(spec: AttentionSpec, pages: Pages, tokens: int, slots: int) -> Blocks:
    """Those measured best, as far as they go together, otherwise the defaults; nothing is measured
    of exact products with pages that are not float32, which take more registers."""
    if spec.exact and pages.dtype != "float32":
        return blocks(spec.head_dim, "float32")
    default = blocks(spec.head_dim, pages.dtype)
    kind = tuning.attention_kind(pages.dtype, spec.head_dim)
    found = tuning.blocks(
        "paged_attention", "triton", kind, max(tokens, 1), spec.num_kv_heads, max(slots, 1)
    )
    known = asdict(default)
    sizes = replace(default, **{k: v for k, v in (found or {}).items() if k in known})
    power = sizes.keys >= 16 and sizes.keys & (sizes.keys - 1) == 0
    return sizes if power and sizes.segment % sizes.keys == 0 else default


def _together(top: jax.Array, total: jax.Array, out: jax.Array) -> jax.Array:
    """Softmax over all segments: their sums, total [C, T, H] and out [C, T, H, D], are of
    exponentials less their own maximum, top [C, T, H]."""
    weight = jnp.exp(top - top.max(0))
    out = (weight[..., None] * out).sum(0) / (weight * total).sum(0)[..., None]
    return out.reshape(len(out), -1)
