"""The portable implementation: gather the raw rows, then decode only these."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels import unpack
from pallas_kernels.matmul.spec import WeightSpec, require_canonical


def embedding(ids: jax.Array, table: tuple[WeightSpec, jax.Array]) -> jax.Array:
    """See `pallas_kernels.embedding.api.embedding`."""
    spec, qvalue = table
    require_canonical(spec)
    return unpack.dequantize(jnp.take(qvalue, ids, axis=0, mode="clip"), spec.qtype)
