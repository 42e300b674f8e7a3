"""Decoding of the block types of GGUF whose codes stand for vectors of a grid (`iq_grids`).

A block holds 256 elements. A code picks 8 of them (4 in iq3) at once; iq2 and iq3 store magnitudes
and give signs apart from them. Every product is exact in float32: see `unpack`.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import numpy as np

from pallas_kernels.fields import Array, half, number
from pallas_kernels.iq_grids import grid

_EIGHTH = np.float32(0.125)


# A decoder takes blocks, uint8 [..., bytes], to values, float32 [..., some axes of 256 elements].


def _looked_up(name: str, codes: Array, xp: ModuleType) -> Array:
    """The grid's vectors of codes [..., n]: float32 [..., n, 8 or 4]."""
    return xp.asarray(grid(name).astype(np.float32))[codes]


def _bits(b: Array) -> Array:
    """The bits of bytes [..., n], the lowest first: uint8 [..., n, 8]."""
    return (b[..., None] >> np.arange(8, dtype=np.uint8)) & np.uint8(1)


def _signs(b: Array) -> Array:
    """-1 where a bit of bytes [..., n] is set, else 1: float32 [..., n, 8]."""
    return np.float32(1) - np.float32(2) * number(_bits(b))


def _even_parity(seven: Array) -> Array:
    """Seven bits (uint8) with the eighth that makes the number of ones even."""
    folded = seven ^ (seven >> np.uint8(4))
    folded = folded ^ (folded >> np.uint8(2))
    folded = folded ^ (folded >> np.uint8(1))
    return seven | (folded << np.uint8(7))


def _nibble_pairs(b: Array) -> Array:
    """Low and high nibble of each byte [..., n] in turn: uint8 [..., 2 n]."""
    both = (b[..., None] >> np.array([0, 4], np.uint8)) & np.uint8(15)
    return both.reshape(*b.shape[:-1], -1)


def _words(b: Array, at: int, size: int, dtype: type) -> Array:
    """Little-endian words in the `size` bytes from byte `at` on."""
    return b[..., at : at + size].view(dtype)


def _tails(words: Array) -> tuple[Array, Array]:
    """Words of four 7-bit sign codes under a 4-bit scale, uint32 [..., 8].

    Returns signs, float32 [..., 8, 4, 8], and 2 * scale + 1, float32 [..., 8].
    """
    codes = (words[..., None] >> np.array([0, 7, 14, 21], np.uint32)) & np.uint32(127)
    scale = (words >> np.uint32(28)).astype(np.float32)
    return _signs(_even_parity(codes.astype(np.uint8))), _odd(scale)


def _odd(scale: Array) -> Array:
    return np.float32(2) * scale.astype(np.float32) + np.float32(1)


def _iq2_xxs(b: Array, xp: ModuleType) -> Array:
    groups = b[..., 2:].reshape(*b.shape[:-1], 8, 8)
    signs, odd = _tails(_words(groups, 4, 4, np.uint32)[..., 0])
    scale = half(b, 0) * odd * _EIGHTH
    return scale[..., None, None] * _looked_up("iq2_xxs", groups[..., :4], xp) * signs


def _iq2_xs(b: Array, xp: ModuleType) -> Array:
    words = _words(b, 2, 64, np.uint16)
    signs = _signs(_even_parity((words >> np.uint16(9)).astype(np.uint8)))
    values = _looked_up("iq2_xs", words & np.uint16(511), xp) * signs
    return _scaled(half(b, 0) * _odd(_nibble_pairs(b[..., 66:])) * _EIGHTH, values)


def _scaled(scale: Array, values: Array) -> Array:
    """Vectors [..., n, size] by scales [..., groups], each of which serves as many vectors."""
    groups = scale.shape[-1]
    return scale[..., None] * values.reshape(*scale.shape[:-1], groups, -1)


def _two_high_bits(b: Array, at: int) -> Array:
    """Four a byte, for 32 codes: uint16 [..., 32], shifted to bits 8 and 9."""
    bits = (b[..., at : at + 8, None] >> np.array([0, 2, 4, 6], np.uint8)) & np.uint8(3)
    return bits.reshape(*b.shape[:-1], 32).astype(np.uint16) << np.uint16(8)


def _iq2_s(b: Array, xp: ModuleType) -> Array:
    codes = b[..., 2:34].astype(np.uint16) | _two_high_bits(b, 66)
    values = _looked_up("iq2_s", codes, xp) * _signs(b[..., 34:66])
    return _scaled(half(b, 0) * _odd(_nibble_pairs(b[..., 74:])) * _EIGHTH, values)


def _iq3_xxs(b: Array, xp: ModuleType) -> Array:
    signs, odd = _tails(_words(b, 66, 32, np.uint32))
    values = _looked_up("iq3_xxs", b[..., 2:66], xp).reshape(signs.shape) * signs
    return _scaled(half(b, 0) * odd * np.float32(0.25), values)


def _iq3_s(b: Array, xp: ModuleType) -> Array:
    high = _bits(b[..., 66:74]).reshape(*b.shape[:-1], 64).astype(np.uint16)
    codes = b[..., 2:66].astype(np.uint16) | (high << np.uint16(8))
    signs = _signs(b[..., 74:106])
    values = _looked_up("iq3_s", codes, xp).reshape(signs.shape) * signs
    return _scaled(half(b, 0) * _odd(_nibble_pairs(b[..., 106:])), values)


def _iq1(codes: Array, negative: Array, xp: ModuleType) -> Array:
    """Vectors of -1, 0, 1, moved by 1/8: down where `negative` (0 or 1) says so."""
    delta = _EIGHTH - np.float32(0.25) * negative.astype(np.float32)
    return _looked_up("iq1", codes, xp) + delta[..., None]


def _iq1_s(b: Array, xp: ModuleType) -> Array:
    words = _words(b, 34, 16, np.uint16)
    high = (words[..., None] >> np.array([0, 3, 6, 9], np.uint16)) & np.uint16(7)
    codes = b[..., 2:34].reshape(high.shape) | (high << np.uint16(8))
    values = _iq1(codes, xp.broadcast_to((words >> np.uint16(15))[..., None], high.shape), xp)
    return _scaled(half(b, 0) * _odd((words >> np.uint16(12)) & np.uint16(7)), values)


def _iq1_m(b: Array, xp: ModuleType) -> Array:
    words = _words(b, 48, 8, np.uint16)
    top = words >> np.uint16(12) << np.array([0, 4, 8, 12], np.uint16)
    bits = top[..., 0] | top[..., 1] | top[..., 2] | top[..., 3]
    d = bits[..., None].view(np.float16).astype(np.float32)
    scales = (words[..., None] >> np.array([0, 3, 6, 9], np.uint16)) & np.uint16(7)
    nibble = _nibble_pairs(b[..., 32:48]).astype(np.uint16)
    codes = b[..., :32] | ((nibble & np.uint16(7)) << np.uint16(8))
    values = _iq1(codes, nibble >> np.uint16(3), xp)
    return _scaled(d * _odd(scales.reshape(*b.shape[:-1], 16)), values)


DECODERS: dict[str, Callable[[Array, ModuleType], Array]] = {
    "iq1_s": _iq1_s,
    "iq1_m": _iq1_m,
    "iq2_xxs": _iq2_xxs,
    "iq2_xs": _iq2_xs,
    "iq2_s": _iq2_s,
    "iq3_xxs": _iq3_xxs,
    "iq3_s": _iq3_s,
}
