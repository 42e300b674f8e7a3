"""The portable implementation: XLA fuses it into a reduction and a loop."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.inputs import ActSpec, Inputs
from pallas_kernels.quantize.rounding import extremes, nearest, scales
from pallas_kernels.quantize.spec import Quantized, code_dtype


def quantize(
    x: jax.Array, act: ActSpec, inputs: Inputs, *, num_rows: jax.Array | None
) -> Quantized:
    """See `pallas_kernels.quantize.api.quantize`."""
    codes, scale, zero = _codes(x, act, inputs, num_rows)
    flat = codes.reshape(len(x), -1)[:, : x.shape[1]].astype(code_dtype(act.dtype))
    return Quantized(flat, scale[..., 0], None if zero is None else zero[..., 0])


def rounded(
    x: jax.Array, act: ActSpec, inputs: Inputs, num_rows: jax.Array | None = None
) -> jax.Array:
    """x, float32 [T, K], in the nearest values that the scheme can hold: float32 [T, K]. Columns of
    outliers stay as they are.
    """
    if act.outliers is not None:
        valid = x if num_rows is None else jnp.where(jnp.arange(len(x))[:, None] < num_rows, x, 0)
        outlier = (jnp.abs(valid) >= act.outliers).any(0)
        return jnp.where(outlier, x, _values(jnp.where(outlier, 0, x), act, inputs, num_rows))
    return _values(x, act, inputs, num_rows)


def _values(x: jax.Array, act: ActSpec, inputs: Inputs, num_rows: jax.Array | None) -> jax.Array:
    codes, scale, zero = _codes(x, act, inputs, num_rows)
    values = (codes if zero is None else codes - zero) * scale
    return values.reshape(len(x), -1)[:, : x.shape[1]]


def _codes(
    x: jax.Array, act: ActSpec, inputs: Inputs, num_rows: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Codes [T, G, size]; scale and zero point [T, G, 1], or [1, 1, 1] of strategy "tensor"."""
    count, k = x.shape
    size = act.group_size or k
    groups = jnp.pad(x.astype(jnp.float32), ((0, 0), (0, -k % size))).reshape(count, -1, size)

    def single(array: jax.Array | None) -> jax.Array | None:
        return None if array is None else array.astype(jnp.float32).reshape(1, 1, 1)

    if act.dynamic:
        seen = groups
        if act.strategy == "tensor" and num_rows is not None:
            seen = jnp.where(jnp.arange(count)[:, None, None] < num_rows, groups, 0)
        axes = (0, 1, 2) if act.strategy == "tensor" else (2,)
        scale, zero = scales(extremes(seen, act, axes), act, single(inputs.global_scale))
    else:
        scale, zero = single(inputs.scale), single(inputs.zero_point)
        assert scale is not None
    return nearest(groups, scale, zero, act.dtype), scale, zero
