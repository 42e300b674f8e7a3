"""Native CPU kernel of the table look-up: decodes the wanted rows of a tiled weight."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.matmul import tiles
from pallas_kernels.matmul.spec import WeightArrays, WeightSpec


def embedding(ids: jax.Array, table: tuple[WeightSpec, WeightArrays]) -> jax.Array:
    """See `pallas_kernels.embedding.api.embedding`."""
    spec, arrays = table
    kind = tiles.require(spec)
    n, k = spec.shape
    call = jax.ffi.ffi_call(
        "qjax_embedding",
        jax.ShapeDtypeStruct((ids.shape[0], k), jnp.float32),
        vmap_method="sequential",
    )
    return call(
        ids,
        *tiles.given(arrays),
        type=np.int32(kind.number),
        beside=np.array(tiles.beside(spec, arrays), np.int32),
        n=np.int64(n),
    )
