"""Blocks of 256 whose codes stand for vectors of a grid: iq1, iq2 and iq3.

While scales are searched, each vector of 8 (iq3: 4) weights is held against the entries that lie
near it; with the scales that were found, against all of its grid. Magnitudes and signs are apart in
iq2 and iq3. Where only 7 bits say which of 8 weights are negative, the number of these is even:
if it is not, the one that this costs least gets the other sign.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.iq_grids import grid
from pallas_kernels.nearest import Found, nearest_vector
from qjax.compress.algorithms.ggml import bytes as fields
from qjax.compress.algorithms.ggml import fit
from qjax.compress.algorithms.ggml.fit import Array

_DELTA = 0.125
# Entries that a vector is held against while scales are searched, by its length.
_NEAR = {4: 16, 8: 32}


def _near(y: Array, w: Array, name: str) -> Found:
    return nearest_vector(y, w, name, _NEAR[y.shape[-1]])


class _Signed(NamedTuple):
    """Magnitudes, of which some are negative for the sake of parity, and which signs were taken
    off: uint8 [..., 32, 8], 1 for minus."""

    magnitudes: Array
    signs: Array


def _without_signs(x: Array, w: Array, *, even: bool) -> _Signed:
    x, w = x.reshape(*x.shape[:-1], 32, 8), w.reshape(*w.shape[:-1], 32, 8)
    negative = (x < 0).astype(jnp.uint8)
    if even:
        odd = negative.sum(-1, keepdims=True) & 1
        cheapest = (w * jnp.abs(x)).argmin(-1, keepdims=True) == np.arange(8)
        negative = negative ^ (cheapest & (odd == 1)).astype(jnp.uint8)
    signs = 1 - 2 * negative.astype(jnp.float32)
    return _Signed(x * signs, negative)


class _Codes(NamedTuple):
    """d: float32 [..., 1]; scales: uint8 [..., groups], what the odd factors are twice and one
    more than; index: int32 [..., vectors] of entries; signs: bits of bytes, uint8 [..., 32, 8]."""

    d: Array
    scales: Array
    index: Array
    signs: Array


def _fitted(
    x: Array,
    w: Array,
    nearest: Callable[[Array, Array], Array],
    group: int,
    most: int,
    starts: np.ndarray,
    unit: float,
) -> tuple[Array, Array, Array, Array]:
    """d [..., 1], scales [..., groups], and the weights in units of their scales, with importances,
    [..., groups, elements]."""
    x, w = (a.reshape(*a.shape[:-1], -1, group) for a in (x, w))

    def to_grid(y: Array) -> Array:
        return nearest(y, w)

    s = fit.scale(x, w, to_grid, starts, turns=1, positive=True)
    bounds = (0.5, most + 0.5)
    first = np.array([most + 0.5])
    block = fit.shared_scale(x, w, s, to_grid, bounds, starts=first, turns=2, unit=unit)
    # Where all is 0, so is d, and no scale was ever better than another.
    i = jnp.where(block.scales == 0, 0.5, block.scales)
    y = x * fit.inverse(block.d * i)
    return block.d[..., 0] * unit, fields.codes(i[..., 0] - 0.5), y, w


def _magnitudes(
    x: Array, w: Array, name: str, group: int, starts: np.ndarray, unit: float, *, even: bool
) -> _Codes:
    size = grid(name).shape[1]

    def vectors(a: Array) -> Array:
        return a.reshape(*a.shape[:-2], -1, size)

    def nearest(y: Array, w: Array) -> Array:
        return _near(vectors(y), vectors(w), name).values.reshape(y.shape)

    taken = _without_signs(x, w, even=even)
    flat = taken.magnitudes.reshape(x.shape)
    d, scales, y, w = _fitted(flat, w, nearest, group, 15, starts, unit)
    index = nearest_vector(vectors(y), vectors(w), name).index
    return _Codes(d, scales, index, taken.signs)


def _bytes(words: Array, size: int) -> Array:
    """Little-endian bytes of words [..., n]: uint8 [..., size n]."""
    kind = {2: jnp.uint16, 4: jnp.uint32}[size]
    parts = jax.lax.bitcast_convert_type(words.astype(kind), jnp.uint8)
    return parts.reshape(*words.shape[:-1], -1)


def _seven(signs: Array) -> Array:
    """The lower seven of eight bits as a number: uint32 [..., 32]."""
    return (signs[..., :7].astype(jnp.uint32) << np.arange(7, dtype=np.uint32)).sum(-1)


def _tails(codes: _Codes) -> Array:
    """Four times seven signs under a 4-bit scale: uint32 [..., 8]."""
    seven = _seven(codes.signs).reshape(*codes.signs.shape[:-2], 8, 4)
    joined = (seven << np.array([0, 7, 14, 21], np.uint32)).sum(-1)
    return joined | (codes.scales.astype(jnp.uint32) << np.uint32(28))


def _pairs(nibbles: Array) -> Array:
    """Nibbles [..., 2 n] as bytes, the first of two in the low bits."""
    return fields.joined(jnp.swapaxes(nibbles.reshape(*nibbles.shape[:-1], -1, 2), -1, -2), 4)


_IQ2 = np.array([31.0, 42, 50, 60])  # none is halfway between two numbers of the grids
_IQ3_XXS = np.array([50.0, 58, 66, 76])
_IQ3_S = np.array([11.0, 13, 15, 17.5])
_IQ1 = np.array([0.8, 1.1, 1.5])


def iq2_xxs(x: Array, w: Array) -> Array:
    codes = _magnitudes(x, w, "iq2_xxs", 32, _IQ2, 4, even=True)
    index = codes.index.reshape(*codes.index.shape[:-1], 8, 4).astype(jnp.uint8)
    tails = _bytes(_tails(codes), 4).reshape(*index.shape[:-2], 8, 4)
    body = jnp.concatenate([index, tails], -1)
    return jnp.concatenate([fields.half(codes.d), body.reshape(*body.shape[:-2], -1)], -1)


def iq2_xs(x: Array, w: Array) -> Array:
    codes = _magnitudes(x, w, "iq2_xs", 16, _IQ2, 4, even=True)
    words = codes.index.astype(jnp.uint32) | (_seven(codes.signs) << np.uint32(9))
    return jnp.concatenate([fields.half(codes.d), _bytes(words, 2), _pairs(codes.scales)], -1)


def _low(index: Array) -> Array:
    return (index & 255).astype(jnp.uint8)


def _sign_bytes(signs: Array) -> Array:
    return fields.bits(signs.reshape(*signs.shape[:-2], -1))


def iq2_s(x: Array, w: Array) -> Array:
    codes = _magnitudes(x, w, "iq2_s", 16, _IQ2, 4, even=False)
    high = (codes.index >> 8).astype(jnp.uint8).reshape(*codes.index.shape[:-1], 8, 4)
    high = fields.joined(jnp.swapaxes(high, -1, -2), 2)
    low, signs = _low(codes.index), _sign_bytes(codes.signs)
    return jnp.concatenate([fields.half(codes.d), low, signs, high, _pairs(codes.scales)], -1)


def iq3_xxs(x: Array, w: Array) -> Array:
    codes = _magnitudes(x, w, "iq3_xxs", 32, _IQ3_XXS, 2, even=True)
    return jnp.concatenate([fields.half(codes.d), _low(codes.index), _bytes(_tails(codes), 4)], -1)


def iq3_s(x: Array, w: Array) -> Array:
    codes = _magnitudes(x, w, "iq3_s", 32, _IQ3_S, 0.5, even=False)
    high = fields.bits((codes.index >> 8).astype(jnp.uint8))
    low, signs = _low(codes.index), _sign_bytes(codes.signs)
    return jnp.concatenate([fields.half(codes.d), low, high, signs, _pairs(codes.scales)], -1)


def _moved(y: Array, w: Array, shared: int) -> tuple[Found, Array]:
    """For vectors of numbers in units of their scales, [..., 32, 8]: entries near them [..., 32],
    and whether these are moved down, [..., 32], by `shared` vectors the same."""
    tried = [_near(y - delta, w, "iq1") for delta in (_DELTA, -_DELTA)]
    up, down = (found.distance.reshape(*y.shape[:-2], -1, shared).sum(-1) for found in tried)
    negative = jnp.repeat(down < up, shared, axis=-1)

    def either(up: Array, down: Array) -> Array:
        return jnp.where(
            negative.reshape(negative.shape + (1,) * (up.ndim - negative.ndim)), down, up
        )

    return jax.tree.map(either, *tried), negative


def _shift(negative: Array) -> Array:
    return jnp.where(negative, -_DELTA, _DELTA)[..., None]


def _ternary(x: Array, w: Array, group: int, shared: int) -> tuple[Array, Array, Array, Array]:
    """d, scales, index [..., 32] and whether vectors are moved down, [..., 32]."""

    def vectors(a: Array) -> Array:
        return a.reshape(*a.shape[:-2], 32, 8)

    def nearest(y: Array, w: Array) -> Array:
        found, negative = _moved(vectors(y), vectors(w), shared)
        return (found.values + _shift(negative)).reshape(y.shape)

    d, scales, y, w = _fitted(x, w, nearest, group, 7, _IQ1, 0.5)
    y, w = vectors(y), vectors(w)
    _, negative = _moved(y, w, shared)
    return d, scales, nearest_vector(y - _shift(negative), w, "iq1").index, negative


def iq1_s(x: Array, w: Array) -> Array:
    d, scales, index, negative = _ternary(x, w, 32, 4)
    four = (index >> 8).astype(jnp.uint32).reshape(*index.shape[:-1], 8, 4)
    words = (four << np.array([0, 3, 6, 9], np.uint32)).sum(-1)
    words = words | (scales.astype(jnp.uint32) << np.uint32(12))
    words = words | (negative[..., ::4].astype(jnp.uint32) << np.uint32(15))
    return jnp.concatenate([fields.half(d), _low(index), _bytes(words, 2)], -1)


def iq1_m(x: Array, w: Array) -> Array:
    d, scales, index, negative = _ternary(x, w, 16, 1)
    nibbles = (index >> 8).astype(jnp.uint8) | (negative.astype(jnp.uint8) << jnp.uint8(3))
    four = scales.astype(jnp.uint32).reshape(*scales.shape[:-1], 4, 4)
    words = (four << np.array([0, 3, 6, 9], np.uint32)).sum(-1)
    d_bits = jax.lax.bitcast_convert_type(d.astype(jnp.float16), jnp.uint16).astype(jnp.uint32)
    quarters = (d_bits >> np.array([0, 4, 8, 12], np.uint32)) & np.uint32(15)
    words = words | (quarters << np.uint32(12))
    return jnp.concatenate([_low(index), _pairs(nibbles), _bytes(words, 2)], -1)


ENCODERS = {
    "iq2_xxs": iq2_xxs,
    "iq2_xs": iq2_xs,
    "iq2_s": iq2_s,
    "iq3_xxs": iq3_xxs,
    "iq3_s": iq3_s,
    "iq1_s": iq1_s,
    "iq1_m": iq1_m,
}
