"""Quantization of activations: codes and scales, made as they are needed."""

from pallas_kernels.quantize.api import quantize, refused
from pallas_kernels.quantize.spec import Quantized
from pallas_kernels.quantize.xla import rounded

__all__ = ["Quantized", "quantize", "refused", "rounded"]
