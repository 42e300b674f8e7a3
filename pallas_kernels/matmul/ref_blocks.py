"""Oracle decoders of the block types with grids, ternary and binary digits.

They state for each of a block's elements where its bits lie, and gather them. They share the grids'
numbers with `unpack_grids`, but no code.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.iq_grids import grid

E = np.arange(256)
EIGHT, FOUR = E // 8, E // 4  # number of the vector that an element is in
# Sign bits of a 7-bit code: the code itself, and an eighth that makes their number even.
_SIGNS = np.array([i + 128 * (i.bit_count() % 2) for i in range(128)])

# Below, b holds the bytes of blocks as int32 [N, blocks, bytes].


def _half(b: jax.Array, at: int) -> jax.Array:
    return _as_half(b[..., at : at + 1] + 256 * b[..., at + 1 : at + 2])


def _as_half(word: jax.Array) -> jax.Array:
    bits = jax.lax.bitcast_convert_type(word.astype(jnp.uint16), jnp.float16)
    return bits.astype(jnp.float32)


def _bits(b: jax.Array, first: np.ndarray, count: int) -> jax.Array:
    """`count` bits from bit `first` of the block on, for every element; bytes count from low."""
    value = jnp.zeros((*b.shape[:2], len(first)), jnp.int32)
    for i in range(count):
        at = first + i
        value += ((b[..., at // 8] >> (at % 8)) & 1) << i
    return value


def _vectors(name: str, code: jax.Array, within: np.ndarray) -> jax.Array:
    return jnp.asarray(grid(name).astype(np.float32))[code, within]


def _sign(code: jax.Array) -> jax.Array:
    """The sign of each element by its vector's 7-bit code."""
    return 1.0 - 2 * ((jnp.asarray(_SIGNS)[code] >> (E % 8)) & 1)


def _sign_bit(b: jax.Array, at: int) -> jax.Array:
    return 1.0 - 2 * _bits(b, 8 * at + E, 1)


def _iq2_xxs(b: jax.Array) -> jax.Array:
    group = 8 * (2 + 8 * (E // 32))
    value = _vectors("iq2_xxs", _bits(b, group + 8 * (EIGHT % 4), 8), E % 8)
    sign = _sign(_bits(b, group + 32 + 7 * (EIGHT % 4), 7))
    scale = (_bits(b, group + 60, 4) + 0.5) / 4
    return _half(b, 0) * scale * value * sign


def _iq2_xs(b: jax.Array) -> jax.Array:
    word = 8 * 2 + 16 * EIGHT
    value = _vectors("iq2_xs", _bits(b, word, 9), E % 8)
    scale = (_bits(b, 8 * 66 + 4 * (E // 16), 4) + 0.5) / 4
    return _half(b, 0) * scale * value * _sign(_bits(b, word + 9, 7))


def _iq2_s(b: jax.Array) -> jax.Array:
    code = _bits(b, 8 * 2 + 8 * EIGHT, 8) + 256 * _bits(b, 8 * 66 + 2 * EIGHT, 2)
    scale = (_bits(b, 8 * 74 + 4 * (E // 16), 4) + 0.5) / 4
    return _half(b, 0) * scale * _vectors("iq2_s", code, E % 8) * _sign_bit(b, 34)


def _iq3_xxs(b: jax.Array) -> jax.Array:
    word = 8 * 66 + 32 * (E // 32)
    value = _vectors("iq3_xxs", _bits(b, 8 * 2 + 8 * FOUR, 8), E % 4)
    scale = (_bits(b, word + 28, 4) + 0.5) / 2
    return _half(b, 0) * scale * value * _sign(_bits(b, word + 7 * (EIGHT % 4), 7))


def _iq3_s(b: jax.Array) -> jax.Array:
    code = _bits(b, 8 * 2 + 8 * FOUR, 8) + 256 * _bits(b, 8 * 66 + FOUR, 1)
    scale = 2 * _bits(b, 8 * 106 + 4 * (E // 32), 4) + 1
    return _half(b, 0) * scale * _vectors("iq3_s", code, E % 4) * _sign_bit(b, 74)


def _iq1_s(b: jax.Array) -> jax.Array:
    word = 8 * 34 + 16 * (E // 32)
    code = _bits(b, 8 * 2 + 8 * EIGHT, 8) + 256 * _bits(b, word + 3 * (EIGHT % 4), 3)
    delta = jnp.where(_bits(b, word + 15, 1) == 1, -0.125, 0.125)
    scale = 2 * _bits(b, word + 12, 3) + 1
    return _half(b, 0) * scale * (_vectors("iq1", code, E % 8) + delta)


def _iq1_m(b: jax.Array) -> jax.Array:
    nibble = 8 * 32 + 4 * EIGHT
    code = _bits(b, 8 * EIGHT, 8) + 256 * _bits(b, nibble, 3)
    delta = jnp.where(_bits(b, nibble + 3, 1) == 1, -0.125, 0.125)
    scale = 2 * _bits(b, 8 * 48 + 16 * (E // 64) + 3 * (E // 16 % 4), 3) + 1
    d = sum(((b[..., 49 + 2 * i] >> 4) << (4 * i) for i in range(4)), jnp.zeros((), jnp.int32))
    return _as_half(d[..., None]) * scale * (_vectors("iq1", code, E % 8) + delta)


def _tq1_0(b: jax.Array) -> jax.Array:
    # 160 elements in 32 bytes, 80 in 16, 16 in 4; digit 0 of all bytes comes first.
    byte = np.where(E < 160, E % 32, np.where(E < 240, 32 + E % 16, 48 + E % 4))
    digit = np.where(E < 160, E // 32, np.where(E < 240, (E - 160) // 16, (E - 240) // 4))
    fraction = b[..., byte] * 3**digit % 256
    return _half(b, 52) * (fraction * 3 // 256 - 1)


def _tq2_0(b: jax.Array) -> jax.Array:
    code = _bits(b, 8 * (32 * (E // 128) + E % 32) + 2 * (E // 32 % 4), 2)
    return _half(b, 64) * (code - 1)


DECODERS = {
    "iq1_s": (50, _iq1_s),
    "iq1_m": (56, _iq1_m),
    "iq2_xxs": (66, _iq2_xxs),
    "iq2_xs": (74, _iq2_xs),
    "iq2_s": (82, _iq2_s),
    "iq3_xxs": (98, _iq3_xxs),
    "iq3_s": (110, _iq3_s),
    "tq1_0": (54, _tq1_0),
    "tq2_0": (66, _tq2_0),
    "q1_0": (18, lambda b: _half(b, 0) * (2 * _bits(b, 16 + E[:128], 1) - 1)),
    "q2_0": (18, lambda b: _half(b, 0) * (_bits(b, 16 + 2 * E[:64], 2) - 1)),
}
"""Bytes of a block, and the function from blocks to float32 [N, blocks, elements]."""
