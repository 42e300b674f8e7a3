"""Products of activations with quantized weights, with the operations around them fused in."""

from pallas_kernels.matmul.api import (
    WeightArrays,
    WeightSpec,
    matmul,
    prepare,
    takes_inputs,
    unprepare,
)

__all__ = ["WeightArrays", "WeightSpec", "matmul", "prepare", "takes_inputs", "unprepare"]
