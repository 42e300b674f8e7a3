"""The portable implementation: gather the raw rows, then decode only these."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp

from pallas_kernels.matmul.spec import WeightArrays, WeightSpec, decode, require_canonical


def embedding(ids: jax.Array, table: tuple[WeightSpec, WeightArrays]) -> jax.Array:
    """See `pallas_kernels.embedding.api.embedding`."""
    spec, arrays = table
    require_canonical(spec)
    size = 1 if spec.group is None else spec.group[0]
    ids = jnp.clip(ids, 0, spec.shape[0] - 1)

    def rows(array: jax.Array | None, group: int) -> jax.Array | None:
        return array if array is None or array.shape[0] == 1 else array[ids // group]

    picked = arrays._replace(
        qvalue=rows(arrays.qvalue, 1),
        scale=rows(arrays.scale, size),
        zero_point=rows(arrays.zero_point, size),
    )
    # Each picked row has scales of its own.
    group = None if spec.group is None else (1, spec.group[1])
    return decode(replace(spec, group=group), picked)
