"""Decoding of raw weight blocks: bytes in, float32 out.

The layouts are those of GGUF (ggml block types, little-endian). A row of K elements is K /
elements blocks of `bytes` bytes, see `BLOCKS`. All products below are exact in float32 (at most 24
significant bits) or rounded once, so the result does not depend on whether a compiler fuses
multiply and add: it equals the reference decoder of the `gguf` package bit for bit, on numpy
arrays as on traced jax arrays. (The types with grids are in `unpack_grids`.)
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import jax.numpy as jnp
import numpy as np

from pallas_kernels import unpack_grids
from pallas_kernels.fields import Array, field, half, nibbles, number

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
    "iq1_s": (256, 50),
    "iq1_m": (256, 56),
    "iq2_xxs": (256, 66),
    "iq2_xs": (256, 74),
    "iq2_s": (256, 82),
    "iq3_xxs": (256, 98),
    "iq3_s": (256, 110),
    "tq1_0": (256, 54),
    "tq2_0": (256, 66),
    "q1_0": (128, 18),
    "q2_0": (64, 18),
}
"""Elements and bytes of one block of each type."""

IQ4_CODEBOOK = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


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


# A decoder takes blocks, uint8 [..., bytes], to values, float32 [..., groups, elements of a group].
# Codes of the larger blocks are joined from runs of bytes shifted by one amount each: XLA makes
# plain loops of these, several times as fast as shifting everything by an array of shifts.


def _f32(b: Array, xp: ModuleType) -> Array:
    return b.view(np.float32)


def _f16(b: Array, xp: ModuleType) -> Array:
    return b.view(np.float16).astype(np.float32)


def _bf16(b: Array, xp: ModuleType) -> Array:
    return (b.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)


def _q4_0(b: Array, xp: ModuleType) -> Array:
    return half(b, 0) * number(nibbles(b, 2), 8)


def _q4_1(b: Array, xp: ModuleType) -> Array:
    return half(b, 0) * number(nibbles(b, 4)) + half(b, 2)


def _five_bits(b: Array, top: int, low: int, xp: ModuleType) -> Array:
    """32 codes: bit e of the four bytes at `top`, over the nibbles of the 16 bytes at `low`."""
    runs = []
    for i in range(4):
        bits = (b[..., top + i : top + i + 1] >> np.arange(8, dtype=np.uint8)) & np.uint8(1)
        runs.append(field(b, low + 8 * (i % 2), 8, 4 * (i // 2), 4) | (bits << np.uint8(4)))
    return xp.concatenate(runs, axis=-1)


def _q5_0(b: Array, xp: ModuleType) -> Array:
    return half(b, 0) * number(_five_bits(b, 2, 6, xp), 16)


def _q5_1(b: Array, xp: ModuleType) -> Array:
    return half(b, 0) * number(_five_bits(b, 4, 8, xp)) + half(b, 2)


def _q8_0(b: Array, xp: ModuleType) -> Array:
    return half(b, 0) * b[..., 2:].view(np.int8).astype(np.float32)


def _two_bits(b: Array, at: int, group: int) -> Array:
    """Codes of the group-th 32 elements: 128 elements a 32 bytes, 32 at each shift."""
    return field(b, at + 32 * (group // 4), 32, 2 * (group % 4), 2)


def _q2_k(b: Array, xp: ModuleType) -> Array:
    scale = half(b, 80) * number(field(b, 0, 16, 0, 4))
    minimum = half(b, 82) * number(field(b, 0, 16, 4, 4))
    codes = _grouped([_two_bits(b, 16, g) for g in range(8)], 16, xp)
    return scale[..., None] * number(codes) - minimum[..., None]


def _q3_k(b: Array, xp: ModuleType) -> Array:
    low = b[..., None, 96:104] >> np.array([[0], [4]], np.uint8)
    high = b[..., None, 104:108] >> np.array([[0], [2], [4], [6]], np.uint8)
    scale = half(b, 108) * _six_bit_scales(low, high)
    runs = [_two_bits(b, 32, g) | (field(b, 0, 32, g, 1) << np.uint8(2)) for g in range(8)]
    return scale[..., None] * number(_grouped(runs, 16, xp), 4)


def _six_bit_scales(low: Array, high: Array) -> Array:
    """Signed 6-bit scales from bytes whose last 4 and last 2 bits count: float32 [..., n]."""
    low, high = low & np.uint8(15), high & np.uint8(3)
    flat = (*low.shape[:-2], -1)
    return number(low.reshape(flat) | (high.reshape(flat) << np.uint8(4)), 32)


def _affine(b: Array, codes: Array, xp: ModuleType) -> Array:
    """d * scale * code - dmin * minimum, with the 6-bit scales that q4_k and q5_k share.

    codes: uint8 [..., 8, 32].
    """

    def six_bits(at: int, shift: int) -> Array:
        last = field(b, 12, 4, shift, 4) | (field(b, at, 4, 6, 2) << np.uint8(4))
        return number(xp.concatenate([field(b, at, 4, 0, 6), last], axis=-1))

    scale, minimum = half(b, 0) * six_bits(4, 0), half(b, 2) * six_bits(8, 4)
    return scale[..., None] * number(codes) - minimum[..., None]


def _q4_k(b: Array, xp: ModuleType) -> Array:
    both = b[..., 16:].reshape(*b.shape[:-1], 4, 32)
    codes = xp.stack([both & np.uint8(15), both >> np.uint8(4)], axis=-2)
    return _affine(b, codes.reshape(*b.shape[:-1], 8, 32), xp)


def _q5_k(b: Array, xp: ModuleType) -> Array:
    low = [field(b, 48 + 32 * (g // 2), 32, 4 * (g % 2), 4) for g in range(8)]
    runs = [low[g] | (field(b, 16, 32, g, 1) << np.uint8(4)) for g in range(8)]
    return _affine(b, _grouped(runs, 32, xp), xp)


def _q6_k(b: Array, xp: ModuleType) -> Array:
    runs = []
    for g in range(8):
        side, quarter = g // 4, g % 4
        low = field(b, 64 * side + 32 * (quarter % 2), 32, 4 * (quarter // 2), 4)
        runs.append(low | (_two_bits(b, 128, g) << np.uint8(4)))
    scale = half(b, 208) * b[..., 192:208].view(np.int8).astype(np.float32)
    return scale[..., None] * number(_grouped(runs, 16, xp), 32)


def _grouped(runs: list[Array], size: int, xp: ModuleType) -> Array:
    """Joins runs of codes, in groups of `size` elements that share a scale."""
    codes = xp.concatenate(runs, axis=-1)
    return codes.reshape(*codes.shape[:-1], -1, size)


def _codebook(codes: Array, xp: ModuleType) -> Array:
    return xp.asarray(IQ4_CODEBOOK, np.float32)[codes]


def _iq4_nl(b: Array, xp: ModuleType) -> Array:
    return half(b, 0) * _codebook(nibbles(b, 2), xp)


def _iq4_xs(b: Array, xp: ModuleType) -> Array:
    low = b[..., 4:8, None] >> np.array([0, 4], np.uint8)
    high = b[..., 2:4, None] >> np.array([0, 2, 4, 6], np.uint8)
    scale = half(b, 0) * _six_bit_scales(low, high)
    both = b[..., 8:].reshape(*b.shape[:-1], 8, 16)
    codes = xp.concatenate([both & np.uint8(15), both >> np.uint8(4)], axis=-1)
    return scale[..., None] * _codebook(codes, xp)


def _tq1_0(b: Array, xp: ModuleType) -> Array:
    """Five digits of base 3 a byte, which holds them as a fraction of 256, rounded up.

    Multiplying by 3 ** n mod 256 brings digit n to the front.
    """
    runs = []
    for at, size, digits in ((0, 32, 5), (32, 16, 5), (48, 4, 4)):
        for n in range(digits):
            rest = (b[..., at : at + size] * np.uint8(3**n)).astype(np.uint16)
            runs.append(((rest * np.uint16(3)) >> np.uint16(8)).astype(np.uint8))
    return half(b, 52) * number(xp.concatenate(runs, axis=-1), 1)


def _tq2_0(b: Array, xp: ModuleType) -> Array:
    codes = xp.concatenate([_two_bits(b, 0, g) for g in range(8)], axis=-1)
    return half(b, 64) * number(codes, 1)


def _q1_0(b: Array, xp: ModuleType) -> Array:
    bits = (b[..., 2:, None] >> np.arange(8, dtype=np.uint8)) & np.uint8(1)
    return half(b, 0)[..., None] * (number(bits) * np.float32(2) - np.float32(1))


def _q2_0(b: Array, xp: ModuleType) -> Array:
    codes = (b[..., 2:, None] >> np.array([0, 2, 4, 6], np.uint8)) & np.uint8(3)
    return half(b, 0)[..., None] * number(codes, 1)


_DECODERS: dict[str, Callable[[Array, ModuleType], Array]] = {
    "f32": _f32,
    "f16": _f16,
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
    "tq1_0": _tq1_0,
    "tq2_0": _tq2_0,
    "q1_0": _q1_0,
    "q2_0": _q2_0,
} | unpack_grids.DECODERS
