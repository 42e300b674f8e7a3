"""The portable implementation: dequantize, then a float32 dot, as XLA likes it.

A weight may also lie as accelerators want it, in planes or as plain floats (`planes`, `dense`).

XLA on a CPU never fuses decoding into a dot but writes the decoded weight out. Large weights
therefore go through `lax.map` a block of rows at a time, small enough that the decoded block stays
in the cache. A dot with one row takes a slower path of the compiler than one with two, and sums in
another order: one row is padded to two, so that a row's result does not depend on how many others
there are beside it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import platform
from pallas_kernels.matmul import dense, planes
from pallas_kernels.matmul.around import epilogue, rms_norm
from pallas_kernels.matmul.spec import (
    LARGEST_CODE,
    WeightArrays,
    WeightSpec,
    decode,
    require_canonical,
)

BLOCK_ELEMENTS = 1 << 19  # 2 MiB of float32: about the second-level cache of a core
EXTRA_BLOCKS = 2  # of a row, whose remainder is rounded to int8 too


def matmul(
    x: jax.Array,
    weights: tuple[tuple[WeightSpec, WeightArrays], ...],
    *,
    norm: jax.Array | None,
    norm_eps: float,
    biases: tuple[jax.Array | None, ...],
    activation: str | None,
    residual: jax.Array | None,
    post_norm: jax.Array | None,
    activation_dtype: str,
    num_rows: jax.Array | None,
) -> tuple[jax.Array, ...]:
    """See `pallas_kernels.matmul.api.matmul`. Padding rows are computed like the others."""
    for spec, _ in weights:
        require_public(spec)
    x = _round(rms_norm(x, norm, norm_eps), activation_dtype)
    rows = x.shape[0]
    if rows == 1:
        x = jnp.concatenate([x, jnp.zeros_like(x)])
    return epilogue(
        [_product(x, spec, arrays)[:rows] for spec, arrays in weights],
        biases=biases,
        activation=activation,
        post_norm=post_norm,
        norm_eps=norm_eps,
        residual=residual,
    )


def require_public(spec: WeightSpec) -> None:
    """Refuses (NotImplementedError) a weight in the private tiling of another implementation."""
    if spec.layout not in (*planes.LAYOUTS, dense.LAYOUT):
        require_canonical(spec)


def _round(x: jax.Array, activation_dtype: str) -> jax.Array:
    """float32 [T, K] -> the values that `activation_dtype` stands for (see api), as float32; as
    bfloat16 where that is meant, so that products are of bfloat16. Not so on a CPU: some have units
    for them, and XLA's choice of these goes by the number of rows, which a row must not depend on.
    """
    if activation_dtype == "bfloat16" and platform.device_kind() == "cpu":
        return lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
    if activation_dtype in ("float32", "bfloat16"):
        return x.astype(activation_dtype)
    rows, k = x.shape
    blocks = jnp.pad(x, ((0, 0), (0, -k % 32))).reshape(rows, -1, 32)
    rounded, scale = _round_blocks(blocks, LARGEST_CODE[activation_dtype])
    if activation_dtype == "int8":
        index = jnp.arange(blocks.shape[1])
        largest = lax.top_k(scale[..., 0], min(EXTRA_BLOCKS, len(index)))[1]
        again = (index == largest[..., None]).any(1)[..., None]
        rounded += jnp.where(again, _round_blocks(blocks - rounded, 127)[0], 0)
    return rounded.reshape(rows, -1)[:, :k]


def _round_blocks(blocks: jax.Array, top: int) -> tuple[jax.Array, jax.Array]:
    """[T, B, 32] -> the nearest multiples of each block's scale, absmax / top, and the scales."""
    scale = jnp.max(jnp.abs(blocks), axis=-1, keepdims=True) / top
    return jnp.round(blocks / jnp.where(scale == 0, 1, scale)) * scale, scale


def _product(x: jax.Array, spec: WeightSpec, arrays: WeightArrays) -> jax.Array:
    """x [T, K] times the decoded weight [N, K], transposed: float32 [T, N]."""
    n, k = spec.shape
    # Whole groups of rows, so that a block of rows has whole scales.
    size = 1 if spec.group is None or spec.group[0] >= n else spec.group[0]
    block = max(1, BLOCK_ELEMENTS // k // size) * size
    if spec.layout == dense.LAYOUT:
        return _dot(x, arrays.qvalue)
    if spec.layout in planes.LAYOUTS:
        return _dot(x, planes.decode(spec, arrays))
    if n <= block or n % size or platform.device_kind() != "cpu":
        return _dot(x, decode(spec, arrays))

    def rows_from(start: jax.Array) -> jax.Array:
        def rows(array: jax.Array | None, group: int) -> jax.Array | None:
            if array is None or array.shape[0] == 1:
                return array
            return lax.dynamic_slice_in_dim(array, start // group, block // group)

        part = arrays._replace(
            qvalue=rows(arrays.qvalue, 1),
            scale=rows(arrays.scale, size),
            zero_point=rows(arrays.zero_point, size),
        )
        return _dot(x, decode(spec, part))

    # The last block is moved back so as to end with the weight; what it repeats is cut off.
    starts = jnp.minimum(jnp.arange(0, n, block), n - block)
    blocks = lax.map(rows_from, starts)  # [blocks, T, block]
    last = n - (len(starts) - 1) * block
    body = jnp.moveaxis(blocks[:-1], 0, 1).reshape(x.shape[0], n - last)
    return jnp.concatenate([body, blocks[-1, :, block - last :]], axis=-1)


def _dot(x: jax.Array, w: jax.Array) -> jax.Array:
    return lax.dot_general(
        x,
        w.astype(x.dtype),
        (((1,), (1,)), ((), ())),
        precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
