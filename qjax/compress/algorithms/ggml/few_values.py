"""Blocks of few values and one float16 scale: tq1_0, tq2_0, q1_0 (-1, 1) and q2_0 (-1 to 2)."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from qjax.compress.algorithms.ggml import bytes as fields
from qjax.compress.algorithms.ggml import fit
from qjax.compress.algorithms.ggml.fit import Array


def _ternary(x: Array, w: Array) -> tuple[Array, Array]:
    """Scale and codes (0, 1, 2) of whole blocks."""
    nearest = fit.integers(-1, 1)
    d = fit.scale(x, w, nearest, np.linspace(1, 4, 13), turns=4, half=True)
    d = jnp.abs(d)
    return d, fields.codes(nearest(x * fit.inverse(d)), 1)


def tq1_0(x: Array, w: Array) -> Array:
    d, codes = _ternary(x, w)
    parts, at = [], 0
    for size, digits in ((32, 5), (16, 5), (4, 4)):
        run = codes[..., at : at + size * digits].reshape(*codes.shape[:-1], digits, size)
        whole = sum(run[..., n, :].astype(jnp.uint16) * 3 ** (4 - n) for n in range(digits))
        # A fraction of 3 ** 5 as one of 256, rounded up, so that digits come out by multiplying.
        parts.append(((whole * jnp.uint32(256) + jnp.uint32(242)) // 243).astype(jnp.uint8))
        at += size * digits
    return jnp.concatenate([*parts, fields.half(d)], -1)


def tq2_0(x: Array, w: Array) -> Array:
    d, codes = _ternary(x, w)
    return jnp.concatenate([fields.two_bits(codes), fields.half(d)], -1)


def q1_0(x: Array, w: Array) -> Array:
    d = fit.summed(w * jnp.abs(x)) * fit.inverse(fit.summed(w))
    return jnp.concatenate([fields.half(d), fields.bits((x >= 0).astype(jnp.uint8))], -1)


def q2_0(x: Array, w: Array) -> Array:
    nearest = fit.integers(-1, 2)
    steps = np.linspace(1, 5, 13)
    d = fit.scale(x, w, nearest, np.concatenate([steps, -steps]), turns=4, half=True)
    codes = fields.codes(nearest(x * fit.inverse(d)), 1)
    four = jnp.swapaxes(codes.reshape(*codes.shape[:-1], 16, 4), -1, -2)
    return jnp.concatenate([fields.half(d), fields.joined(four, 2)], -1)


ENCODERS = {"tq1_0": tq1_0, "tq2_0": tq2_0, "q1_0": q1_0, "q2_0": q2_0}
