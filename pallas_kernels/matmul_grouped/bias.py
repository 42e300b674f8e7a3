"""What comes after grouped products, for implementations whose kernel is the product alone."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def add_bias(y: jax.Array, group_sizes: jax.Array, bias: jax.Array | None) -> jax.Array:
    """y, float32 [T, N], with the bias, [E, N], of each row's expert."""
    return y if bias is None else y + bias[experts_of(len(y), group_sizes)]


def experts_of(rows: int, group_sizes: jax.Array) -> jax.Array:
    """int32 [rows]: whose each row is; of padding, the last one's."""
    ends = jnp.cumsum(group_sizes)
    return (jnp.arange(rows)[:, None] >= ends[None, :-1]).sum(1)
