"""Products of every two columns of a matrix, summed over its rows."""

from pallas_kernels.gram.api import gram

__all__ = ["gram"]
