"""Makes the block types of GGUF from floats, with the least weighted squared error found.

The error of a weight is its square times the importance of its input column: the mean square of
what it is multiplied by (the diagonal of `InputStats.moment`; llama.cpp's "imatrix"). That is to
first order what rounding adds to the square of a layer's outputs.
"""

from qjax.compress.algorithms.ggml.quantize import MADE, compile_ahead, quantize

__all__ = ["MADE", "compile_ahead", "quantize"]
