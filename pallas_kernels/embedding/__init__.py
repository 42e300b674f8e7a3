"""Rows of a quantized table."""

from pallas_kernels.embedding.api import embedding

__all__ = ["embedding"]
