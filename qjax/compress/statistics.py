"""What calibration keeps of the inputs of a linear layer: enough for every method, and small.

The error that a change D [N, K] of a weight makes in its outputs is, on the average over inputs x,
E |D x|^2 = trace(D M D^T) with M = E[x x^T]: methods that minimize it need M, not the inputs.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.gram import gram


class InputStats(NamedTuple):
    """Of the inputs of one linear layer, or of each expert's, with a leading axis.

    Attributes:
      moment: float32 [K, K], the mean of x x^T over rows.
      absmean: float32 [K], the mean of |x|.
      low, high: float32 [K], the smallest and the largest x, at most and at least 0.
      rows: float32 [], how many there were.
    """

    moment: jax.Array
    absmean: jax.Array
    low: jax.Array
    high: jax.Array
    rows: jax.Array

    @property
    def absmax(self) -> jax.Array:
        """float32 [K], the largest |x|."""
        return jnp.maximum(-self.low, self.high)


def of_rows(x: jax.Array) -> InputStats:
    """Of all rows of x, float32 [T, K]."""
    return _weighted(x, jnp.float32(len(x)))


def of_experts(x: jax.Array, sizes: jax.Array) -> InputStats:
    """Of the rows that go to each expert, `sizes` [E] of them one after the other: [E, ...]."""
    last = jnp.cumsum(sizes)
    row = jnp.arange(len(x))

    def one(bounds: tuple[jax.Array, jax.Array]) -> InputStats:
        size, end = bounds
        own = (row >= end - size) & (row < end)
        return _weighted(jnp.where(own[:, None], x, 0), size.astype(jnp.float32))

    return lax.map(one, (sizes, last))


def _weighted(x: jax.Array, rows: jax.Array) -> InputStats:
    """Of rows of which all but `rows` are zero."""
    count = jnp.maximum(rows, 1)
    return InputStats(
        moment=gram(x) / count,
        absmean=jnp.abs(x).sum(0) / count,
        low=jnp.minimum(x.min(0), 0),
        high=jnp.maximum(x.max(0), 0),
        rows=rows,
    )


def merge(a: InputStats, b: InputStats) -> InputStats:
    """Of the rows of both."""
    rows = a.rows + b.rows
    share = b.rows / jnp.maximum(rows, 1)

    def mean(x: jax.Array, y: jax.Array) -> jax.Array:
        return x + (y - x) * share.reshape(share.shape + (1,) * (x.ndim - share.ndim))

    return InputStats(
        mean(a.moment, b.moment),
        mean(a.absmean, b.absmean),
        jnp.minimum(a.low, b.low),
        jnp.maximum(a.high, b.high),
        rows,
    )


def scaled(stats: InputStats, by: jax.Array) -> InputStats:
    """Of x * by, by > 0 [K]."""
    return InputStats(
        stats.moment * by[..., :, None] * by[..., None, :],
        stats.absmean * by,
        stats.low * by,
        stats.high * by,
        stats.rows,
    )
