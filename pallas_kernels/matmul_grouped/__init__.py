"""Products of rows sorted by expert with the stacked weights of experts."""

from pallas_kernels.matmul_grouped.api import matmul_grouped

__all__ = ["matmul_grouped"]
