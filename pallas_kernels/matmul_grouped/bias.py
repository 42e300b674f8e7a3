"""What comes after grouped products, for implementations whose kernel is the product alone."""

from __future__ import annotations

import jax

from pallas_kernels.matmul_grouped.tile_table import experts_of


def add_bias(y: jax.Array, group_sizes: jax.Array, bias: jax.Array | None) -> jax.Array:
    """y, float32 [T, N], with the bias, [E, N], of each row's expert."""
    return y if bias is None else y + bias[experts_of(len(y), group_sizes)]
