"""The arithmetic of rounding activations, one statement of it for XLA and for kernels.

Values become codes times scales: integers, or numbers that a small float holds. All codes here are
float32; what they are stored as is the business of `quantize`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.inputs import FLOATS, ActSpec, bounds


def divide(x: jax.Array, by: jax.Array | float) -> jax.Array:
    """x / by. XLA would multiply by the reciprocal of what is broadcast, which rounds otherwise."""
    spread = jnp.broadcast_to(jnp.asarray(by, jnp.float32), x.shape)
    return x / lax.optimization_barrier(spread)


def _divide_plainly(x: jax.Array, by: jax.Array | float) -> jax.Array:
    return x / jnp.broadcast_to(jnp.asarray(by, jnp.float32), x.shape)


def round_half_even(x: jax.Array) -> jax.Array:
    """To the nearest integer, half way to the even one, from operations that every compiler of
    kernels has."""
    low = jnp.floor(x)
    rest, odd = x - low, low - 2 * jnp.floor(low * 0.5)
    return jnp.where((rest > 0.5) | ((rest == 0.5) & (odd == 1)), low + 1, low)


class Arithmetic(NamedTuple):
    """What differs between compilers: a division that rounds once, and rounding to an integer."""

    divide: Callable[..., jax.Array]
    round: Callable[[jax.Array], jax.Array]


XLA = Arithmetic(divide, jnp.round)
INTERPRETED = Arithmetic(divide, round_half_even)  # a kernel that XLA compiles
KERNEL = Arithmetic(_divide_plainly, round_half_even)


class Extremes(NamedTuple):
    """Of values that share a scale: the lowest, at most 0, and the highest, at least 0; or low is
    None and high the largest absolute value."""

    low: jax.Array | None
    high: jax.Array

    def joined(self, other: Extremes) -> Extremes:
        low = (
            self.low if other.low is None or self.low is None else jnp.minimum(self.low, other.low)
        )
        return Extremes(low, jnp.maximum(self.high, other.high))


def extremes(x: jax.Array, act: ActSpec, axes: tuple[int, ...]) -> Extremes:
    """Those that `act` asks for, of all that lies along `axes` of x, which stay as axes of 1."""
    if act.symmetric:
        return Extremes(None, jnp.abs(x).max(axes, keepdims=True))
    low, high = x.min(axes, keepdims=True), x.max(axes, keepdims=True)
    return Extremes(jnp.minimum(low, 0), jnp.maximum(high, 0))


def scales(
    found: Extremes, act: ActSpec, global_scale: jax.Array | None, by: Arithmetic = XLA
) -> tuple[jax.Array, jax.Array | None]:
    """Scale and zero point, float32, for values with these extremes.

    Args:
      act: dynamic.
      global_scale: float32, broadcastable, for scales that are multiples of it; else None.
    """
    if found.low is None:
        return _symmetric(found.high, act, global_scale, by), None
    bottom, top = bounds(act.dtype)
    scale = by.divide(found.high - found.low, top - bottom)
    scale = jnp.where(scale == 0, jnp.finfo(jnp.float32).eps, scale)
    zero = by.round(bottom - by.divide(found.low, scale))
    return scale, jnp.clip(zero, bottom, top)


def _symmetric(
    largest: jax.Array, act: ActSpec, global_scale: jax.Array | None, by: Arithmetic
) -> jax.Array:
    """The scale for values up to `largest`, as `ActSpec.scale` says."""
    if act.upper_bound is not None:
        largest = jnp.minimum(largest, act.upper_bound)
    if act.scale == "e8m0":
        exponent = exponent_of(largest) - FLOATS[act.dtype].max_exponent
        return power_of_two(jnp.where(largest > 0, exponent, -127))
    if act.scale in ("e8m0_even", "e8m0_even4"):
        # absmax is rounded to the type's mantissa first: half of its last bit carries over.
        mantissa = 1 if act.scale == "e8m0_even4" else FLOATS[act.dtype].mantissa
        half = 1 << (22 - mantissa)
        bits = lax.bitcast_convert_type(largest, jnp.int32) + half
        exponent = exponent_of(lax.bitcast_convert_type(bits, jnp.float32))
        return power_of_two(exponent - FLOATS[act.dtype].max_exponent)
    scale = by.divide(largest, act.divisor or bounds(act.dtype)[1])
    if act.scale == "e8m0_ceil":
        scale = jnp.maximum(scale, 1e-38)
        exponent = exponent_of(scale)
        return power_of_two(exponent + (scale > power_of_two(exponent)).astype(jnp.int32))
    if act.scale == "fp8_e4m3":
        assert global_scale is not None
        local = jnp.clip(by.divide(scale, global_scale), 2.0**-9, 448.0)
        return to_float(local, "fp8_e4m3", by) * global_scale
    if act.scale != "float32":
        scale = scale.astype(act.scale).astype(jnp.float32)
    return scale


def nearest(
    x: jax.Array, scale: jax.Array, zero: jax.Array | None, dtype: str, by: Arithmetic = XLA
) -> jax.Array:
    """The codes, float32, with which code * scale, or (code - zero) * scale, is nearest to x; half
    way, the even one.
    """
    bottom, top = bounds(dtype)
    x = by.divide(x, jnp.where(scale == 0, 1, scale))
    if dtype in FLOATS:
        return to_float(x, dtype, by)
    return jnp.clip(by.round(x if zero is None else x + zero), bottom, top)


def to_float(x: jax.Array, dtype: str, by: Arithmetic = XLA) -> jax.Array:
    """The nearest number that the small float holds; those beyond its largest are cut to it."""
    bottom, top = bounds(dtype)
    x = jnp.clip(x, bottom, top)
    # How far apart neighbours lie at |x|, no less than subnormals do.
    exponent = jnp.maximum(exponent_of(jnp.abs(x)), FLOATS[dtype].min_exponent)
    step = power_of_two(exponent - FLOATS[dtype].mantissa)
    # (Dividing by a power of two would be the same, were it not for the division of GPUs.)
    steps = x * power_of_two(FLOATS[dtype].mantissa - exponent)
    return jnp.clip(by.round(steps) * step, bottom, top)


def exponent_of(x: jax.Array) -> jax.Array:
    """floor(log2 x) of positive normal numbers, int32; -127 of smaller ones."""
    return (lax.bitcast_convert_type(x, jnp.int32) >> 23) - 127


def power_of_two(exponent: jax.Array) -> jax.Array:
    """2 ** exponent, exactly; float32, of exponents cut to -126 to 127."""
    bits = (jnp.clip(exponent, -126, 127) + 127) << 23
    return lax.bitcast_convert_type(bits.astype(jnp.int32), jnp.float32)
