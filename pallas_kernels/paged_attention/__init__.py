"""Attention over a paged cache, with rope, the norms of q and k, and the cache update fused in."""

from pallas_kernels.kv_update.pages import CACHE_DTYPES, Basis, Pages, empty
from pallas_kernels.paged_attention.api import AttentionSpec, paged_attention

__all__ = ["CACHE_DTYPES", "AttentionSpec", "Basis", "Pages", "empty", "paged_attention"]
