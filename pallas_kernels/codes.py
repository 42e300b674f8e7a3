"""Codes: numeric types whose scales lie in arrays beside them, and how they decode.

A row of K codes is a dense little-endian bit stream: code i is in bits [i * bits, (i + 1) * bits).
A weight is code_value * scale, (code - zero_point) * scale or code * scale + zero_point, all in
float32, where one scale serves `group` = (rows, columns) of the matrix. (Types that carry their
scales inside blocks of bytes are in `unpack`.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

Array = Any  # numpy or jax array


@dataclass(frozen=True)
class Code:
    """What a code of `bits` bits stands for.

    Attributes:
      kind: "uint" (the code less `zero`), "int" (two's complement), "float" (a small float with
        `exponent` bits, the rest of it mantissa and sign), "lookup" (an entry of a codebook that
        comes with the weight), or "sparse" (of every four weights two are 0, and `bits` is what one
        takes on average).
      zero: the code that means 0; of "uint", and of what "sparse" keeps.
      exponent: bits of the exponent; of "float" only.
      kept: bits of a weight that is kept; of "sparse" only.
    """

    bits: int
    kind: str
    zero: int = 0
    exponent: int = 0
    kept: int = 0


def _integers() -> dict[str, Code]:
    plain = {f"uint{bits}": Code(bits, "uint") for bits in range(1, 9)}
    offset = {
        f"uint{bits}b{1 << (bits - 1)}": Code(bits, "uint", 1 << (bits - 1)) for bits in range(2, 9)
    }
    return plain | offset | {"int8": Code(8, "int")}


CODES: dict[str, Code] = _integers() | {
    "fp4_e2m1": Code(4, "float", exponent=2),
    "fp6_e2m3": Code(6, "float", exponent=2),
    "fp6_e3m2": Code(6, "float", exponent=3),
    "fp8_e4m3": Code(8, "float", exponent=4),
    "fp8_e5m2": Code(8, "float", exponent=5),
    "fp12_e7m4": Code(12, "float", exponent=7),
    "lookup4": Code(4, "lookup"),
    "lookup8": Code(8, "lookup"),
    "sparse24_uint4b8": Code(3, "sparse", 8, kept=4),
    "sparse24_uint8b128": Code(5, "sparse", 128, kept=8),
}
"""By name. "uint4b8" is offset binary: the code less 8; "uint4" comes with zero points.

A row of a "sparse24" type begins with the codes of the K / 2 weights that are kept, and ends with
their places: for each, 2 bits say which of its four columns it is.

"fp8_e4m3" is the finite kind (float8_e4m3fn of ml_dtypes); the smaller floats and fp12 have neither
infinities nor NaN.
"""

ML_DTYPES = {
    "fp4_e2m1": ml_dtypes.float4_e2m1fn,
    "fp6_e2m3": ml_dtypes.float6_e2m3fn,
    "fp6_e3m2": ml_dtypes.float6_e3m2fn,
    "fp8_e4m3": ml_dtypes.float8_e4m3fn,
    "fp8_e5m2": ml_dtypes.float8_e5m2,
}


def row_bytes(qtype: str, k: int) -> int:
    """Bytes of a row of `k` codes; ValueError where they do not end with a byte."""
    bits = CODES[qtype].bits * k
    if bits % 8:
        raise ValueError(f"{qtype} rows end with a byte: {k} codes take {bits} bits")
    return bits // 8


def is_finite(qvalue: np.ndarray, qtype: str) -> bool:
    """Whether no code (numpy) of an 8-bit float means NaN or infinity; other types have neither.

    As signed and as unsigned bytes, those codes are the largest: two fast reductions find them.
    """
    first = {"fp8_e4m3": 0x7F, "fp8_e5m2": 0x7C}.get(qtype)
    if first is None:
        return True
    return qvalue.view(np.int8).max(initial=-1) < first and qvalue.max(initial=0) < first + 0x80


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Unsigned codes [..., K] (numpy) as a dense bit stream: uint8 [..., ceil(K * bits / 8)]."""
    if bits == 8:
        return np.ascontiguousarray(codes, np.uint8)
    codes = np.asarray(codes, np.uint16 if bits > 8 else np.uint8)
    # So many codes fill whole bytes, each of which takes a piece of some of them.
    k, count = codes.shape[-1], 8 // math.gcd(bits, 8)
    if k % count:
        codes = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, -k % count)])
    packed = np.zeros((*codes.shape[:-1], codes.shape[-1] // count, count * bits // 8), np.uint8)
    for i in range(count):
        code = codes[..., i::count] & codes.dtype.type((1 << bits) - 1)
        for at in range(i * bits // 8, -(-(i + 1) * bits // 8)):
            shift = i * bits - 8 * at
            packed[..., at] |= (code << shift if shift > 0 else code >> -shift).astype(np.uint8)
    return packed.reshape(*codes.shape[:-1], -1)[..., : -(-k * bits // 8)]


def unpack(qvalue: Array, bits: int, k: int, xp: ModuleType = jnp) -> Array:
    """A dense bit stream, uint8 [..., row_bytes], as K unsigned codes: uint8 (uint16 beyond 8 bits)
    [..., K].
    """
    if bits == 8:
        return qvalue
    if bits in (1, 2, 4):
        shifts = np.arange(8 // bits, dtype=np.uint8) * np.uint8(bits)
        mask = np.uint8((1 << bits) - 1)
        if xp is np:  # several times as fast as the broadcast
            codes = np.stack([(qvalue >> shift) & mask for shift in shifts], axis=-1)
        else:
            codes = (qvalue[..., None] >> shifts) & mask
        return codes.reshape(*qvalue.shape[:-1], -1)[..., :k]
    # Eight codes (two, of 12 bits) in `bits` (three) bytes, each taken from a word of two bytes.
    count, size = (8, bits) if bits < 8 else (16 // (bits - 8) // 2, 3)
    missing = -qvalue.shape[-1] % size
    if missing:
        qvalue = xp.pad(qvalue, [(0, 0)] * (qvalue.ndim - 1) + [(0, missing)])
    groups = qvalue.reshape(*qvalue.shape[:-1], -1, size).astype(np.uint16)
    runs = []
    for i in range(count):
        at, shift = divmod(i * bits, 8)
        word = groups[..., at]
        if at + 1 < size:
            word = word | (groups[..., at + 1] << np.uint16(8))
        runs.append((word >> np.uint16(shift)) & np.uint16((1 << bits) - 1))
    codes = xp.stack(runs, axis=-1).reshape(*qvalue.shape[:-1], -1)[..., :k]
    return codes if bits > 8 else codes.astype(np.uint8)


@cache
def table(qtype: str) -> np.ndarray:
    """float32 [2 ** bits]: what each code of a float type stands for."""
    code = CODES[qtype]
    patterns = np.arange(1 << code.bits)
    if qtype in ML_DTYPES:
        return patterns.astype(np.uint8).view(ML_DTYPES[qtype]).astype(np.float32)
    mantissa_bits = code.bits - 1 - code.exponent
    bias = (1 << (code.exponent - 1)) - 1
    sign = np.where(patterns >> (code.bits - 1), -1.0, 1.0)
    exponent = (patterns >> mantissa_bits) & ((1 << code.exponent) - 1)
    mantissa = (patterns & ((1 << mantissa_bits) - 1)) / (1 << mantissa_bits)
    scale = np.exp2(np.maximum(exponent, 1).astype(np.float64) - bias)
    return (sign * (mantissa + (exponent > 0)) * scale).astype(np.float32)


def values(
    qvalue: Array, qtype: str, k: int, codebook: Array | None = None, xp: ModuleType = jnp
) -> Array:
    """What the codes stand for before they are scaled: float32 [..., K].

    Args:
      qvalue: uint8 [..., row_bytes].
      codebook: float32 [..., 2 ** bits] of a lookup type: one table for all rows, its leading axes
        (those of a weight, all 1) are dropped.
    """
    code = CODES[qtype]
    if code.kind == "sparse":
        return _sparse_values(qvalue, code, k, xp)
    return meanings(unpack(qvalue, code.bits, k, xp), qtype, codebook, xp)


def meanings(codes: Array, qtype: str, codebook: Array | None, xp: ModuleType = jnp) -> Array:
    """What single codes, unsigned [...], stand for: float32. Not of a "sparse" type."""
    code = CODES[qtype]
    if code.kind == "int":
        return codes.view(np.int8).astype(np.float32)
    if code.kind == "float" and code.bits == 8 and xp is not np:  # a table is faster in numpy
        return codes.view(ML_DTYPES[qtype]).astype(np.float32)
    if code.kind == "float":
        return xp.asarray(table(qtype))[codes]
    if code.kind == "lookup":
        assert codebook is not None
        return codebook.reshape(-1)[codes]
    return codes.astype(np.float32) - np.float32(code.zero)


def _sparse_values(qvalue: Array, code: Code, k: int, xp: ModuleType) -> Array:
    split = k // 2 * code.kept // 8
    kept = unpack(qvalue[..., :split], code.kept, k // 2, xp).astype(np.float32)
    kept = (kept - np.float32(code.zero)).reshape(*qvalue.shape[:-1], k // 4, 2, 1)
    places = unpack(qvalue[..., split:], 2, k // 2, xp).reshape(kept.shape)
    four = np.arange(4, dtype=np.uint8)
    return xp.where(places == four, kept, np.float32(0)).sum(-2).reshape(*qvalue.shape[:-1], k)


def spread(scale: Array, group: tuple[int, int], shape: tuple[int, int], xp: ModuleType) -> Array:
    """A scale for each group, [..., rows, columns], as one for each weight: float32, broadcastable
    to [..., N, K].
    """
    scale = scale.astype(np.float32)
    for axis, (size, length) in enumerate(zip(group, shape, strict=True), start=-2):
        if scale.shape[axis] == 1:
            continue
        if size > 1:
            scale = xp.repeat(scale, size, axis=axis)
        if scale.shape[axis] > length:
            cut = slice(0, length)
            scale = scale[..., cut, :] if axis == -2 else scale[..., cut]
    return scale


def dequantize(
    qvalue: Array,
    qtype: str,
    shape: tuple[int, int],
    group: tuple[int, int],
    scale: Array,
    zero_point: Array | None = None,
    global_scale: Array | None = None,
    codebook: Array | None = None,
    additive: bool = False,
    xp: ModuleType = jnp,
) -> Array:
    """Decodes a weight.

    Args:
      qvalue: uint8 [..., N, row_bytes].
      shape: (N, K).
      group: rows and columns that share a scale.
      scale: [..., ceil(N / rows), ceil(K / columns)] of any float type.
      zero_point: like scale, of any type.
      global_scale: float32 [..., 1, 1]; multiplies the scales first.
      additive: the weight is code * scale + zero_point.

    Returns:
      float32 [..., N, K].
    """
    decoded = values(qvalue, qtype, shape[1], codebook, xp)
    return scaled(decoded, shape, group, scale, zero_point, global_scale, additive, xp)


def scaled(
    decoded: Array,
    shape: tuple[int, int],
    group: tuple[int, int],
    scale: Array,
    zero_point: Array | None = None,
    global_scale: Array | None = None,
    additive: bool = False,
    xp: ModuleType = jnp,
) -> Array:
    """The weight, float32 [..., N, K], that these values of codes make, see `dequantize`."""
    k, whole = shape[1], decoded.shape
    scale = scale.astype(np.float32)
    if global_scale is not None:
        scale = scale * global_scale
    columns = group[1]
    # Without spreading, where groups are runs of columns: cheaper, with the same result.
    if group[0] == 1 and scale.shape[-1] > 1 and k % columns == 0:
        grouped = (*decoded.shape[:-1], k // columns, columns)
        decoded, scale = decoded.reshape(grouped), scale[..., None]
        zero = None if zero_point is None else zero_point.astype(np.float32)[..., None]
    else:
        scale = spread(scale, group, shape, xp)
        zero = None if zero_point is None else spread(zero_point, group, shape, xp)
    if zero is None:
        weight = decoded * scale
    elif additive:
        # The product is rounded before the sum, as every other decoder does it.
        product = decoded * scale
        weight = (product if xp is np else jax.lax.optimization_barrier(product)) + zero
    else:
        weight = (decoded - zero) * scale
    return weight.reshape(whole)
