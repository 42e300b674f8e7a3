"""SmoothQuant (arXiv:2211.10438): what makes inputs hard to round goes into the weights.

Conventions of LLM Compressor: the size of an input channel is the largest less the smallest value,
and that of a weight's column twice the largest magnitude.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

_LEAST = 1e-5


def largest_of_columns(weights: Sequence[jax.Array]) -> jax.Array:
    """The largest magnitude in each column of matrices [..., N, K]: float32 [K]."""
    each = [jnp.abs(w).astype(jnp.float32).max(tuple(range(w.ndim - 1))) for w in weights]
    return jnp.stack(each).max(0)


def scales(
    low: jax.Array,
    high: jax.Array,
    largest: jax.Array,
    strength: float = 0.5,
    algorithm: str = "smoothquant",
) -> jax.Array:
    """What inputs are divided by and the columns of the weights that read them multiplied with.

    Args:
      low, high: float32 [K], the extremes of the inputs over all rows.
      largest: float32 [K], of the weights that read them, see `largest_of_columns`.
      strength: from 0 (all goes to the inputs) to 1 (inputs become equally large).
      algorithm: "smoothquant"; or "log_equalization" (arXiv:2308.15987), x / log2(2 + x) of the
        inputs' size x alone.

    Returns:
      float32 [K], above 0.
    """
    size = high - low
    if algorithm == "log_equalization":
        return jnp.maximum(size / jnp.log2(2 + size), _LEAST)
    weight = 2 * largest
    found = size**strength / jnp.where(weight > 0, weight, 1) ** (1 - strength)
    return jnp.maximum(jnp.where(weight > 0, found, size), _LEAST)
