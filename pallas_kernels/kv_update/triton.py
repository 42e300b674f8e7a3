"""Cache update on GPUs: one program a token quantizes its keys and values and stores them.

Norm, rope and Hadamard transforms are left to XLA, which fuses them with those of the queries.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels import platform
from pallas_kernels.kv_update.pages import Basis, Pages
from pallas_kernels.kv_update.places import heads_of, places, values_of


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
    interpret = platform.interprets("gpu")
    for array in jax.tree.leaves((k_pages, v_pages)):
        if array.size > 1 << 31 and array.size * array.dtype.itemsize <= 1 << 32:
            # Pallas counts elements in 32 bits up to 4 GiB, and Triton takes them to be signed.
            raise NotImplementedError(f"{array.size} bytes in one array, neither 2 GiB nor over 4")
    tokens, heads = len(k), k_pages.values.shape[1]
    head_dim = k.shape[1] // heads
    at = places(tokens, k_pages, block_table, query_start_loc, seq_lens)
    keys = heads_of(
        k, head_dim, k_pages.dtype, rope, k_norm, norm_eps, k_scale, basis and basis.keys
    )
    values = values_of(v, head_dim, v_pages.dtype)
    scales = [jnp.ones(1) if scale is None else scale for scale in (k_scale, v_scale)]
    scales = [jnp.broadcast_to(scale, heads) for scale in scales]
    new = [(keys, scales[0]), (values, scales[1])]
    from pallas_kernels.kv_update import triton_kernel  # jax has it on some systems only

    return triton_kernel.store(at.page, at.slot, new, (k_pages, v_pages), interpret)
