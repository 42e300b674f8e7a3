"""Native CPU kernel of attention over a paged cache: norm, rope, cache update and softmax in one.

The cache is updated in place (the call aliases its pages), so it must be donated by the caller.
Inside a page the kernel keeps its own order of elements (native/attention_pages.h).

Unless `AttentionSpec.exact`, queries and weights meet pages of bfloat16 and, where the processor
multiplies bfloat16, of float8 in bfloat16; they meet codes in 16 bits with a scale a row where it
has VNNI. All else is float32.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import native
from pallas_kernels.kv_update.pages import Basis, Pages
from pallas_kernels.paged_attention.spec import AttentionSpec

MAX_PAGE_SIZE = 128  # one block of keys, kBlockKeys of native/kernels.h


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
    basis: Basis | None = None,
) -> tuple[jax.Array, Pages, Pages]:
    """See `pallas_kernels.paged_attention.api.paged_attention`."""
    native.require()
    page_size = k_pages.page_size
    if page_size % 16 or page_size > MAX_PAGE_SIZE:
        raise NotImplementedError(f"page size {page_size}: multiples of 16 to {MAX_PAGE_SIZE}")
    if spec.head_dim % 16:
        raise NotImplementedError(f"head_dim {spec.head_dim} is not a multiple of 16")
    arrays = [a for pair in zip(k_pages, v_pages, strict=True) for a in pair if a is not None]
    given = (rope, q_norm, k_norm, sinks, k_scale, v_scale, basis)  # in the order of AttentionFlags
    flags = sum((array is not None) << bit for bit, array in enumerate(given))
    call = jax.ffi.ffi_call(
        "qjax_attention",
        [
            jax.ShapeDtypeStruct(q.shape, jnp.float32),
            *(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arrays),
        ],
        input_output_aliases={6 + i: 1 + i for i in range(len(arrays))},
        vmap_method="sequential",
    )
    out, *arrays = call(
        q, k, v, block_table, query_start_loc, seq_lens, *arrays, *jax.tree.leaves(given),
        heads=np.int32(spec.num_heads),
        rotary_dim=np.int32(spec.rotary_dim),
        flags=np.int32(flags),
        exact=spec.exact,
        scale=np.float32(spec.scale),
        soft_cap=np.float32(spec.soft_cap or 0.0),
        eps=np.float32(norm_eps),
        window=np.int64(spec.sliding_window or 0),
    )  # fmt: skip
    return out, Pages(*arrays[::2]), Pages(*arrays[1::2])
