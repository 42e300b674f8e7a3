"""Products of rows sorted by expert with the stacked weights of experts."""

from pallas_kernels.matmul_grouped.api import matmul_grouped
from pallas_kernels.matmul_grouped.coded import takes_inputs

__all__ = ["matmul_grouped", "takes_inputs"]
