"""Attention where the update of the cache is an operation of its own, `kv_update`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from pallas_kernels.kv_update.pages import Pages
from pallas_kernels.paged_attention.spec import AttentionSpec


def after_update(
    update: Callable[..., tuple[Pages, Pages]], attend: Callable[..., jax.Array]
) -> Callable[..., tuple[jax.Array, Pages, Pages]]:
    """An implementation of `pallas_kernels.paged_attention.api.paged_attention` from two parts.

    Args:
      update: an implementation of `pallas_kernels.kv_update.api.kv_update`.
      attend: gets q, the updated pages and, by name, all other arguments but `k_norm`; gives
        float32 [T, num_heads * head_dim].
    """

    def paged_attention(
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        k_pages: Pages,
        v_pages: Pages,
        *,
        spec: AttentionSpec,
        q_norm: jax.Array | None,
        k_norm: jax.Array | None,
        sinks: jax.Array | None,
        **both: Any,
    ) -> tuple[jax.Array, Pages, Pages]:
        k_pages, v_pages = update(k, v, k_pages, v_pages, k_norm=k_norm, **both)
        out = attend(q, k_pages, v_pages, spec=spec, q_norm=q_norm, sinks=sinks, **both)
        return out, k_pages, v_pages

    return paged_attention
