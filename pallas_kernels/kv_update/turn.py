"""What happens to the heads of queries and keys before they meet, where a kernel does not do it."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.matmul.around import rms_norm


def turn(
    heads: jax.Array,
    rope: tuple[jax.Array, jax.Array] | None,
    weight: jax.Array | None = None,
    eps: float = 0.0,
) -> jax.Array:
    """RMSNorm of each head, then rope of its first dimensions, pairs of which lie half apart.

    Args:
      heads: float32 [T, H, D].
      rope: (cos, sin), float32 [T, rotary_dim / 2], or None for no rotation.
      weight: float32 [D], of the norm, or None for no norm.
    """
    heads = rms_norm(heads, weight, eps)
    if rope is None:
        return heads
    cos, sin = (table[:, None] for table in rope)
    half = cos.shape[-1]
    x1, x2, rest = heads[..., :half], heads[..., half : 2 * half], heads[..., 2 * half :]
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin, rest], axis=-1)
