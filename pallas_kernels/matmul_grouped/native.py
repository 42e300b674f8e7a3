"""Native CPU kernel of grouped products, as an XLA custom call on tiled weights."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.matmul import native, tiles
from pallas_kernels.matmul.spec import WeightArrays, WeightSpec


def matmul_grouped(
    x: jax.Array,
    group_sizes: jax.Array,
    weight: tuple[WeightSpec, WeightArrays],
    *,
    bias: jax.Array | None,
    activation_dtype: str,
) -> jax.Array:
    """See `pallas_kernels.matmul_grouped.api.matmul_grouped`."""
    spec, arrays = weight
    kind = tiles.require(spec)
    call = jax.ffi.ffi_call(
        "qjax_matmul_grouped",
        jax.ShapeDtypeStruct((len(x), spec.shape[0]), jnp.float32),
        vmap_method="sequential",
    )
    return call(
        x,
        group_sizes,
        *tiles.given(arrays),
        *([] if bias is None else [bias]),
        type=np.int32(kind.number),
        beside=np.array(tiles.beside(spec, arrays), np.int32),
        has_bias=np.int32(bias is not None),
        precision=np.int32(native.PRECISION[activation_dtype]),
    )
