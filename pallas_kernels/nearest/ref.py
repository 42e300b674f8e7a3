"""The oracle: all distances, then the least."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.iq_grids import grid
from pallas_kernels.nearest.spec import DIGITS_BITS, Found, candidates


def nearest_level(y: jax.Array, levels: np.ndarray) -> jax.Array:
    """See `pallas_kernels.nearest.api.nearest_level`."""
    return jnp.asarray(levels)[jnp.abs(y[..., None] - levels).argmin(-1)]


def nearest_vector(y: jax.Array, w: jax.Array, name: str, near: int | None) -> Found:
    """See `pallas_kernels.nearest.api.nearest_vector`."""
    entries = jnp.asarray(grid(name), jnp.float32)
    levels, table = candidates(name, near)
    digits = jnp.abs(y[..., None] - levels).argmin(-1)
    point = (digits * len(levels) ** np.arange(y.shape[-1])).sum(-1)
    tried = jnp.asarray(table >> DIGITS_BITS)[jnp.minimum(point, len(table) - 1)]
    distance = (w[..., None, :] * jnp.square(y[..., None, :] - entries[tried])).sum(-1)
    index = jnp.take_along_axis(tried, distance.argmin(-1, keepdims=True), -1)[..., 0]
    return Found(entries[index], distance.min(-1), index)
