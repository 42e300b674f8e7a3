"""compressed-tensors before it has compressed: weights in full precision beside their scales.

This is what `save_pretrained(save_compressed=False)` writes ("quantization_status": "frozen"). The
tool rounds such weights whenever it uses them; here they are rounded once, as they are read, to the
codes that the compressed checkpoint would hold. Formulas: `fake_quantize` of compressed-tensors.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

from pallas_kernels import codes
from qjax.errors import UnsupportedError
from qjax.formats import weights
from qjax.formats.base import PLAIN, Arrays, Layer, Stored, expect
from qjax.formats.ct_layouts import Shape, group_of, like_scale
from qjax.qarray import QArray
from qjax.scheme import QuantizationArgs


def frozen(module: str, stored: Stored, shape: Shape, args: QuantizationArgs) -> Layer:
    """A plain weight that is rounded to integers or to 8-bit floats.

    Raises:
      UnsupportedError: columns in another order, floats of fewer bits.
    """
    record = expect(module, stored, "weight", PLAIN, shape)
    if "weight_g_idx" in stored or (args.type == "float" and args.num_bits != 8):
        kind = f"{args.num_bits}-bit {args.type}"
        raise UnsupportedError(
            f"{record.file}, {record.name}: is not compressed yet, which is read for integers and "
            f"8-bit floats with columns in order, but not for {kind}; save the model with "
            "save_compressed=True"
        )
    group = group_of(module, stored, shape, args)
    reads = ["weight", "weight_scale"]
    if not args.symmetric or "weight_zero_point" in stored:
        like_scale(module, stored, ("i8", "i32", *weights.FP8_QTYPES, *PLAIN))
        reads.append("weight_zero_point")

    def decode(arrays: Arrays) -> QArray:
        scale = weights.scales(arrays["weight_scale"], shape, group)
        zero = weights.zero_points(arrays.get("weight_zero_point"), shape, group)
        size = (shape[-2], shape[-1])
        # Each step is rounded to the weight's own type, as the tool that computes in it does.
        plain = arrays["weight"]
        scaled = plain.astype(np.float32) / codes.spread(scale, group, size, np)
        scaled = scaled.astype(plain.dtype).astype(np.float32)
        if zero is not None:
            scaled = (scaled + codes.spread(zero, group, size, np)).astype(plain.dtype)
            scaled = scaled.astype(np.float32)
        if args.type == "float":
            rounded = np.clip(scaled, -weights.E4M3_MAX, weights.E4M3_MAX).astype(
                ml_dtypes.float8_e4m3fn
            )
            zero = None if zero is None else zero.astype(np.float32)
            return weights.coded(rounded, "fp8_e4m3", shape, scale, group, zero_point=zero)
        half = 1 << (args.num_bits - 1)
        integers = np.clip(np.rint(scaled), -half, half - 1).astype(np.int8)
        packed, qtype, zero = weights.signed_bytes(record, integers, args.num_bits, zero)
        return weights.coded(packed, qtype, shape, scale, group, zero_point=zero)

    return Layer(tuple(reads), decode)
