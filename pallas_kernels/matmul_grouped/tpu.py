"""Grouped products with weights in planes on TPUs: the kernel of single products, told for each
tile of rows whose weight it meets. An expert without rows is not read.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.matmul.spec import WeightArrays, WeightSpec
from pallas_kernels.matmul.tpu import product
from pallas_kernels.matmul.tpu_plan import candidates
from pallas_kernels.matmul_grouped.bias import add_bias

__all__ = ["candidates", "matmul_grouped"]


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
    return add_bias(product(x, *weight, group_sizes=group_sizes), group_sizes, bias)
