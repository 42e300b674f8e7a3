"""Decoding of a tile of a weight in planes (see `planes`), as plain jnp on values, inside kernels.

A block of columns falls into segments: the columns that one field of the narrowest plane runs over.
A wider plane has the bytes of several segments beside each other before its next field begins:

    segments of a block:  8 / narrowest width
    segment s of a plane: run s % (width / narrowest) of its bytes, field s // (width / narrowest)

A kernel loads the runs of each plane, [outputs, columns of a segment] (or [columns, outputs], or a
part of the columns), and takes from them one segment after the other. Nothing here knows which way
round a tile lies. Bytes are uint8 or int32, as the backend likes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.codes import CODES, ML_DTYPES
from pallas_kernels.matmul.planes import Planes


def segments(planes: Planes) -> int:
    """How many segments a block has."""
    return 8 // planes.widths[-1]


def segment_columns(planes: Planes) -> int:
    """How many columns a segment has."""
    return planes.block * planes.widths[-1] // 8


def runs(planes: Planes) -> tuple[int, ...]:
    """How many runs of bytes, as long as a segment has columns, each plane has in a block."""
    return tuple(width // planes.widths[-1] for width in planes.widths)


def codes(
    tiles: Sequence[Sequence[jax.Array]], planes: Planes, segment: int, packed: bool = False
) -> jax.Array:
    """Codes of one segment, unsigned, of the dtype of the bytes.

    Args:
      tiles: for each plane its runs, all of one shape.
      packed: these are int32 and hold four bytes each, and so do the codes: not of 8 bits.
    """
    result, shift = None, 0
    every = 0x01010101 if packed else 1
    for parts, width, count in zip(tiles, planes.widths, runs(planes), strict=True):
        field, run = divmod(segment, count)
        part = parts[run]
        if field:
            part = part >> field * width
        if width < 8:
            part = part & (every * ((1 << width) - 1))
        part = part << shift if shift else part
        result = part if result is None else result | part
        shift += width
    assert result is not None
    return result


def values(
    codes: jax.Array, planes: Planes, dtype: Any, codebook: Any = None, zero: Any = 0
) -> jax.Array:
    """What codes stand for before they are scaled.

    Args:
      codes: uint8, int16 or int32, unsigned.
      dtype: float32, or bfloat16, which holds all but the entries of codebooks exactly.
      codebook: the 16 entries of a "lookup" type: scalars of `dtype`.
      zero: an integer of 8 bits, of `dtype`, that is subtracted from integers.
    """
    if planes.value == "lookup":
        return lookup(codes, codebook)
    to_16_bits = codes.dtype.itemsize < 4 and dtype == jnp.bfloat16
    if planes.value == "float":
        if planes.qtype == "fp4_e2m1" and to_16_bits:
            return _e2m1(codes)
        exponent = CODES[planes.qtype].exponent
        if planes.bits == 8 and codes.dtype == jnp.uint8:
            return lax.bitcast_convert_type(codes, ML_DTYPES[planes.qtype]).astype(dtype)
        return small_float(codes, exponent, planes.bits - 1 - exponent, dtype)
    if planes.value == "signed":
        if codes.dtype == jnp.uint8:
            number = lax.bitcast_convert_type(codes, jnp.int8).astype(dtype)
        else:
            number = ((codes ^ 128) - 128).astype(dtype)
        return number if isinstance(zero, int) and zero == 0 else number - zero
    if to_16_bits and planes.bits < 7:
        return _beside(128, codes) - (zero + (128 + planes.offset))
    number = codes.astype(dtype)
    if isinstance(zero, int) and zero + planes.offset == 0:
        return number
    return number - (zero + planes.offset)


# GPUs convert integers at a fraction of the rate of other operations: an integer that is put into
# the last bits of a bfloat16 is added to it, in units of its last place.


def _beside(base: int, codes: jax.Array) -> jax.Array:
    """base + codes * (base / 128) in bfloat16, for codes below 128 and a power of two."""
    bits = int(np.array(base, jnp.bfloat16).view(np.int16))
    return lax.bitcast_convert_type(codes.astype(jnp.int16) | bits, jnp.bfloat16)


def _e2m1(codes: jax.Array) -> jax.Array:
    """Floats of 4 bits as bfloat16: twice their magnitudes, in fields of 4 bits of a word."""
    code = codes.astype(jnp.int32)
    doubled = jnp.full_like(code, np.uint32(0xC8643210).view(np.int32))
    doubled = lax.shift_right_logical(doubled, (code & 7) << 2) & 15
    magnitude = _beside(64, doubled) - 64
    sign = (code & 8).astype(jnp.int16) << 12
    bits = lax.bitcast_convert_type(magnitude, jnp.int16) ^ sign
    return lax.bitcast_convert_type(bits, jnp.bfloat16)


def small_float(codes: jax.Array, exponent: int, mantissa: int, dtype: Any) -> jax.Array:
    """Sign, exponent and mantissa bits as float32 or bfloat16, exactly; no code is inf or NaN.

    The bits of a normal number are moved to where `dtype` has them, with its bias; a subnormal one
    is an integer times a power of two. No subnormal number of `dtype` occurs: TPUs have none.
    """
    word, fraction = (jnp.int32, 23) if dtype == jnp.float32 else (jnp.int16, 7)
    bias = (1 << (exponent - 1)) - 1
    codes = codes.astype(word)
    magnitude = codes & ((1 << (exponent + mantissa)) - 1)
    normal = (magnitude << (fraction - mantissa)) + ((127 - bias) << fraction)
    subnormal = magnitude.astype(dtype) * 2.0 ** (1 - bias - mantissa)
    number = jnp.where(
        magnitude < 1 << mantissa, subnormal, lax.bitcast_convert_type(normal, dtype)
    )
    return jnp.where(codes < 1 << (exponent + mantissa), number, -number)


def lookup(codes: jax.Array, codebook: Sequence[Any]) -> jax.Array:
    """Entries of a codebook (scalars, a power of two of them), chosen by a tree of selects."""
    chosen, bit = list(codebook), 1
    while len(chosen) > 1:
        odd = (codes & bit) != 0
        chosen = [
            jnp.where(odd, high, low) for low, high in zip(chosen[::2], chosen[1::2], strict=True)
        ]
        bit <<= 1
    return chosen[0]


def e8m0(scale: jax.Array) -> jax.Array:
    """Bytes (uint8 or int32) of float8_e8m0fnu as float32: 2 ** (byte - 127), and NaN for 255."""
    byte = scale.astype(jnp.int32)
    bits = jnp.where(byte == 0, 1 << 22, byte << 23)  # 2 ** -127 is subnormal
    return lax.bitcast_convert_type(jnp.where(byte == 255, 0x7FC00000, bits), jnp.float32)


def scales(scale: jax.Array, dtype: str) -> jax.Array:
    """Scales as a kernel loaded them, as float32.

    Args:
      scale: of type `dtype`, or its bits (uint8, uint16) where that is a float of 8 or 16 bits.
      dtype: name of the dtype of the stored scales.
    """
    if dtype == "float8_e8m0fnu":
        return e8m0(scale)
    if dtype == "float8_e4m3fn":
        return small_float(scale, 4, 3, jnp.float32)
    if dtype == "float16" and scale.dtype == jnp.uint16:
        return small_float(scale, 5, 10, jnp.float32)
    return scale.astype(jnp.float32)


def rounded(weight: jax.Array, dtype: str | None) -> jax.Array:
    """float32 rounded to bfloat16 or float16, in steps that no compiler leaves out."""
    if dtype is None:
        return weight
    bits = lax.bitcast_convert_type(weight, jnp.int32)
    if dtype == "bfloat16":
        bits = bits + 0x7FFF + (lax.shift_right_logical(bits, 16) & 1)
        return lax.bitcast_convert_type(bits & -0x10000, jnp.float32)
    # The last 13 bits of the fraction go, and more of a number that is subnormal in float16.
    exponent = lax.shift_right_logical(bits, 23) & 255
    cut = jnp.clip(126 - exponent, 13, 25)
    fraction = (bits & 0x7FFFFF) | 0x800000
    odd = lax.shift_right_logical(fraction, cut) & 1
    fraction = lax.shift_right_logical(fraction + lax.shift_left(1, cut - 1) - 1 + odd, cut)
    power = lax.bitcast_convert_type((exponent + cut - 23) << 23, jnp.float32)
    size = jnp.where(exponent < 101, 0.0, fraction.astype(jnp.float32) * power)
    size = jnp.where(size > 65504, jnp.inf, size)
    return jnp.where(weight < 0, -size, size)
