"""Rows of a stored table."""

from __future__ import annotations

import jax

from pallas_kernels.embedding import embedding as kernel
from qjax.qarray import QArray


def embedding(w: QArray, ids: jax.Array) -> jax.Array:
    """Rows `ids` (int32 [T]) of the table w (shape (N, K)), decoded: float32 [T, K]."""
    return kernel(ids, (w.spec, w.arrays))
