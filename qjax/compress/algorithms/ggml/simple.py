"""Blocks of 32 with a float16 scale, and maybe a minimum: q4_0, q4_1, q5_0, q5_1, q8_0, iq4_nl."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from pallas_kernels.nearest import nearest_level
from pallas_kernels.nearest.spec import edges
from pallas_kernels.unpack import IQ4_CODEBOOK
from qjax.compress.algorithms.ggml import bytes as fields
from qjax.compress.algorithms.ggml import fit
from qjax.compress.algorithms.ggml.fit import Array

_CODEBOOK = np.asarray(IQ4_CODEBOOK, np.float32)


def _both_signs(starts: np.ndarray) -> np.ndarray:
    return np.concatenate([starts, -starts])


def codebook_index(y: Array) -> Array:
    """The codes of iq4_nl nearest to numbers in its units: uint8."""
    return sum((y > edge).astype(jnp.uint8) for edge in edges(_CODEBOOK))  # type: ignore[return-value]


def codebook_value(y: Array) -> Array:
    """What these codes stand for."""
    return nearest_level(y, _CODEBOOK)


def q4_0(x: Array, w: Array) -> Array:
    nearest = fit.integers(-8, 7)
    d = fit.scale(x, w, nearest, _both_signs(np.linspace(6.5, 9.5, 11)), half=True)
    return jnp.concatenate(
        [fields.half(d), fields.nibbles(fields.codes(nearest(x * fit.inverse(d)), 8))], -1
    )


def q5_0(x: Array, w: Array) -> Array:
    nearest = fit.integers(-16, 15)
    d = fit.scale(x, w, nearest, _both_signs(np.linspace(14, 17.5, 11)), half=True)
    codes = fields.codes(nearest(x * fit.inverse(d)), 16)
    high = fields.bits(codes >> jnp.uint8(4))
    return jnp.concatenate([fields.half(d), high, fields.nibbles(codes)], -1)


def q8_0(x: Array, w: Array) -> Array:
    nearest = fit.integers(-128, 127)
    d = fit.scale(x, w, nearest, np.array([-128, -127.5, -127, 126.5, 127]), turns=0, half=True)
    codes = nearest(x * fit.inverse(d)).astype(jnp.int8).view(jnp.uint8)
    return jnp.concatenate([fields.half(d), codes], -1)


def q4_1(x: Array, w: Array) -> Array:
    found = fit.affine(x, w, 15, fit.cuts((-0.03, 0.0, 0.03, 0.06), 15), free=True)
    codes = fields.codes(fit.integers(0, 15)((x + found.minimum) * fit.inverse(found.scale)))
    return jnp.concatenate(
        [fields.half(found.scale), fields.half(-found.minimum), fields.nibbles(codes)], -1
    )


def q5_1(x: Array, w: Array) -> Array:
    found = fit.affine(x, w, 31, fit.cuts((-0.015, 0.0, 0.015, 0.03), 31), free=True)
    codes = fields.codes(fit.integers(0, 31)((x + found.minimum) * fit.inverse(found.scale)))
    high = fields.bits(codes >> jnp.uint8(4))
    scales = [fields.half(found.scale), fields.half(-found.minimum)]
    return jnp.concatenate([*scales, high, fields.nibbles(codes)], -1)


CODEBOOK_STARTS = _both_signs(np.linspace(100, 160, 9))


def iq4_nl(x: Array, w: Array) -> Array:
    d = fit.scale(x, w, codebook_value, CODEBOOK_STARTS, half=True)
    codes = codebook_index(x * fit.inverse(d))
    return jnp.concatenate([fields.half(d), fields.nibbles(codes)], -1)


ENCODERS = {
    "q4_0": q4_0,
    "q4_1": q4_1,
    "q5_0": q5_0,
    "q5_1": q5_1,
    "q8_0": q8_0,
    "iq4_nl": iq4_nl,
}
