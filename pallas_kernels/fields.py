"""Numbers that lie inside blocks of bytes, for the decoders of these blocks."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = Any  # numpy or jax array


def half(b: Array, at: int) -> Array:
    """The float16 at byte `at` of every block: float32 [..., 1]."""
    return b[..., at : at + 2].view(np.float16).astype(np.float32)


def field(b: Array, at: int, size: int, shift: int, bits: int) -> Array:
    """`bits` bits from bit `shift` on, of `size` bytes from byte `at` on: uint8 [..., size]."""
    return (b[..., at : at + size] >> np.uint8(shift)) & np.uint8((1 << bits) - 1)


def number(codes: Array, zero: int = 0) -> Array:
    """What unsigned codes stand for: float32."""
    return codes.astype(np.float32) - np.float32(zero)


def nibbles(b: Array, at: int) -> Array:
    """Low nibbles of 16 bytes, then their high ones: uint8 [..., 32]."""
    both = b[..., None, at : at + 16] >> np.array([[0], [4]], np.uint8)
    return (both & np.uint8(15)).reshape(*b.shape[:-1], 32)
