"""Grouped products with weights in planes on NVIDIA Hopper GPUs: the kernel of single products
(`pallas_kernels.matmul.mosaic_gpu`), told for each tile of rows whose weight it meets.

Rows are brought into tiles of one expert each first, and their outputs back into order.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels import platform
from pallas_kernels.matmul.gpu_operands import scaled_inputs, weight_operands
from pallas_kernels.matmul.mosaic_gpu import (
    check_device,
    padded,
    require_bfloat16,
    scaled,
    spread,
    taken_out,
)
from pallas_kernels.matmul.mosaic_gpu_plan import candidates, plan_of
from pallas_kernels.matmul.spec import WeightArrays, WeightSpec
from pallas_kernels.matmul_grouped.bias import add_bias
from pallas_kernels.matmul_grouped.tile_table import experts_of, places, tile_table

__all__ = ["candidates", "matmul_grouped", "product"]


def matmul_grouped(
    x: jax.Array,
    group_sizes: jax.Array,
    weight: tuple[WeightSpec, WeightArrays],
    *,
    bias: jax.Array | None,
    activation_dtype: str,
) -> jax.Array:
    """See `pallas_kernels.matmul_grouped.api.matmul_grouped`.

    Raises:
      NotImplementedError: see `product`; or `activation_dtype` is not "bfloat16".
    """
    require_bfloat16(activation_dtype)
    return add_bias(product(x.astype(jnp.bfloat16), group_sizes, *weight), group_sizes, bias)


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
      x, spec, x_scale: see `pallas_kernels.matmul.mosaic_gpu.product`.
      group_sizes: int32 [E].
      arrays: in the layout "planes", with a leading axis E.

    Returns:
      float32 [T, N]; rows behind the last group are unspecified.

    Raises:
      NotImplementedError, ValueError: see there.
    """
    interpret = platform.interprets("gpu")
    check_device(interpret)
    x_group, scales, x_after = scaled_inputs(x, x_scale)
    operands = weight_operands(spec, arrays)
    rows, experts = x.shape[0], group_sizes.shape[0]
    plan = plan_of(
        spec,
        max(1, -(-rows // experts)),
        x.dtype,
        exact_codes=x_scale is not None,
        x_group=x_group,
        has_global_scale="global_scale" in operands,
    )
    whole = operands.pop("global_scale", None)
    operands |= jax.vmap(lambda each: spread(each, plan))(
        {name: operands[name] for name in ("scale", "zero") if name in operands}
    )
    after = {name: array[:, 0] for name, array in taken_out(operands, plan).items()}
    operands = {name: a.reshape(-1, a.shape[-1]) for name, a in operands.items()}

    tile = plan.blocks.rows
    table = tile_table(group_sizes, rows, tile)
    taken = (table["start"][:, None] + jnp.arange(tile)).reshape(-1).clip(0, max(rows - 1, 0))
    operands |= {"x": padded(x[taken], plan), "expert": table["expert"]}
    if x_group is not None:
        missing = -(-plan.planes.k // x_group) - len(scales["x_scale"])
        operands["x_scale"] = jnp.pad(scales["x_scale"][:, taken], ((0, missing), (0, 0)))
    from pallas_kernels.matmul import mosaic_gpu_kernel  # jax needs more than itself for it

    expert = experts_of(rows, group_sizes)
    y = mosaic_gpu_kernel.product(plan, operands, interpret)[places(group_sizes, expert, tile)]
    y = scaled(y, x, x_scale, {name: array[expert] for name, array in after.items()}, plan)
    y = y if x_after is None else y * x_after
    return y if whole is None else y * whole.reshape(experts, 1)[expert]
