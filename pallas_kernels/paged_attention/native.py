"""Native CPU kernel of attention over a paged cache: norm, rope, cache update and softmax in one.

The cache is updated in place (the call aliases its pages), so it must be donated by the caller.
Inside a page the kernel keeps its own order of elements (native/attention.h).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import native
from pallas_kernels.paged_attention.spec import AttentionSpec

MAX_PAGE_SIZE = 128  # one block of keys, kBlockKeys of native/attention.h


def paged_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
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
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See `pallas_kernels.paged_attention.api.paged_attention`."""
    native.require()
    page_size = k_pages.shape[2]
    if k_pages.dtype not in (jnp.float32, jnp.bfloat16):
        raise NotImplementedError(f"pages of {k_pages.dtype}, not float32 or bfloat16")
    if page_size % 16 or page_size > MAX_PAGE_SIZE:
        raise NotImplementedError(f"page size {page_size}: multiples of 16 to {MAX_PAGE_SIZE}")
    if spec.head_dim % 16:
        raise NotImplementedError(f"head_dim {spec.head_dim} is not a multiple of 16")
    optional = [*(rope or ()), *(w for w in (q_norm, k_norm, sinks) if w is not None)]
    flags = (rope is not None) | (q_norm is not None) << 1 | (k_norm is not None) << 2
    flags |= (sinks is not None) << 3
    call = jax.ffi.ffi_call(
        "qjax_attention",
        [
            jax.ShapeDtypeStruct(q.shape, jnp.float32),
            jax.ShapeDtypeStruct(k_pages.shape, k_pages.dtype),
            jax.ShapeDtypeStruct(v_pages.shape, v_pages.dtype),
        ],
        input_output_aliases={3: 1, 4: 2},
        vmap_method="sequential",
    )
    out, k_pages, v_pages = call(
        q, k, v, k_pages, v_pages, block_table, query_start_loc, seq_lens, *optional,
        heads=np.int32(spec.num_heads),
        rotary_dim=np.int32(spec.rotary_dim),
        flags=np.int32(flags),
        scale=np.float32(spec.scale),
        soft_cap=np.float32(spec.soft_cap or 0.0),
        eps=np.float32(norm_eps),
        window=np.int64(spec.sliding_window or 0),
    )  # fmt: skip
    return out, k_pages, v_pages
