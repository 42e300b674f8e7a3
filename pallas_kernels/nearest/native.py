"""Native CPU kernels: each vector's candidates side by side in the lanes of a processor."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import native
from pallas_kernels.nearest.spec import Found, candidates


def nearest_level(y: jax.Array, levels: np.ndarray) -> jax.Array:
    """See `pallas_kernels.nearest.api.nearest_level`."""
    native.require()
    result = jax.ShapeDtypeStruct(y.shape, jnp.float32)
    call = jax.ffi.ffi_call("qjax_nearest_level", result, vmap_method="broadcast_all")
    return call(y, levels=levels)


def nearest_vector(y: jax.Array, w: jax.Array, name: str, near: int | None) -> Found:
    """See `pallas_kernels.nearest.api.nearest_vector`."""
    native.require()
    levels, table = candidates(name, near)
    results = [
        jax.ShapeDtypeStruct(y.shape, jnp.float32),
        jax.ShapeDtypeStruct(y.shape[:-1], jnp.float32),
        jax.ShapeDtypeStruct(y.shape[:-1], jnp.int32),
    ]
    call = jax.ffi.ffi_call("qjax_nearest_vector", results, vmap_method="sequential")
    return Found(*call(y, w, jnp.asarray(table), levels=levels))
