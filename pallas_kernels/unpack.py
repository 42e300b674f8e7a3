"""Decoding of raw weight blocks: bytes in, float32 out.

The layouts are those of GGUF (ggml block types, little-endian). A row of K elements is K /
elements blocks of `bytes` bytes, see `BLOCKS`. All products below are exact in float32 (at most 24
significant bits) or rounded once, so the result does not depend on whether a compiler fuses
multiply and add: it equals the reference decoder of the `gguf` package bit for bit, on numpy
arrays as on traced jax arrays.
"""

from __future__ import annotations

from collections.abc import Callable
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


# A decoder takes blocks, uint8 [..., bytes], to values, float32 [..., groups, elements of a group].
# Codes of the larger blocks are joined from runs of bytes shifted by one amount each: XLA makes
# plain loops of these, several times as fast as shifting everything by an array of shifts.


def _half(b: Array, at: int) -> Array:
    """The float16 at byte `at` of every block: float32 [..., 1]."""
    return b[..., at : at + 2].view(np.float16).astype(np.float32)


def _field(b: Array, at: int, size: int, shift: int, bits: int) -> Array:
    """`bits` bits from bit `shift` on, of `size` bytes from byte `at` on: uint8 [..., size]."""
    return (b[..., at : at + size] >> np.uint8(shift)) & np.uint8((1 << bits) - 1)


def _number(codes: Array, zero: int = 0) -> Array:
    """What unsigned codes stand for: float32."""
    return codes.astype(np.float32) - np.float32(zero)


def _nibbles(b: Array, at: int) -> Array:
    """Low nibbles of 16 bytes, then their high ones: uint8 [..., 32]."""
    both = b[..., None, at : at + 16] >> np.array([[0], [4]], np.uint8)
    return (both & np.uint8(15)).reshape(*b.shape[:-1], 32)


def _f32(b: Array, xp: ModuleType) -> Array:
    return b.view(np.float32)


def _f16(b: Array, xp: ModuleType) -> Array:
    return b.view(np.float16).astype(np.float32)


def _bf16(b: Array, xp: ModuleType) -> Array:
    return (b.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)


def _q4_0(b: Array, xp: ModuleType) -> Array:
    return _half(b, 0) * _number(_nibbles(b, 2), 8)


def _q4_1(b: Array, xp: ModuleType) -> Array:
    return _half(b, 0) * _number(_nibbles(b, 4)) + _half(b, 2)


def _five_bits(b: Array, top: int, low: int, xp: ModuleType) -> Array:
    """32 codes: bit e of the four bytes at `top`, over the nibbles of the 16 bytes at `low`."""
    runs = []
    for i in range(4):
        bits = (b[..., top + i : top + i + 1] >> np.arange(8, dtype=np.uint8)) & np.uint8(1)
        runs.append(_field(b, low + 8 * (i % 2), 8, 4 * (i // 2), 4) | (bits << np.uint8(4)))
    return xp.concatenate(runs, axis=-1)


def _q5_0(b: Array, xp: ModuleType) -> Array:
    return _half(b, 0) * _number(_five_bits(b, 2, 6, xp), 16)


def _q5_1(b: Array, xp: ModuleType) -> Array:
    return _half(b, 0) * _number(_five_bits(b, 4, 8, xp)) + _half(b, 2)


def _q8_0(b: Array, xp: ModuleType) -> Array:
    return _half(b, 0) * b[..., 2:].view(np.int8).astype(np.float32)


def _two_bits(b: Array, at: int, group: int) -> Array:
    """Codes of the group-th 32 elements: 128 elements a 32 bytes, 32 at each shift."""
    return _field(b, at + 32 * (group // 4), 32, 2 * (group % 4), 2)


def _q2_k(b: Array, xp: ModuleType) -> Array:
    scale = _half(b, 80) * _number(_field(b, 0, 16, 0, 4))
    minimum = _half(b, 82) * _number(_field(b, 0, 16, 4, 4))
    codes = _grouped([_two_bits(b, 16, g) for g in range(8)], 16, xp)
    return scale[..., None] * _number(codes) - minimum[..., None]


def _q3_k(b: Array, xp: ModuleType) -> Array:
    low = b[..., None, 96:104] >> np.array([[0], [4]], np.uint8)
    high = b[..., None, 104:108] >> np.array([[0], [2], [4], [6]], np.uint8)
    scale = _half(b, 108) * _six_bit_scales(low, high)
    runs = [_two_bits(b, 32, g) | (_field(b, 0, 32, g, 1) << np.uint8(2)) for g in range(8)]
    return scale[..., None] * _number(_grouped(runs, 16, xp), 4)


def _six_bit_scales(low: Array, high: Array) -> Array:
    """Signed 6-bit scales from bytes whose last 4 and last 2 bits count: float32 [..., n]."""
    low, high = low & np.uint8(15), high & np.uint8(3)
    flat = (*low.shape[:-2], -1)
    return _number(low.reshape(flat) | (high.reshape(flat) << np.uint8(4)), 32)


def _affine(b: Array, codes: Array, xp: ModuleType) -> Array:
    """d * scale * code - dmin * minimum, with the 6-bit scales that q4_k and q5_k share.

    codes: uint8 [..., 8, 32].
    """

    def six_bits(at: int, shift: int) -> Array:
        last = _field(b, 12, 4, shift, 4) | (_field(b, at, 4, 6, 2) << np.uint8(4))
        return _number(xp.concatenate([_field(b, at, 4, 0, 6), last], axis=-1))

    scale, minimum = _half(b, 0) * six_bits(4, 0), _half(b, 2) * six_bits(8, 4)
    return scale[..., None] * _number(codes) - minimum[..., None]


def _q4_k(b: Array, xp: ModuleType) -> Array:
    both = b[..., 16:].reshape(*b.shape[:-1], 4, 32)
    codes = xp.stack([both & np.uint8(15), both >> np.uint8(4)], axis=-2)
    return _affine(b, codes.reshape(*b.shape[:-1], 8, 32), xp)


def _q5_k(b: Array, xp: ModuleType) -> Array:
    low = [_field(b, 48 + 32 * (g // 2), 32, 4 * (g % 2), 4) for g in range(8)]
    runs = [low[g] | (_field(b, 16, 32, g, 1) << np.uint8(4)) for g in range(8)]
    return _affine(b, _grouped(runs, 32, xp), xp)


def _q6_k(b: Array, xp: ModuleType) -> Array:
    runs = []
    for g in range(8):
        half, quarter = g // 4, g % 4
        low = _field(b, 64 * half + 32 * (quarter % 2), 32, 4 * (quarter // 2), 4)
        runs.append(low | (_two_bits(b, 128, g) << np.uint8(4)))
    scale = _half(b, 208) * b[..., 192:208].view(np.int8).astype(np.float32)
    return scale[..., None] * _number(_grouped(runs, 16, xp), 32)


def _grouped(runs: list[Array], size: int, xp: ModuleType) -> Array:
    """Joins runs of codes, in groups of `size` elements that share a scale."""
    codes = xp.concatenate(runs, axis=-1)
    return codes.reshape(*codes.shape[:-1], -1, size)


def _codebook(codes: Array, xp: ModuleType) -> Array:
    return xp.asarray(IQ4_CODEBOOK, np.float32)[codes]


def _iq4_nl(b: Array, xp: ModuleType) -> Array:
    return _half(b, 0) * _codebook(_nibbles(b, 2), xp)


def _iq4_xs(b: Array, xp: ModuleType) -> Array:
    low = b[..., 4:8, None] >> np.array([0, 4], np.uint8)
    high = b[..., 2:4, None] >> np.array([0, 2, 4, 6], np.uint8)
    scale = _half(b, 0) * _six_bit_scales(low, high)
    both = b[..., 8:].reshape(*b.shape[:-1], 8, 16)
    codes = xp.concatenate([both & np.uint8(15), both >> np.uint8(4)], axis=-1)
    return scale[..., None] * _codebook(codes, xp)


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
}
