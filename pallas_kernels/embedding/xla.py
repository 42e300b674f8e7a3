"""The portable implementation: gather the raw rows, then decode only these."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp

from pallas_kernels.matmul import dense, planes
from pallas_kernels.matmul.spec import WeightArrays, WeightSpec, decode, require_canonical


def embedding(ids: jax.Array, table: tuple[WeightSpec, WeightArrays]) -> jax.Array:
    """See `pallas_kernels.embedding.api.embedding`."""
    spec, arrays = table
    ids = jnp.clip(ids, 0, spec.shape[0] - 1)
    if spec.layout == dense.LAYOUT:
        return jnp.asarray(arrays.qvalue)[ids].astype(jnp.float32)
    if spec.layout in planes.LAYOUTS:
        return _from_planes(ids, spec, arrays)
    require_canonical(spec)
    size = 1 if spec.group is None else spec.group[0]

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


def _from_planes(ids: jax.Array, spec: WeightSpec, arrays: WeightArrays) -> jax.Array:
    """The same from a table in one of the layouts of `planes`, whose scales run along columns.

    ids: none of them outside.
    """
    group = planes.describe(spec).group
    groups = ids // group[0]

    def rows(array: jax.Array | None) -> jax.Array | None:
        return array if array is None or array.shape[1] == 1 else array[:, groups]

    transposed = spec.layout == planes.TRANSPOSED
    picked = arrays._replace(
        qvalue=arrays.qvalue[:, ids] if transposed else arrays.qvalue[ids],
        scale=rows(arrays.scale),
        zero_point=rows(arrays.zero_point),
        super_scale=rows(arrays.super_scale),
        super_zero=rows(arrays.super_zero),
    )
    own = None if spec.group is None else (1, group[1])
    return planes.decode(replace(spec, shape=(len(ids), spec.shape[1]), group=own), picked)
