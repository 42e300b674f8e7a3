"""What happens to the input of a quantized product before it meets the weight.

Some methods scale, rotate or round activations. Here they are rounded to values that the method's
numeric type can hold, and stay float32: products with these are what the method computes, up to the
order of additions.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.hadamard import hadamard
from pallas_kernels.inputs import FLOATS, Inputs, bounds
from qjax.qarray import ActSpec, QArray

# Of a weight, in the order of `Inputs`.
_INPUT_AUX = ("act_pre_scale", "act_scale", "act_zero_point", "act_global_scale", "perm")


def treats_inputs(w: QArray) -> bool:
    """Whether this weight's product takes inputs that are not x itself."""
    return w.act is not None or w.hadamard[0] > 0 or any(key in w.aux for key in _INPUT_AUX)


def has_own_inputs(w: QArray) -> bool:
    """Whether they depend on arrays of this very weight, not only on its `act`."""
    return any(key in w.aux for key in _INPUT_AUX)


def arrays(w: QArray) -> Inputs:
    """What a kernel treats the inputs of this weight with (but for a rotation)."""
    return Inputs(*map(w.aux.get, _INPUT_AUX))


def scaled(x: jax.Array, w: QArray) -> jax.Array:
    """x [T, K] times the weight's scales of input columns, where it has them."""
    scale = w.aux.get("act_pre_scale")
    return x if scale is None else x * scale.astype(jnp.float32)


def inputs(x: jax.Array, w: QArray, rows: jax.Array | None = None) -> jax.Array:
    """What the weight is multiplied with.

    In this order: scaled, rotated, rounded, columns put in the order of the weight's.

    Args:
      x: float32 [T, K].
      rows: int32 [1]; rows from there on are padding, which no scale shall depend on.

    Returns:
      float32 [T, K].
    """
    aux = w.aux
    x = scaled(x, w)
    if w.hadamard[0]:
        x = hadamard(x, w.hadamard[0])
    if w.act is not None:
        x = round_to(x, w.act, aux, rows)
    return x[:, aux["perm"][0]] if "perm" in aux else x


def round_to(
    x: jax.Array, act: ActSpec, aux: dict[str, jax.Array], rows: jax.Array | None = None
) -> jax.Array:
    """x, float32 [T, K], in the nearest values that the scheme can hold."""
    if act.outliers is not None:
        valid = x if rows is None else jnp.where(jnp.arange(len(x))[:, None] < rows, x, 0)
        outlier = (jnp.abs(valid) >= act.outliers).any(0)
        return jnp.where(outlier, x, _round(jnp.where(outlier, 0, x), act, aux, rows))
    return _round(x, act, aux, rows)


def _round(
    x: jax.Array, act: ActSpec, aux: dict[str, jax.Array], rows: jax.Array | None
) -> jax.Array:
    count, k = x.shape
    size = act.group_size or k
    groups = jnp.pad(x, ((0, 0), (0, -k % size))).reshape(count, -1, size)
    if not act.dynamic:
        scale = aux["act_scale"].astype(jnp.float32).reshape(1, 1, 1)
        zero = aux.get("act_zero_point")
        zero = None if zero is None else zero.astype(jnp.float32).reshape(1, 1, 1)
    else:
        scale, zero = _dynamic_scale(groups, act, aux, rows)
    return nearest(groups, scale, zero, act.dtype).reshape(count, -1)[:, :k]


def _dynamic_scale(
    groups: jax.Array, act: ActSpec, aux: dict[str, jax.Array], rows: jax.Array | None
) -> tuple[jax.Array, jax.Array | None]:
    """Scale and zero point of each group, [T, G, 1]; of all together for strategy "tensor"."""
    if act.strategy == "tensor" and rows is not None:
        groups = jnp.where(jnp.arange(len(groups))[:, None, None] < rows, groups, 0)
    axes = (0, 1, 2) if act.strategy == "tensor" else (2,)
    if not act.symmetric:
        low = jnp.minimum(groups.min(axes, keepdims=True), 0)
        high = jnp.maximum(groups.max(axes, keepdims=True), 0)
        bottom, top = bounds(act.dtype)
        scale = divide(high - low, top - bottom)
        scale = jnp.where(scale == 0, jnp.finfo(jnp.float32).eps, scale)
        return scale, jnp.clip(jnp.round(bottom - low / scale), bottom, top)
    largest = jnp.abs(groups).max(axes, keepdims=True)
    if act.upper_bound is not None:
        largest = jnp.minimum(largest, act.upper_bound)
    return _scale_of(largest, act, aux), None


def _scale_of(largest: jax.Array, act: ActSpec, aux: dict[str, jax.Array]) -> jax.Array:
    if act.scale == "e8m0":
        exponent = _exponent(largest) - FLOATS[act.dtype].max_exponent
        return _power_of_two(jnp.where(largest > 0, exponent, -127))
    if act.scale in ("e8m0_even", "e8m0_even4"):
        # absmax is rounded to the type's mantissa first: half of its last bit carries over.
        mantissa = 1 if act.scale == "e8m0_even4" else FLOATS[act.dtype].mantissa
        half = 1 << (22 - mantissa)
        bits = lax.bitcast_convert_type(largest, jnp.int32) + half
        exponent = _exponent(lax.bitcast_convert_type(bits, jnp.float32))
        return _power_of_two(exponent - FLOATS[act.dtype].max_exponent)
    top = act.divisor or bounds(act.dtype)[1]
    scale = divide(largest, top)
    if act.scale == "e8m0_ceil":
        scale = jnp.maximum(scale, 1e-38)
        exponent = _exponent(scale)
        return _power_of_two(exponent + (scale > _power_of_two(exponent)))
    if act.scale == "fp8_e4m3":
        global_scale = aux["act_global_scale"].astype(jnp.float32).reshape(1, 1, 1)
        local = jnp.clip(divide(scale, global_scale), 2.0**-9, 448.0)
        return local.astype(jnp.float8_e4m3fn).astype(jnp.float32) * global_scale
    if act.scale != "float32":
        scale = scale.astype(act.scale).astype(jnp.float32)
    return scale


def nearest(x: jax.Array, scale: jax.Array, zero: jax.Array | None, dtype: str) -> jax.Array:
    """x in multiples of scale that the type holds; half way, to the even code."""
    bottom, top = bounds(dtype)
    x = divide(x, jnp.where(scale == 0, 1, scale))
    if dtype not in FLOATS:
        if zero is None:
            return jnp.clip(jnp.round(x), bottom, top) * scale
        return (jnp.clip(jnp.round(x + zero), bottom, top) - zero) * scale
    x = jnp.clip(x, bottom, top)
    # How far apart neighbours lie at |x|, no less than subnormals do.
    exponent = jnp.maximum(_exponent(jnp.abs(x)), FLOATS[dtype].min_exponent)
    step = _power_of_two(exponent - FLOATS[dtype].mantissa)
    return jnp.clip(jnp.round(x / step) * step, bottom, top) * scale


def _exponent(x: jax.Array) -> jax.Array:
    """floor(log2 x) of positive normal numbers, int32; -127 of smaller ones."""
    return (lax.bitcast_convert_type(x, jnp.int32) >> 23) - 127


def _power_of_two(exponent: jax.Array) -> jax.Array:
    """2 ** exponent, exactly; float32, of exponents cut to -126 to 127."""
    bits = (jnp.clip(exponent, -126, 127) + 127) << 23
    return lax.bitcast_convert_type(bits.astype(jnp.int32), jnp.float32)


def divide(x: jax.Array, by: jax.Array | float) -> jax.Array:
    """x / by. XLA would multiply by the reciprocal of what is broadcast, which rounds otherwise."""
    spread = jnp.broadcast_to(jnp.asarray(by, jnp.float32), x.shape)
    return x / lax.optimization_barrier(spread)
