"""Which of the numbers, or vectors of numbers, that codes stand for is nearest."""

from pallas_kernels.nearest.api import nearest_level, nearest_vector
from pallas_kernels.nearest.spec import Found

__all__ = ["Found", "nearest_level", "nearest_vector"]
