"""Grouped products with weights in planes on NVIDIA GPUs: the kernel of single products, told for
each tile of rows whose weight it meets. An expert without rows is not read.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels import platform
from pallas_kernels.matmul.gpu_operands import scaled_inputs, weight_operands
from pallas_kernels.matmul.spec import WeightArrays, WeightSpec
from pallas_kernels.matmul.triton import padded
from pallas_kernels.matmul.triton_plan import candidates, plan_of
from pallas_kernels.matmul_grouped.bias import add_bias
from pallas_kernels.matmul_grouped.tile_table import tile_table

__all__ = ["candidates", "matmul_grouped", "product"]


def matmul_grouped(
    x: jax.Array,
    group_sizes: jax.Array,
    weight: tuple[WeightSpec, WeightArrays],
    *,
    bias: jax.Array | None,
    activation_dtype: str,
) -> jax.Array:
    """See `pallas_kernels.matmul_grouped.api.matmul_grouped`."""
    if activation_dtype == "bfloat16":
        x = x.astype(jnp.bfloat16)
    return add_bias(product(x, group_sizes, *weight), group_sizes, bias)


def product(
    x: jax.Array,
    group_sizes: jax.Array,
    spec: WeightSpec,
    arrays: WeightArrays,
    *,
    x_scale: jax.Array | None = None,
) -> jax.Array:
    """(x[t] * x_scale[t]) @ w[e].T, where e is the expert of row t.

    Args:
      x, spec, x_scale: see `pallas_kernels.matmul.triton.product`.
      group_sizes: int32 [E].
      arrays: in the layout "planes", with a leading axis E.

    Returns:
      float32 [T, N]; rows behind the last group are unspecified.

    Raises:
      NotImplementedError, ValueError: see there.
    """
    interpret = platform.interprets("gpu")
    x_group, scales, after = scaled_inputs(x, x_scale)
    plan = plan_of(
        spec,
        x.shape[0],
        x.dtype,
        exact_codes=x_scale is not None,
        x_group=x_group,
        experts=group_sizes.shape[0],
    )
    operands = weight_operands(spec, arrays) | {"x": padded(x, plan)}
    table = tile_table(group_sizes, x.shape[0], plan.blocks.rows)
    from pallas_kernels.matmul import triton_kernel  # jax has it on some systems only

    y = triton_kernel.product(plan, operands | scales | table, interpret)
    return y if after is None else y * after
