"""Decoding of raw weight blocks: bytes in, float32 out.

The layouts are those of GGUF (ggml block types, little-endian). A row of K elements is K /
elements blocks of `bytes` bytes, see `BLOCKS`. All products below are exact in float32 (at most 24
significant bits) or rounded once, so the result does not depend on whether a compiler fuses
multiply and add: it equals the reference decoder of the `gguf` package bit for bit, on numpy
arrays as on traced jax arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import jax.numpy as jnp
import numpy as np

BLOCKS: dict[str, tuple[int, int]] = {
    "f32": (1, 4),
    "f16": (1, 2),
    "bf16": (1, 2),
    "q4_0": (32, 18),
    "q4_1": (32, 20),
    "q5_0": (32, 22),
    "q5_1": (32, 24),
    "q8_0": (32, 34),
    "q2_k": (256, 84),
    "q3_k": (256, 110),
    "q4_k": (256, 144),
    "q5_k": (256, 176),
    "q6_k": (256, 210),
    "iq4_nl": (32, 18),
    "iq4_xs": (256, 136),
}
"""Elements and bytes of one block of each type."""

IQ4_CODEBOOK = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)

Array = Any  # numpy or jax array


def row_bytes(qtype: str, k: int) -> int:
    """Bytes of a row of `k` elements; ValueError where `k` is not a whole number of blocks."""
    elements, size = BLOCKS[qtype]
    if k % elements:
        raise ValueError(f"{qtype} rows hold blocks of {elements} elements: {k} is not a multiple")
    return k // elements * size


def dequantize(raw: Array, qtype: str, xp: ModuleType = jnp) -> Array:
    """Decodes rows of blocks.

    Args:
      raw: uint8 [..., row_bytes], rows of whole blocks.
      qtype: key of `BLOCKS`.
      xp: the array module to compute with, `jax.numpy` or `numpy`.

    Returns:
      float32 [..., K].
    """
    size = BLOCKS[qtype][1]
    blocks = raw.reshape(*raw.shape[:-1], raw.shape[-1] // size, size)
    return _DECODERS[qtype](blocks, xp).reshape(*raw.shape[:-1], -1)


def _f16(pair: Array) -> Array:
    """uint8 [..., 2 n] -> float32 [..., n]."""
    return pair.view(np.float16).astype(np.float32)


def _planes(codes: Array, shifts: Sequence[int], mask: int) -> Array:
    """Bit fields of bytes: uint8 [..., n] -> uint8 [..., len(shifts), n], one plane a shift."""
    return (codes[..., None, :] >> np.array(shifts, np.uint8)[:, None]) & np.uint8(mask)


def _flat(fields: Array, axes: int = 2) -> Array:
    """Merges the last `axes` axes."""
    return fields.reshape(*fields.shape[:-axes], -1)


def _nibbles(codes: Array) -> Array:
    """uint8 [..., n] -> uint8 [..., 2 n]: all low nibbles, then all high ones."""
    return _flat(_planes(codes, (0, 4), 15))


def _groups(x: Array, size: int) -> Array:
    return x.reshape(*x.shape[:-1], -1, size)


def _signed(codes: Array, offset: int) -> Array:
    return codes.astype(np.float32) - np.float32(offset)


def _f32(b: Array, xp: ModuleType) -> Array:
    return b.view(np.float32)


def _half(b: Array, xp: ModuleType) -> Array:
    return _f16(b)


def _bf16(b: Array, xp: ModuleType) -> Array:
    return (b.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)


def _q4_0(b: Array, xp: ModuleType) -> Array:
    return _f16(b[..., :2]) * _signed(_nibbles(b[..., 2:]), 8)


def _q4_1(b: Array, xp: ModuleType) -> Array:
    return _f16(b[..., :2]) * _signed(_nibbles(b[..., 4:]), 0) + _f16(b[..., 2:4])


def _five_bits(high: Array, low: Array) -> Array:
    """Codes of 32 elements whose top bits are `high` [..., 4] and low nibbles `low` [..., 16]."""
    top = (high[..., None] >> np.arange(8, dtype=np.uint8)) & np.uint8(1)
    return _nibbles(low) | (_flat(top) << np.uint8(4))


def _q5_0(b: Array, xp: ModuleType) -> Array:
    return _f16(b[..., :2]) * _signed(_five_bits(b[..., 2:6], b[..., 6:]), 16)


def _q5_1(b: Array, xp: ModuleType) -> Array:
    codes = _signed(_five_bits(b[..., 4:8], b[..., 8:]), 0)
    return _f16(b[..., :2]) * codes + _f16(b[..., 2:4])


def _q8_0(b: Array, xp: ModuleType) -> Array:
    return _f16(b[..., :2]) * b[..., 2:].view(np.int8).astype(np.float32)


def _q2_k(b: Array, xp: ModuleType) -> Array:
    scales, codes = b[..., :16], _groups(b[..., 16:80], 32)
    scale = _f16(b[..., 80:82]) * _signed(scales & np.uint8(15), 0)
    minimum = _f16(b[..., 82:84]) * _signed(scales >> np.uint8(4), 0)
    codes = _groups(_flat(_planes(codes, (0, 2, 4, 6), 3), 3), 16)
    return _flat(scale[..., None] * _signed(codes, 0) - minimum[..., None])


def _q3_k(b: Array, xp: ModuleType) -> Array:
    packed = b[..., 96:108]
    low = _nibbles(packed[..., :8])
    high = _flat(_planes(packed[..., 8:], (0, 2, 4, 6), 3))
    scale = _f16(b[..., 108:110]) * _signed(low | (high << np.uint8(4)), 32)
    codes = _flat(_planes(_groups(b[..., 32:96], 32), (0, 2, 4, 6), 3), 3)
    third_bit = _flat(_planes(b[..., :32], range(8), 1))
    codes = _groups(codes | (third_bit << np.uint8(2)), 16)
    return _flat(scale[..., None] * _signed(codes, 4))


def _six_bit_scales(packed: Array, xp: ModuleType) -> tuple[Array, Array]:
    """Eight scales and eight minima of 6 bits from the 12 bytes that q4_k and q5_k share."""
    scale, minimum, rest = packed[..., :4], packed[..., 4:8], packed[..., 8:]
    low, top = np.uint8(63), np.uint8(0x30)
    scales = [scale & low, (rest & np.uint8(15)) | ((scale >> np.uint8(2)) & top)]
    minima = [minimum & low, (rest >> np.uint8(4)) | ((minimum >> np.uint8(2)) & top)]
    return xp.concatenate(scales, axis=-1), xp.concatenate(minima, axis=-1)


def _affine_k(b: Array, codes: Array, xp: ModuleType) -> Array:
    """d * scale * code - dmin * minimum over eight groups of 32; codes [..., 8, 32]."""
    scales, minima = _six_bit_scales(b[..., 4:16], xp)
    scale = _f16(b[..., :2]) * _signed(scales, 0)
    minimum = _f16(b[..., 2:4]) * _signed(minima, 0)
    return _flat(scale[..., None] * _signed(codes, 0) - minimum[..., None])


def _q4_k(b: Array, xp: ModuleType) -> Array:
    return _affine_k(b, _nibbles(_groups(b[..., 16:], 32)).reshape(*b.shape[:-1], 8, 32), xp)


def _q5_k(b: Array, xp: ModuleType) -> Array:
    low = _nibbles(_groups(b[..., 48:], 32)).reshape(*b.shape[:-1], 8, 32)
    return _affine_k(b, low | (_planes(b[..., 16:48], range(8), 1) << np.uint8(4)), xp)


def _q6_k(b: Array, xp: ModuleType) -> Array:
    low = _flat(_nibbles(_groups(b[..., :128], 64)))
    high = _flat(_planes(_groups(b[..., 128:192], 32), (0, 2, 4, 6), 3), 3)
    scale = _f16(b[..., 208:210]) * b[..., 192:208].view(np.int8).astype(np.float32)
    return _flat(scale[..., None] * _signed(_groups(low | (high << np.uint8(4)), 16), 32))


def _codebook(codes: Array, xp: ModuleType) -> Array:
    return xp.asarray(IQ4_CODEBOOK, np.float32)[codes]


def _iq4_nl(b: Array, xp: ModuleType) -> Array:
    return _f16(b[..., :2]) * _codebook(_nibbles(b[..., 2:]), xp)


def _iq4_xs(b: Array, xp: ModuleType) -> Array:
    low = _flat((b[..., 4:8, None] >> np.array([0, 4], np.uint8)) & np.uint8(15))
    high = _flat((b[..., 2:4, None] >> np.array([0, 2, 4, 6], np.uint8)) & np.uint8(3))
    scale = _f16(b[..., :2]) * _signed(low | (high << np.uint8(4)), 32)
    return _flat(scale[..., None] * _codebook(_nibbles(_groups(b[..., 8:], 16)), xp))


_DECODERS: dict[str, Callable[[Array, ModuleType], Array]] = {
    "f32": _f32,
    "f16": _half,
    "bf16": _bf16,
    "q4_0": _q4_0,
    "q4_1": _q4_1,
    "q5_0": _q5_0,
    "q5_1": _q5_1,
    "q8_0": _q8_0,
    "q2_k": _q2_k,
    "q3_k": _q3_k,
    "q4_k": _q4_k,
    "q5_k": _q5_k,
    "q6_k": _q6_k,
    "iq4_nl": _iq4_nl,
    "iq4_xs": _iq4_xs,
}
