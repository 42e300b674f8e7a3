"""Attention over a paged cache, with rope, the norms of q and k, and the cache update fused in."""

from pallas_kernels.paged_attention.api import AttentionSpec, paged_attention

__all__ = ["AttentionSpec", "paged_attention"]
