"""The portable implementation: one expert after the other is decoded and meets all rows.

Shapes are static, so that all rows go through each product and those of the expert are kept. An
expert without rows is not decoded.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.matmul import xla
from pallas_kernels.matmul.spec import WeightArrays, WeightSpec


def matmul_grouped(
    x: jax.Array,
    group_sizes: jax.Array,
    weight: tuple[WeightSpec, WeightArrays],
    *,
    bias: jax.Array | None,
    activation_dtype: str,
) -> jax.Array:
    """See `pallas_kernels.matmul_grouped.api.matmul_grouped`."""
    spec, arrays = weight
    xla.require_public(spec)
    ends = jnp.cumsum(group_sizes)
    row = jnp.arange(len(x))

    def expert(e: jax.Array, y: jax.Array) -> jax.Array:
        def product(y: jax.Array) -> jax.Array:
            own = WeightArrays(
                *(None if a is None else lax.dynamic_index_in_dim(a, e, 0, False) for a in arrays)
            )
            (found,) = xla.matmul(
                x,
                ((spec, own),),
                norm=None,
                norm_eps=0.0,
                biases=(None if bias is None else bias[e],),
                activation=None,
                residual=None,
                post_norm=None,
                activation_dtype=activation_dtype,
                num_rows=None,
            )
            mine = (row >= ends[e] - group_sizes[e]) & (row < ends[e])
            return jnp.where(mine[:, None], found, y)

        return lax.cond(group_sizes[e] > 0, product, lambda y: y, y)

    return lax.fori_loop(0, len(group_sizes), expert, jnp.zeros((len(x), spec.shape[0])))
