"""The plain, slow statement of what quantization means: the nearest of all values there are."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.inputs import ActSpec, Inputs
from pallas_kernels.quantize.spec import Quantized, code_dtype

# Exponent bits and mantissa bits of the small floats.
_FORMATS = {"fp8_e4m3": (4, 3), "fp8_e5m2": (5, 2), "fp6_e2m3": (2, 3), "fp6_e3m2": (3, 2)}
_FORMATS["fp4_e2m1"] = (2, 1)


def quantize(
    x: jax.Array, act: ActSpec, inputs: Inputs, *, num_rows: jax.Array | None
) -> Quantized:
    """See `pallas_kernels.quantize.api.quantize`."""
    k = x.shape[1]
    x, size = x.astype(jnp.float32), act.group_size or k
    parts = [x[:, start : start + size] for start in range(0, k, size)]
    table = jnp.asarray(_values(act.dtype))
    found = [_part(part, act, inputs, table, num_rows) for part in parts]
    codes = jnp.concatenate([codes for codes, _, _ in found], axis=1)
    scale = jnp.concatenate([scale for _, scale, _ in found], axis=1)
    zeros = [zero for _, _, zero in found if zero is not None]
    zero = jnp.concatenate(zeros, axis=1) if zeros else None
    return Quantized(codes.astype(code_dtype(act.dtype)), scale, zero)


def _part(
    x: jax.Array, act: ActSpec, inputs: Inputs, table: jax.Array, num_rows: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Columns that share their scale: codes, scale [T or 1, 1], zero point."""
    zero = None
    if not act.dynamic:
        scale = inputs.scale.astype(jnp.float32).reshape(1, 1)
        if inputs.zero_point is not None:
            zero = inputs.zero_point.astype(jnp.float32).reshape(1, 1)
    else:
        seen = x
        if act.strategy == "tensor" and num_rows is not None:
            seen = x * (jnp.arange(len(x))[:, None] < num_rows)
        axis = None if act.strategy == "tensor" else 1
        low = jnp.minimum(seen.min(axis, keepdims=True), 0)
        high = jnp.maximum(seen.max(axis, keepdims=True), 0)
        if act.symmetric:
            scale = _scale(jnp.maximum(-low, high), act, inputs, table)
        else:
            span = jax.lax.optimization_barrier(jnp.full_like(low, table[-1] - table[0]))
            scale = (high - low) / span
            scale = jnp.where(scale == 0, 2.0**-23, scale)
            zero = jnp.clip(jnp.round(table[0] - low / scale), table[0], table[-1])
    # (Behind a barrier: a compiler may replace a division by a product.)
    whole = jax.lax.optimization_barrier(jnp.broadcast_to(jnp.where(scale == 0, 1, scale), x.shape))
    return _nearest(x / whole + (0 if zero is None else zero), table), scale, zero


def _scale(largest: jax.Array, act: ActSpec, inputs: Inputs, table: jax.Array) -> jax.Array:
    top = table[-1]
    if act.upper_bound is not None:
        largest = jnp.minimum(largest, act.upper_bound)
    powers = jnp.asarray(np.exp2(np.arange(-126, 128)).astype(np.float32))

    def power_below(x: jax.Array) -> jax.Array:
        """The largest power of two that is at most x, and no less than 2 ** -126."""
        return powers[jnp.maximum((x[..., None] >= powers).sum(-1) - 1, 0)]

    if act.scale in ("e8m0", "e8m0_even", "e8m0_even4"):
        if act.scale != "e8m0":
            mantissa = 1 if act.scale == "e8m0_even4" else _FORMATS[act.dtype][1]
            below = power_below(largest)
            # In units of half the last bit that the mantissa keeps; a half goes up.
            unit = below * 2.0**-mantissa
            largest = jnp.maximum(jnp.floor(largest / unit + 0.5) * unit, below * (largest > 0))
        return jnp.maximum(power_below(largest) / power_below(top), 2.0**-126)
    divisor = jax.lax.optimization_barrier(jnp.full_like(largest, act.divisor or top))
    scale = largest / divisor
    if act.scale == "e8m0_ceil":
        return powers[jnp.minimum((scale[..., None] > powers).sum(-1), len(powers) - 1)]
    if act.scale == "fp8_e4m3":
        whole = inputs.global_scale.astype(jnp.float32).reshape(1, 1)
        local = scale / jax.lax.optimization_barrier(jnp.broadcast_to(whole, scale.shape))
        local = jnp.clip(local, 2.0**-9, 448.0)
        return _nearest(local, jnp.asarray(_values("fp8_e4m3"))) * whole
    return scale.astype(act.scale).astype(jnp.float32)


def _values(dtype: str) -> np.ndarray:
    """All finite values of a type, float32, ascending."""
    if dtype not in _FORMATS:
        half = 1 << (int(dtype.removeprefix("int")) - 1)
        return np.arange(-half, half).astype(np.float32)
    exponent, mantissa = _FORMATS[dtype]
    bias, steps = (1 << (exponent - 1)) - 1, 1 << mantissa
    subnormal = [m / steps * 2.0 ** (1 - bias) for m in range(steps)]
    normal = [
        (1 + m / steps) * 2.0 ** (e - bias) for e in range(1, 1 << exponent) for m in range(steps)
    ]
    # What 8 bits mean beyond the largest number: one NaN, or infinities and NaN.
    beyond = {"fp8_e4m3": 1, "fp8_e5m2": 4}.get(dtype, 0)
    positive = np.array((subnormal + normal)[: len(subnormal + normal) - beyond], np.float32)
    return np.concatenate([-positive[:0:-1], positive])


def _nearest(x: jax.Array, table: jax.Array) -> jax.Array:
    """The value of the table nearest to each x; half way, that with an even place from 0."""
    middle = (table[1:] + table[:-1]) / 2
    zero = len(table) // 2
    above = (x[..., None] > middle).sum(-1)
    level = (x[..., None] == middle).any(-1)
    odd = (above - zero) % 2 == 1
    return table[jnp.where(level & odd, above + 1, above)]
