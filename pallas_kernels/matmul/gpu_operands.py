"""Weights and scales of inputs as the kernels for GPUs take them, Triton's and Mosaic's alike."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.matmul.planes import PLANES
from pallas_kernels.matmul.spec import WeightArrays, WeightSpec


def weight_operands(spec: WeightSpec, arrays: WeightArrays) -> dict[str, jax.Array]:
    """The arrays of a weight as the kernels read them.

    Raises:
      NotImplementedError: it does not lie in planes.
    """
    if spec.layout != PLANES:
        raise NotImplementedError(f"a weight in the layout {spec.layout!r}, not {PLANES!r}")
    size, scale = arrays.qvalue.size, jnp.asarray(arrays.scale)
    if 1 << 31 < size <= 1 << 32:
        raise NotImplementedError(f"{size} bytes of weights: Pallas counts up to 2 GiB in 32 bits")
    if scale.dtype.itemsize == 1 and jnp.issubdtype(scale.dtype, jnp.floating):
        scale = lax.bitcast_convert_type(scale, jnp.uint8)
    named = {
        "qvalue": arrays.qvalue,
        "scale": scale,
        "zero": arrays.zero_point,
        "super_scale": arrays.super_scale,
        "super_zero": arrays.super_zero,
        "global_scale": arrays.global_scale,
        "codebook": arrays.codebook,
    }
    return {name: jnp.asarray(array) for name, array in named.items() if array is not None}


def scaled_inputs(
    x: jax.Array, x_scale: jax.Array | None
) -> tuple[int | None, dict[str, jax.Array], jax.Array | None]:
    """(columns of x that share a scale, what the kernel reads of scales, what outputs are
    multiplied by): one scale of a row acts on its outputs.

    Raises:
      ValueError: `x_scale` does not fit x.
    """
    if x_scale is None:
        return None, {}, None
    rows, k = x.shape
    groups = x_scale.shape[-1]
    if x_scale.shape != (rows, groups) or not groups or k % groups:
        raise ValueError(f"x_scale {x_scale.shape} of x {x.shape}")
    if groups == 1:
        return None, {}, x_scale
    return k // groups, {"x_scale": x_scale.T}, None
