"""Products of activations with quantized weights, with the operations around them fused in."""

from pallas_kernels.matmul.api import WeightSpec, matmul, prepare, unprepare

__all__ = ["WeightSpec", "matmul", "prepare", "unprepare"]
