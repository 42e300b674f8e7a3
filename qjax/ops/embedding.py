"""Rows of a stored table."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.embedding import embedding as kernel
from qjax.ops.vocabulary import Vocabulary
from qjax.qarray import QArray
from qjax.sharding import MODEL, Parallel


def embedding(w: QArray, ids: jax.Array, parallel: Parallel | None = None) -> jax.Array:
    """Rows `ids` (int32 [T]) of the table w (shape (N, K)), decoded: float32 [T, K].

    Where the vocabulary is split, each device has some rows of the table, and one sum joins them.
    """
    vocabulary = Vocabulary.of(parallel)
    if vocabulary.parts == 1:
        return kernel(ids, (w.spec, w.arrays))
    size = w.shape[0]
    own = vocabulary.own(ids, size)
    rows = kernel(jnp.minimum(own, size - 1), (w.spec, w.arrays))
    return lax.psum(jnp.where((own < size)[:, None], rows, 0), MODEL)
