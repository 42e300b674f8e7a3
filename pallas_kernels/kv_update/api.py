"""The one entry to cache updates: checks the call, then dispatches it."""

from __future__ import annotations

import jax

from pallas_kernels import dispatch
from pallas_kernels.kv_update import ref, tpu, triton, xla
from pallas_kernels.kv_update.pages import Basis, Pages

IMPLEMENTATIONS: dispatch.Implementations = (
    ("triton", triton.kv_update),
    ("tpu", tpu.kv_update),
    ("xla", xla.kv_update),
    ("ref", ref.kv_update),
)


def kv_update(
    k: jax.Array,
    v: jax.Array,
    k_pages: Pages,
    v_pages: Pages,
    *,
    block_table: jax.Array,
    query_start_loc: jax.Array,
    seq_lens: jax.Array,
    rope: tuple[jax.Array, jax.Array] | None = None,
    k_norm: jax.Array | None = None,
    norm_eps: float = 0.0,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
    basis: Basis | None = None,
    implementation: str | None = None,
) -> tuple[Pages, Pages]:
    """Writes the keys and values of new tokens into the cache, in the canonical order of `Pages`.

    Which token goes where, and what the arguments are, is as
    `pallas_kernels.paged_attention.api.paged_attention` says; padding tokens write nothing. Under
    jit, pages that are donated are written in place.

    Args:
      k, v: float32 [T, num_kv_heads * head_dim]; k is normed and turned here, and both are
        multiplied by a Hadamard matrix where `pages` says so.
      implementation: "triton", "tpu", "xla" or "ref"; None for the first that takes the call.

    Returns:
      k_pages, v_pages, updated.

    Raises:
      ValueError: k and v are not tokens of these pages.
      NotImplementedError: no implementation, or not the named one, takes the call.
    """
    heads = k_pages.values.shape[1]
    head_dim = k_pages.values.shape[3] * (2 if k_pages.dtype == "int4" else 1)
    for name, x in (("k", k), ("v", v)):
        if x.ndim != 2 or x.shape[1] != heads * head_dim or x.dtype != "float32":
            raise ValueError(
                f"{name} is {x.dtype} {x.shape}, the pages hold {heads} heads of {head_dim}"
            )
    return dispatch.call(
        "kv_update",
        IMPLEMENTATIONS,
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
        basis=basis,
        implementation=implementation,
    )
