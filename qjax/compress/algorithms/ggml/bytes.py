"""Fields of blocks of bytes, for the encoders of these blocks (`pallas_kernels.unpack` decodes)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

Array = Any


def half(values: Array) -> Array:
    """float16 of one number a block: uint8 [..., 2] of float32 [..., 1]."""
    both = jax.lax.bitcast_convert_type(values.astype(jnp.float16), jnp.uint8)
    return both.reshape(*values.shape[:-1], 2)


def codes(numbers: Array, zero: int = 0) -> Array:
    """uint8 of whole numbers from -`zero` on."""
    return (numbers + zero).astype(jnp.uint8)


def joined(parts: Array, bits: int) -> Array:
    """Codes [..., n, bytes] of a few bits each in one byte, the first in the lowest bits:
    uint8 [..., bytes]."""
    whole = parts[..., 0, :]
    for n in range(1, parts.shape[-2]):
        whole = whole | (parts[..., n, :] << jnp.uint8(bits * n))
    return whole


def nibbles(numbers: Array) -> Array:
    """32 codes of 4 bits [..., 32]: the first 16 in low nibbles, the others above them."""
    return joined(numbers.reshape(*numbers.shape[:-1], 2, 16) & jnp.uint8(15), 4)


def bits(flags: Array) -> Array:
    """Bits [..., 8 n] (0 or 1) as bytes [..., n], the first in the lowest bit."""
    return joined(jnp.swapaxes(flags.reshape(*flags.shape[:-1], -1, 8), -1, -2), 1)


def two_bits(numbers: Array) -> Array:
    """256 codes of 2 bits [..., 256] as 64 bytes: 128 in 32 bytes, 32 at each shift."""
    parts = numbers.reshape(*numbers.shape[:-1], 2, 4, 32) & jnp.uint8(3)
    return joined(parts, 2).reshape(*numbers.shape[:-1], 64)


def planes(flags: Array) -> Array:
    """256 bits [..., 256] as 32 bytes: bit g of byte i is that of element 32 g + i."""
    return joined(flags.reshape(*flags.shape[:-1], 8, 32), 1)
