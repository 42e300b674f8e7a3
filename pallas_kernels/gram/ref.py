"""The oracle: every product, then the sums."""

from __future__ import annotations

import jax


def gram(x: jax.Array) -> jax.Array:
    """See `pallas_kernels.gram.api.gram`."""
    return (x[:, :, None] * x[:, None, :]).sum(0)
