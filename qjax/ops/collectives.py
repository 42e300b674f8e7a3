"""What devices that share a model tell each other; without a `Parallel`, one device has it all."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from qjax.sharding import MODEL, Parallel

Axes = tuple[str, ...]


def summed(x: jax.Array, parallel: Parallel | None) -> jax.Array:
    """The sum of what all devices have: the one all-reduce of a block."""
    return x if parallel is None else lax.psum(x, MODEL)


def extremes(x: jax.Array, axes: Axes) -> jax.Array:
    """[..., 2]: the smallest and the largest number of rows [..., K] of which each device has some
    columns."""
    both = jnp.stack([-x.min(-1), x.max(-1)], -1)
    low, high = jnp.moveaxis(lax.pmax(both, axes), -1, 0)
    return jnp.stack([-low, high], -1)


def gathered(x: jax.Array, axes: Axes) -> jax.Array:
    """Rows [..., K] of which each device has some columns, whole."""
    return lax.all_gather(x, axes, axis=x.ndim - 1, tiled=True)
