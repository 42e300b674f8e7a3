"""Products with weights in planes on NVIDIA GPUs, as Pallas kernels that Triton compiles.

The kernel (`triton_kernel`) is the product alone; XLA fuses what is around it. With
`activation_dtype` "bfloat16" inputs are rounded to bfloat16, and codes, which are exact in it, meet
them unscaled where that is cheap; with all others products are of float32.

A row's result is the same whatever rows are beside it, for up to 32 rows, as long as no table of
measurements says otherwise: they are padded to 16 or 32, and the columns are cut into the same
parts, summed in the same order. (More are products of other matrix units.)
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import platform
from pallas_kernels.matmul.around import by_products
from pallas_kernels.matmul.gpu_operands import scaled_inputs, weight_operands
from pallas_kernels.matmul.spec import WeightArrays, WeightSpec
from pallas_kernels.matmul.triton_plan import Plan, candidates, plan_of

__all__ = ["candidates", "matmul", "product"]


def matmul(
    x: jax.Array, weights: tuple[tuple[WeightSpec, WeightArrays], ...], **around: Any
) -> tuple[jax.Array, ...]:
    """See `pallas_kernels.matmul.api.matmul`."""
    return by_products(product, x, weights, **around)


def product(
    x: jax.Array,
    spec: WeightSpec,
    arrays: WeightArrays,
    *,
    x_scale: jax.Array | None = None,
    num_rows: jax.Array | None = None,
) -> jax.Array:
    """(x * x_scale) @ w.T, with x as it is or as codes.

    Args:
      x: [T, K]. float32: an exact product. bfloat16: weights may be rounded to it. int8,
        float8_e4m3fn, float8_e5m2, or anything with an `x_scale`: codes, whose products with codes
        of the weight are exact: in int8 where both are integers, else in bfloat16 or float32.
        (Codes less a zero point are exact in bfloat16, too.)
      spec, arrays: a weight in the layout "planes".
      x_scale: float32 [T, groups of columns]; K is a multiple of the groups.
      num_rows: int32 [1]; rows from there on are padding, with unspecified outputs.

    Returns:
      float32 [T, N].

    Raises:
      NotImplementedError: the weight lies otherwise, its kind or the groups of x are none of the
        kernel's, or this is no GPU.
      ValueError: `x_scale` does not fit x.
    """
    interpret = platform.interprets("gpu")
    x_group, scales, after = scaled_inputs(x, x_scale)
    plan = plan_of(
        spec,
        x.shape[0],
        x.dtype,
        exact_codes=x_scale is not None,
        x_group=x_group,
        counted=num_rows is not None,
    )
    operands = weight_operands(spec, arrays) | {"x": padded(x, plan)} | scales
    if num_rows is not None:
        operands["num_rows"] = num_rows
    from pallas_kernels.matmul import triton_kernel  # jax has it on some systems only

    y = triton_kernel.product(plan, operands, interpret)
    return y if after is None else y * after


def padded(x: jax.Array, plan: Plan) -> jax.Array:
    """x of the type that the kernel takes, with zeros for the columns that K was filled up with."""
    x = x.astype(plan.dot)
    missing = plan.planes.k - x.shape[1]
    return jnp.pad(x, ((0, 0), (0, missing))) if missing else x
