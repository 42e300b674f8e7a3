"""Blocks of 256 in groups whose scales are integers: q2_k, q3_k, q4_k, q5_k, q6_k, iq4_xs."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from qjax.compress.algorithms.ggml import bytes as fields
from qjax.compress.algorithms.ggml import fit
from qjax.compress.algorithms.ggml.fit import Array
from qjax.compress.algorithms.ggml.simple import CODEBOOK_STARTS, codebook_index, codebook_value


def _groups(values: Array, elements: int) -> Array:
    return values.reshape(*values.shape[:-1], -1, elements)


def _flat(values: Array) -> Array:
    return values.reshape(*values.shape[:-2], -1)


def _affine(
    x: Array, w: Array, elements: int, highest: int, most: int, cuts: np.ndarray, starts: np.ndarray
) -> tuple[fit.AffineBlock, Array]:
    """The scales, [..., groups] or [..., 1], and the codes, uint8 [..., 256]."""
    x, w = _groups(x, elements), _groups(w, elements)
    group = fit.affine(x, w, highest, cuts, turns=1)
    block = fit.shared_affine(x, w, group, highest, most, starts=starts, turns=2)
    scale, minimum = block.d * block.scales, block.dmin * block.minima
    codes = fields.codes(fit.integers(0, highest)((x + minimum) * fit.inverse(scale)))
    return fit.AffineBlock(*map(_flat, block)), _flat(codes)


def q2_k(x: Array, w: Array) -> Array:
    cuts = fit.cuts((-0.05, 0.05, 0.15, 0.25), 3)
    starts = np.array([(15, 15), (14, 14)])
    block, codes = _affine(x, w, 16, 3, 15, cuts, starts)
    scales = fields.codes(block.scales) | (fields.codes(block.minima) << jnp.uint8(4))
    return jnp.concatenate(
        [scales, fields.two_bits(codes), fields.half(block.d), fields.half(block.dmin)], -1
    )


def _six_bits(block: fit.AffineBlock) -> Array:
    """Eight scales and eight minima of 6 bits in 12 bytes: the first four of each in the low bits
    of 4 bytes, with the high bits of the last four above them; the low bits of these behind."""
    scales, minima = fields.codes(block.scales), fields.codes(block.minima)
    parts = [
        numbers[..., :4] | ((numbers[..., 4:] >> jnp.uint8(4)) << jnp.uint8(6))
        for numbers in (scales, minima)
    ]
    last = (scales[..., 4:] & jnp.uint8(15)) | (minima[..., 4:] << jnp.uint8(4))
    return jnp.concatenate([*parts, last], -1)


def _nibble_pairs(codes: Array) -> Array:
    """Low bits of 256 codes: groups of 32 two by two, in low and high nibbles."""
    pairs = codes.reshape(*codes.shape[:-1], 4, 2, 32) & jnp.uint8(15)
    return _flat(fields.joined(pairs, 4))


def q4_k(x: Array, w: Array) -> Array:
    cuts = fit.cuts((-0.02, 0.0, 0.03, 0.06), 15)
    block, codes = _affine(x, w, 32, 15, 63, cuts, np.array([(63, 63)]))
    head = [fields.half(block.d), fields.half(block.dmin), _six_bits(block)]
    return jnp.concatenate([*head, _nibble_pairs(codes)], -1)


def q5_k(x: Array, w: Array) -> Array:
    cuts = fit.cuts((-0.015, 0.0, 0.015, 0.03), 31)
    block, codes = _affine(x, w, 32, 31, 63, cuts, np.array([(63, 63)]))
    head = [fields.half(block.d), fields.half(block.dmin), _six_bits(block)]
    high = fields.planes(codes >> jnp.uint8(4))
    return jnp.concatenate([*head, high, _nibble_pairs(codes)], -1)


def q3_k(x: Array, w: Array) -> Array:
    x, w = _groups(x, 16), _groups(w, 16)
    nearest = fit.integers(-4, 3)
    steps = np.linspace(2.8, 5.2, 9)
    s = fit.scale(x, w, nearest, np.concatenate([steps, -steps]), turns=1)
    starts = np.array([-32.0, -30, 31])
    block = fit.shared_scale(x, w, s, nearest, (-32, 31), starts=starts, turns=2)
    codes = _flat(fields.codes(nearest(x * fit.inverse(block.d * block.scales)), 4))
    scales = _flat(fields.codes(block.scales, 32))
    low = fields.joined((scales & jnp.uint8(15)).reshape(*scales.shape[:-1], 2, 8), 4)
    high = fields.joined((scales >> jnp.uint8(4)).reshape(*scales.shape[:-1], 4, 4), 2)
    top = fields.planes(codes >> jnp.uint8(2))
    d = fields.half(_flat(block.d))
    return jnp.concatenate([top, fields.two_bits(codes), low, high, d], -1)


def q6_k(x: Array, w: Array) -> Array:
    x, w = _groups(x, 16), _groups(w, 16)
    nearest = fit.integers(-32, 31)
    steps = np.linspace(29, 34, 9)
    s = fit.scale(x, w, nearest, np.concatenate([steps, -steps]), turns=1)
    block = fit.shared_scale(x, w, s, nearest, (-128, 127), starts=np.array([-128.0]), turns=2)
    codes = _flat(fields.codes(nearest(x * fit.inverse(block.d * block.scales)), 32))
    quarters = codes.reshape(*codes.shape[:-1], 2, 2, 64) & jnp.uint8(15)
    low = _flat(fields.joined(quarters, 4))
    scales = _flat(block.scales).astype(jnp.int8).view(jnp.uint8)
    d = fields.half(_flat(block.d))
    return jnp.concatenate([low, fields.two_bits(codes >> jnp.uint8(4)), scales, d], -1)


def iq4_xs(x: Array, w: Array) -> Array:
    x, w = _groups(x, 32), _groups(w, 32)
    s = fit.scale(x, w, codebook_value, CODEBOOK_STARTS, turns=1)
    starts = np.array([-32.0])
    block = fit.shared_scale(x, w, s, codebook_value, (-32, 31), starts=starts, turns=2)
    codes = codebook_index(x * fit.inverse(block.d * block.scales))
    scales = _flat(fields.codes(block.scales, 32))
    high = scales.reshape(*scales.shape[:-1], 2, 4) >> jnp.uint8(4)
    low = scales.reshape(*scales.shape[:-1], 4, 2) & jnp.uint8(15)
    scale_bytes = [
        fields.joined(jnp.swapaxes(high, -1, -2), 2),
        fields.joined(jnp.swapaxes(low, -1, -2), 4),
    ]
    d = fields.half(_flat(block.d))
    return jnp.concatenate([d, *scale_bytes, _flat(fields.nibbles(codes))], -1)


ENCODERS = {
    "q2_k": q2_k,
    "q3_k": q3_k,
    "q4_k": q4_k,
    "q5_k": q5_k,
    "q6_k": q6_k,
    "iq4_xs": iq4_xs,
}
